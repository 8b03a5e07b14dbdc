"""The op as a citizen of torch: opcheck, compile, export, autocast, derivatives."""

from collections.abc import Callable

import pytest
import torch
from attention.cases import PADDED, AttentionCase
from attention.random_inputs import permuted, random_qkv, random_spans
from tolerance import assert_conforms
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pyvlm.layout import AttentionSpans, TokenLayout
from pyvlm.ops.attention import span_attention


@pytest.mark.parametrize(
    ("ranges", "separate", "dtype", "sinks_dtype"),
    [
        (1, False, torch.float32, None),
        (2, False, torch.bfloat16, None),
        (2, True, torch.float32, None),
        (2, True, torch.float64, None),
        (1, False, torch.bfloat16, torch.bfloat16),
        (2, True, torch.float32, torch.float32),
        (2, True, torch.bfloat16, torch.float32),  # gradients of two dtypes
    ],
    ids=str,
)
def test_opcheck(ranges: int, separate: bool, dtype: torch.dtype, sinks_dtype: torch.dtype | None) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 4, 2, 5, 7, 8, dtype))
    spans = random_spans(2, 5, 7, ranges, separate)
    sinks = None if sinks_dtype is None else torch.randn(4, dtype=sinks_dtype, requires_grad=True)
    mask = (spans.bounds, spans.key_class, list(spans.range_classes), separate, 0.3, 0.0)
    torch.library.opcheck(torch.ops.pyvlm.span_attention.default, (q, k, v, *mask, sinks))

    q, k, v, sinks = (None if x is None else x.detach() for x in (q, k, v, sinks))
    mask = (*mask, sinks)
    out, stream_out, lse = torch.ops.pyvlm.span_attention(q, k, v, *mask)
    for cotangents in ((out, lse), (None, lse)):
        torch.library.opcheck(
            torch.ops.pyvlm.span_attention_backward.default,
            (*cotangents, q, k, v, *mask, out, stream_out, lse),
        )


@pytest.mark.parametrize("permutation", [(0, 2, 1, 3), (1, 0, 3, 2)], ids=str)
def test_opcheck_of_strides(permutation: tuple[int, ...]) -> None:
    # The fake kernel must promise the strides that the real one gives.
    q, k, v = (permuted(x, permutation).requires_grad_() for x in random_qkv(2, 4, 2, 5, 7, 8))
    spans = random_spans(2, 5, 7)
    mask = (spans.bounds, spans.key_class, list(spans.range_classes), True, 0.3, 2.0, None)
    torch.library.opcheck(torch.ops.pyvlm.span_attention.default, (q, k, v, *mask))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("rule", ["mmca", "bidirectional_image"])
def test_compiles_in_one_graph(rule: str, sinks: bool, backend: str) -> None:
    assert_compiles(rule, backend, compiler="aot_eager", sinks=sinks)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_inductor() -> None:
    assert_compiles(
        "mmca", "native", compiler="inductor"
    )  # the reference would be a minute of C++ compilation


def assert_compiles(rule: str, backend: str, compiler: str, sinks: bool = False) -> None:
    case = AttentionCase("padded", "", rule, PADDED, sinks=sinks)
    spans = case.spans()
    q, k, v, out_grad = case.inputs(torch.float32)
    inputs = (q, k, v, case.sink_scores(torch.float32)) if sinks else (q, k, v)

    def out_and_grads(attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        q, k, v, *sinks = leaves = [x.detach().requires_grad_() for x in inputs]
        out = attention(q, k, v, spans, *sinks)
        return (out.detach(), *torch.autograd.grad(out, leaves, out_grad))

    compiled = torch.compile(out_of(backend), fullgraph=True, backend=compiler)
    for actual, expected in zip(out_and_grads(compiled), out_and_grads(out_of(backend)), strict=True):
        assert_conforms(actual, expected)


def out_of(backend: str) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, spans: AttentionSpans, sinks: Tensor | None = None) -> Tensor:
        return span_attention(q, k, v, spans, sinks=sinks, backend=backend)

    return attend


@pytest.mark.usefixtures("fresh_compiler")
def test_new_ranges_compile_nothing_new(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(out_of(backend), fullgraph=True, backend=counter)
    for rows in (("t5 i9 t4 i6 t7",), ("i3 t1 | t20 i4 p3",)):
        case = AttentionCase("any", "", "mmca", rows)
        q, k, v, _ = case.inputs(torch.float32)
        spans = case.spans()
        assert torch.equal(compiled(q, k, v, spans), span_attention(q, k, v, spans, backend=backend))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_layout_to_output_compiles_in_one_graph(backend: str) -> None:
    case = AttentionCase("padded", "", "mmca", PADDED)
    q, k, v, _ = case.inputs(torch.float32)
    layout = case.layout()

    def attend(kind: Tensor, image: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return span_attention(q, k, v, TokenLayout(kind, image).spans("mmca"), backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    arguments = (layout.kind, layout.image, q, k, v)
    assert torch.equal(compiled(*arguments), attend(*arguments))


@pytest.mark.usefixtures("fresh_compiler")
def test_exports(backend: str) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, kind: Tensor) -> Tensor:
            return span_attention(q, k, v, TokenLayout(kind).spans("mmca"), backend=backend)

    case = AttentionCase("padded", "", "mmca", PADDED)
    q, k, v, _ = case.inputs(torch.float32)
    kind = case.layout().kind
    program = torch.export.export(Attend(), (q, k, v, kind))
    assert torch.equal(program.module()(q, k, v, kind), Attend()(q, k, v, kind))


def test_autocast_brings_dtypes_together(backend: str) -> None:
    q, k, v = random_qkv(1, 2, 2, 5, 7, 8)
    spans = random_spans(1, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = span_attention(q, k.bfloat16(), v, spans, backend=backend)
    expected = span_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), spans, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 1, 1, 3, 5, 8))
    kind = torch.ones(1, 5, dtype=torch.uint8)
    out = span_attention(q, k, v, TokenLayout(kind).spans("causal", query_start=2), backend="native")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dq.square().sum().backward()

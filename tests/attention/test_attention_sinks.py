"""Attention sinks: one more score in every softmax of a head, with no value.

The shared cases and random spans of `test_span_attention.py` have sinks too; here is what is their own.
"""

from types import SimpleNamespace

import pytest
import torch
from attention.cases import PADDED, AttentionCase
from attention.checks import assert_results_close
from attention.random_inputs import random_qkv, random_spans
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.layout import AttentionSpans, TokenLayout
from pyvlm.ops.attention import span_attention

HALF_EMPTY = torch.tensor([[0, 0, 1, 2, 2], [2, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", [None, 5], ids=["full", "sliding"])
def test_it_is_the_attention_of_gpt_oss(window: int | None, dtype: torch.dtype, backend: str) -> None:
    reason = "transformers, an optional package, is not installed"
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss", reason=reason)
    case = AttentionCase("gpt-oss", "", "causal", PADDED, heads=6, kv_heads=2, window=window, sinks=True)
    spans = case.spans()
    q, k, v, out_grad = case.inputs(dtype)
    mask_B1QK = torch.zeros(spans.dense().shape, dtype=dtype).masked_fill(~spans.dense(), -torch.inf)

    def theirs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        module = SimpleNamespace(sinks=sinks, num_key_value_groups=3, training=False)
        out_BQHD, _ = modeling.eager_attention_forward(module, q, k, v, mask_B1QK, scaling=0.25)
        return out_BQHD.transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return span_attention(q, k, v, spans, scale=0.25, sinks=sinks, backend=backend)

    def out_and_grads(attention) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v, case.sink_scores(dtype))]
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, out_grad)]

    for name, actual, expected in zip(
        ("out", "dq", "dk", "dv", "dsinks"), out_and_grads(ours), out_and_grads(theirs), strict=True
    ):
        assert_conforms(actual, expected, name, gradient=name != "out")


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_a_sink_takes_its_share_of_the_weight(separate: bool, backend: str) -> None:
    """out = Σ_r sigmoid(lse_r − sink) · out_r, where out_r and lse_r are those of a softmax with no sink."""
    q, k, v = random_qkv(2, 4, 2, 11, 13, 16, torch.float64)
    spans = random_spans(2, 11, 13, 2, separate)
    sinks = torch.randn(4, dtype=torch.float64)
    streams = [spans]
    if separate:
        streams = [
            AttentionSpans(
                spans.bounds[:, :, r : r + 1], spans.key_class, spans.range_classes[r : r + 1], False
            )
            for r in range(2)
        ]
    expected = torch.zeros_like(q)
    for stream in streams:
        out, lse = span_attention(q, k, v, stream, return_lse=True, backend=backend)
        expected += torch.sigmoid(lse.transpose(2, 3) - sinks[:, None, None]) * out
    assert_conforms(span_attention(q, k, v, spans, sinks=sinks, backend=backend), expected)


@pytest.mark.parametrize("rule", ["causal", "mmca"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_query_that_sees_nothing_sees_the_sink(dtype: torch.dtype, rule: str, backend: str) -> None:
    spans = TokenLayout(HALF_EMPTY).spans(rule)
    q, k, v = (x.requires_grad_() for x in random_qkv(3, 2, 1, 5, 5, 16, dtype))
    sinks = torch.tensor([-3.0, 0.5], dtype=dtype, requires_grad=True)
    out, lse = span_attention(q, k, v, spans, sinks=sinks, return_lse=True, backend=backend)
    dense = spans.dense() if spans.separate else spans.dense().any(1, keepdim=True)
    empty = ~dense.any(-1)[:, None].expand_as(lse)
    padding = HALF_EMPTY == 0
    assert torch.equal(lse[empty], sinks.to(lse.dtype)[:, None, None].expand_as(lse)[empty])
    assert (lse > sinks.to(lse.dtype)[:, None, None])[~empty].all()
    assert (out.transpose(1, 2)[padding] == 0).all()
    # The lse of an empty softmax is the sink, and so hands its gradient on to it, and to nothing else.
    lse[empty].sum().backward()
    assert not any(x.grad is not None and x.grad.any() for x in (q, k, v))
    assert sinks.grad.tolist() == [empty[:, 0].sum(), empty[:, 1].sum()]


@pytest.mark.parametrize("sink", [-80.0, 80.0, 3000.0], ids=["nothing", "nearly all", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks_of_any_size(dtype: torch.dtype, sink: float, backend: str) -> None:
    q, k, v = random_qkv(1, 2, 1, 23, 31, 16, dtype)
    sinks = torch.tensor([sink, 0.0], dtype=dtype)
    assert_results_close(backend, q, k, v, random_spans(1, 23, 31), sinks=sinks)


@pytest.mark.parametrize("queries", [23, 2], ids=["tiles", "few queries"])
def test_a_sink_of_minus_infinity_is_none(queries: int, backend: str) -> None:
    q, k, v = random_qkv(1, 2, 1, queries, 31, 16)
    spans = random_spans(1, queries, 31)
    spans.bounds[0, 0] = 5  # a query that sees nothing
    sinks = torch.full((2,), -torch.inf)
    results = []
    for given in (None, sinks):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = span_attention(*leaves, spans, sinks=given, return_lse=True, backend=backend)
        results.append((out.detach(), lse.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for with_sink, without in zip(*reversed(results), strict=True):
        assert_conforms(with_sink, without, gradient=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sinks_far_below_leave_the_gradients_of_empty_rows_finite(dtype: torch.dtype, backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 1, 1, 5, 5, 16, dtype))
    spans = TokenLayout(HALF_EMPTY[:1]).spans("mmca")
    sinks = torch.tensor([-1000.0], dtype=dtype)
    span_attention(q, k, v, spans, sinks=sinks, backend=backend).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("sinks_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks_of_a_dtype_of_their_own(dtype: torch.dtype, sinks_dtype: torch.dtype, backend: str) -> None:
    q, k, v = random_qkv(1, 4, 2, 23, 31, 16, dtype)
    sinks = torch.randn(4).bfloat16().to(sinks_dtype)  # the same numbers in every dtype
    assert_results_close(backend, q, k, v, random_spans(1, 23, 31), sinks=sinks)


def test_sinks_of_any_strides(backend: str) -> None:
    q, k, v = random_qkv(1, 4, 2, 5, 7, 8)
    spans = random_spans(1, 5, 7)
    sinks = torch.randn(4)
    for strided in (sinks.repeat_interleave(3)[::3], sinks[:1].expand(4)):
        grads = []
        for given in (strided, strided.clone(memory_format=torch.contiguous_format)):
            leaf = given.detach().requires_grad_()
            out = span_attention(q, k, v, spans, sinks=leaf, backend=backend)
            grads.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_gradcheck(separate: bool, backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 4, 2, 5, 7, 4, torch.float64))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    spans = random_spans(2, 5, 7, 2, separate)
    assert not spans.dense().any(-1).all()  # some are empty

    def out_and_lse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return span_attention(
            q, k, v, spans, scale=0.7, softcap=3.0, sinks=sinks, return_lse=True, backend=backend
        )

    assert torch.autograd.gradcheck(out_and_lse, (q, k, v, sinks))


@pytest.mark.parametrize("needed", [("sinks",), ("q", "k", "v")], ids="-".join)
def test_gradients_of_some_inputs_only(needed: tuple[str, ...], backend: str) -> None:
    q, k, v = random_qkv(1, 2, 1, 6, 11, 8)
    inputs = {"q": q, "k": k, "v": v, "sinks": torch.randn(2)}
    spans = random_spans(1, 6, 11)
    everything = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    some = {name: x.clone().requires_grad_(name in needed) for name, x in inputs.items()}
    for leaves in (everything, some):
        span_attention(**leaves, spans=spans, backend=backend).square().sum().backward()
    for name in inputs:
        if name in needed:
            assert torch.equal(some[name].grad, everything[name].grad)
        else:
            assert some[name].grad is None


def test_autocast_leaves_sinks_as_they_are(backend: str) -> None:
    q, k, v = random_qkv(1, 2, 2, 5, 7, 8)
    spans = random_spans(1, 5, 7)
    sinks = torch.tensor([1 + 2**-20, 0.1], requires_grad=True)  # bf16 would round them
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = span_attention(q, k, v, spans, sinks=sinks, return_lse=True, backend=backend)
    low = (x.bfloat16() for x in (q, k, v))
    expected = span_attention(*low, spans, sinks=sinks, return_lse=True, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    (grad,) = torch.autograd.grad(out.float().square().sum(), sinks)
    assert grad.dtype == torch.float32

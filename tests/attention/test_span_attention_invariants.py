"""What holds bit for bit: any strides, any number of threads; and no row depends on what it does not see."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from attention.cases import AttentionCase
from attention.random_inputs import permuted, random_qkv, random_spans
from attention.random_layouts import Token, layout_of, rows, windows
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.layout import RULES, AttentionSpans
from pyvlm.ops.attention import span_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def out_and_grads(
    q: Tensor, k: Tensor, v: Tensor, spans: AttentionSpans, backend: str, out_grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    out = span_attention(*leaves, spans, backend=backend)
    out_grad = torch.ones_like(out) if out_grad is None else out_grad
    return (out.detach(), *torch.autograd.grad(out, leaves, out_grad))


def assert_all_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert torch.equal(a, e), name


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens before heads": lambda x: permuted(x, (0, 2, 1, 3)),
    "head dimension first": lambda x: permuted(x, (3, 0, 1, 2)),
    "batch last": lambda x: permuted(x, (1, 2, 3, 0)),
    "every second value": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "part of a larger tensor": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4, 1, 1), value=torch.nan)[
        :, 1:-1, 1:-4, 3:-2
    ],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("queries", [37, 3], ids=["", "few queries"])
def test_any_strides(name: str, dtype: torch.dtype, queries: int) -> None:
    actual, expected = strided_and_not(name, dtype, queries, "native")
    assert_all_equal(actual, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_reference_takes_any_strides(name: str) -> None:
    """Not bit for bit: torch.matmul takes another path for other strides, which on some machines rounds
    otherwise."""
    for actual, expected in zip(*strided_and_not(name, torch.float64, 37, "reference"), strict=True):
        assert_conforms(actual, expected)


def strided_and_not(
    name: str, dtype: torch.dtype, queries: int, backend: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Output and gradients for strided inputs, and for the same values as they usually lie."""
    q, k, v = random_qkv(2, 4, 2, queries, 41, 16, dtype)
    spans = random_spans(2, queries, 41)
    out_grad = torch.randn(q.shape).to(dtype)
    strided = [LAYOUTS[name](x) for x in (q, k, v, out_grad)]
    assert not any(x.is_contiguous() for x in strided)
    return (
        out_and_grads(*strided[:3], spans, backend, strided[3]),
        out_and_grads(q, k, v, spans, backend, out_grad),
    )


def test_expanded_inputs_and_cotangents(backend: str) -> None:
    q, k, v = random_qkv(1, 2, 2, 5, 7, 8)
    spans = random_spans(3, 5, 7)
    expanded = [x.expand(3, -1, -1, -1) for x in (q, k, v)]
    one = torch.ones(()).expand(3, 2, 5, 8)
    actual = out_and_grads(*expanded, spans, backend, one)
    assert_all_equal(
        actual, out_and_grads(*(x.contiguous() for x in expanded), spans, backend, one.contiguous())
    )


def test_spans_of_any_strides(backend: str) -> None:
    q, k, v = random_qkv(2, 2, 2, 5, 7, 8)
    spans = random_spans(2, 5, 7)
    odd = AttentionSpans(
        spans.bounds.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        spans.key_class.T.contiguous().T,
        spans.range_classes,
        spans.separate,
    )
    assert not odd.bounds.is_contiguous()
    assert_all_equal(out_and_grads(q, k, v, odd, backend), out_and_grads(q, k, v, spans, backend))


def test_inputs_are_left_alone(backend: str) -> None:
    inputs = random_qkv(2, 4, 2, 37, 41, 16)
    spans = random_spans(2, 37, 41)
    watched = (*inputs, spans.bounds, spans.key_class)
    before = [x.clone() for x in watched]
    out_and_grads(*inputs, spans, backend)
    assert all(torch.equal(x, y) for x, y in zip(watched, before, strict=True))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries"),
    [(4, 2, 300), (8, 1, 300), (4, 2, 3)],
    ids=["tiles", "heads in parts", "few queries, split keys"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_every_run_and_for_any_number_of_threads(
    dtype: torch.dtype, heads: int, kv_heads: int, queries: int
) -> None:
    keys = 1300 if queries < 10 else 310
    q, k, v = random_qkv(2, heads, kv_heads, queries, keys, 32, dtype)
    spans = random_spans(2, queries, keys)
    out_grad = torch.randn(q.shape).to(dtype)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            runs.append(out_and_grads(q, k, v, spans, "native", out_grad))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert_all_equal(run, runs[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_row_depends_on_nothing_that_it_does_not_see(rule: str, dtype: torch.dtype, backend: str) -> None:
    case = AttentionCase("long", "", rule, ("T9 I40 t30 i50 t21 p4", "p14 i60 t20 i10 | T20 i20 t10"))
    q, k, v, out_grad = case.inputs(dtype)
    spans = case.spans()
    sees = spans.dense().any(1)
    out, dq, _, _ = out_and_grads(q, k, v, spans, backend, out_grad)
    for i in (0, 5, 9, 48, 49, 78, 79, 100, 128, 149, 153):
        hidden = ~sees[:, i, None, :, None]
        other_k, other_v = (torch.where(hidden, 30 * torch.randn(k.shape).to(dtype), x) for x in (k, v))
        other_out, other_dq, _, _ = out_and_grads(q, other_k, other_v, spans, backend, out_grad)
        assert torch.equal(other_out[:, :, i], out[:, :, i]), i
        assert torch.equal(other_dq[:, :, i], dq[:, :, i]), i


@pytest.mark.parametrize("rule", RULES)
def test_a_key_hears_nothing_from_queries_that_do_not_see_it(rule: str, backend: str) -> None:
    case = AttentionCase("long", "", rule, ("T9 I40 t30 i50 t21 p4", "p14 i60 t20 i10 | T20 i20 t10"))
    q, k, v, out_grad = case.inputs(torch.float32)
    spans = case.spans()
    seen_by = spans.dense().any(1)
    grads = out_and_grads(q, k, v, spans, backend, out_grad)
    for j in (0, 5, 9, 48, 79, 100, 149):
        blind = ~seen_by[:, None, :, j, None]
        other_q, other_grad = (torch.where(blind, torch.randn(x.shape), x) for x in (q, out_grad))
        others = out_and_grads(other_q, k, v, spans, backend, other_grad)
        for name, other, grad in zip(("dk", "dv"), others[2:], grads[2:], strict=True):
            assert torch.equal(other[:, :, j], grad[:, :, j]), (name, j)


@settings(max_examples=60)
@given(
    rows=rows(),
    rule=st.sampled_from(RULES),
    window=windows,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_chunks_and_decoding_give_the_rows_of_one_pass(
    rows: list[list[Token]],
    rule: str,
    window: int | None,
    dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
) -> None:
    """Any cuts, through images too, and one token at a time."""
    torch.manual_seed(seed)
    layout = layout_of(rows)
    length = layout.length
    one_by_one = st.just(list(range(length)))
    cuts = data.draw(st.one_of(one_by_one, st.lists(st.integers(0, length), max_size=4)), "cuts")
    q, k, v = random_qkv(len(rows), 4, 2, length, length, 8, dtype)
    whole_spans = layout.spans(rule, window)
    whole = span_attention(q, k, v, whole_spans, backend="native")
    assert_conforms(whole, span_attention(q, k, v, whole_spans, backend="reference"))

    chunks = []
    for start, stop in pairwise([0, *sorted(cuts), length]):
        spans = layout.spans(rule, window, query_start=start, num_queries=stop - start)
        chunk = span_attention(q[:, :, start:stop], k, v, spans, backend="native")
        chunks.append(chunk)
        if (spans.bounds <= stop).all():
            # None of these queries sees a later key, so that the tokens up to here will do, as in a cache.
            so_far = layout_of([row[:stop] for row in rows]).spans(rule, window, query_start=start)
            keys, values = k[:, :, :stop], v[:, :, :stop]
            from_cache = span_attention(q[:, :, start:stop], keys, values, so_far, backend="native")
            assert_conforms(from_cache, chunk)
    assert_conforms(torch.cat(chunks, 2), whole)

"""The values of the op: forward and backward of every implementation against the reference in float64."""

import pytest
import torch
from attention.cases import SMALL_CASES, AttentionCase
from attention.checks import assert_results_close
from attention.random_inputs import random_qkv, random_spans
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close, assert_conforms
from torch import Tensor

from pyvlm.layout import AttentionSpans, TokenLayout
from pyvlm.ops.attention import span_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_shared_cases(case: AttentionCase, dtype: torch.dtype, backend: str) -> None:
    q, k, v, _ = case.inputs(dtype)
    sinks = case.sink_scores(dtype)
    assert_results_close(backend, q, k, v, case.spans(), case.scale, case.softcap, sinks)


@settings(max_examples=60)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 150),
    head_dim=st.sampled_from([8, 16, 40, 64]),
    ranges=st.integers(1, 2),
    separate=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([None, None, 2.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_spans(
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    keys: int,
    head_dim: int,
    ranges: int,
    separate: bool,
    dtype: torch.dtype,
    softcap: float | None,
    sinks: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    q, k, v = random_qkv(batch, kv_heads * group, kv_heads, queries, keys, head_dim, dtype)
    spans = random_spans(batch, queries, keys, ranges, separate)
    scores = torch.randn(kv_heads * group).to(dtype) if sinks else None
    assert_results_close("native", q, k, v, spans, softcap=softcap, sinks=scores)


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(257, 521), (521, 257)], ids=["many keys", "many queries"])
def test_many_tiles(queries: int, keys: int, dtype: torch.dtype, separate: bool, backend: str) -> None:
    q, k, v = random_qkv(1, 2, 1, queries, keys, 32, dtype)
    assert_results_close(backend, q, k, v, random_spans(1, queries, keys, 2, separate))


# The multiples of 8 that models use, and sizes that no vector width and no pair of bf16 divides.
@pytest.mark.parametrize("head_dim", [1, 5, 8, 12, 24, 33, 64, 72, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_head_dims(head_dim: int, dtype: torch.dtype, backend: str) -> None:
    q, k, v = random_qkv(1, 2, 1, 19, 37, head_dim, dtype)
    assert_results_close(backend, q, k, v, random_spans(1, 19, 37, 2, separate=True))


# With 8 query heads and one key head the native backward adds up parts, of several heads each.
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (5, 1), (8, 1)], ids=str)
def test_grouped_heads(heads: int, kv_heads: int, backend: str) -> None:
    q, k, v = random_qkv(2, heads, kv_heads, 11, 13, 16)
    assert_results_close(backend, q, k, v, random_spans(2, 11, 13, 2, separate=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-3, 4.0], ids=["negative", "zero", "tiny", "peaked"])
def test_scales(scale: float, dtype: torch.dtype, backend: str) -> None:
    q, k, v = random_qkv(1, 2, 2, 23, 31, 16, dtype)
    for softcap in (None, 5.0):
        assert_results_close(
            backend, q, k, v, random_spans(1, 23, 31, 2, False), scale=scale, softcap=softcap
        )


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_scores_of_thousands_do_not_overflow(separate: bool, backend: str) -> None:
    q, k, v = random_qkv(1, 2, 2, 23, 31, 16)
    assert_results_close(backend, q * 100, k * 100, v, random_spans(1, 23, 31, 2, separate))


def overlapping(classes: tuple[int, int], separate: bool) -> AttentionSpans:
    """Two ranges over the same text and image keys: equal, nested, crossing, apart, and one or both empty."""
    bounds = [
        [[2, 9], [2, 9]],
        [[0, 11], [3, 5]],
        [[1, 6], [4, 10]],
        [[0, 3], [7, 11]],
        [[4, 4], [0, 9]],
        [[8, 8]] * 2,
    ]
    key_class = torch.tensor([[1, 2, 1, 1, 2, 2, 0, 1, 2, 1, 0]], dtype=torch.uint8)
    return AttentionSpans(torch.tensor([bounds], dtype=torch.int32), key_class, classes, separate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [(6, 6), (2, 4), (6, 4)], ids=["same", "apart", "nested"])
@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_overlapping_ranges(
    separate: bool, classes: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    # Joint: a key in both ranges counts once. Separate: once in each softmax.
    q, k, v = random_qkv(1, 2, 1, 6, 11, 8, dtype)
    assert_results_close(backend, q, k, v, overlapping(classes, separate))


def test_a_key_in_both_ranges_counts_once_where_joint_and_twice_where_separate(backend: str) -> None:
    q, k, v = random_qkv(1, 2, 1, 1, 11, 8)
    key_class = torch.tensor([[1, 2, 1, 1, 2, 2, 0, 1, 2, 1, 0]], dtype=torch.uint8)
    bounds = torch.tensor([[[[2, 9], [2, 9]]]], dtype=torch.int32)
    one_range = AttentionSpans(bounds[:, :, :1], key_class, (6,), separate=False)
    once = span_attention(q, k, v, one_range, backend=backend)
    for separate, times in ((False, 1), (True, 2)):
        twice = AttentionSpans(bounds, key_class, (6, 6), separate)
        assert_conforms(span_attention(q, k, v, twice, backend=backend), times * once)


@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0), (1, 1, 1)],
    ids=["no rows", "no queries", "no keys", "nothing", "one of each"],
)
@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_zero_and_one(
    dtype: torch.dtype, separate: bool, batch: int, queries: int, keys: int, backend: str
) -> None:
    q, k, v = random_qkv(batch, 2, 1, queries, keys, 8, dtype)
    assert_results_close(backend, q, k, v, random_spans(batch, queries, keys, 2, separate))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_that_sees_nothing_is_zero(dtype: torch.dtype, backend: str) -> None:
    kind = torch.tensor([[0, 0, 1, 2, 2], [2, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.uint8)
    spans = TokenLayout(kind).spans("mmca")
    q, k, v = (x.requires_grad_() for x in random_qkv(3, 2, 1, 5, 5, 16, dtype))
    out, lse = span_attention(q, k, v, spans, return_lse=True, backend=backend)
    padding = kind == 0
    empty = ~spans.dense().any(-1)
    assert (out.transpose(1, 2)[padding] == 0).all()
    assert torch.equal(lse.isneginf(), empty[:, None].expand_as(lse))
    assert not lse.isnan().any()
    out.sum().backward()
    assert (q.grad.transpose(1, 2)[padding] == 0).all()
    assert (k.grad.transpose(1, 2)[padding] == 0).all()
    assert (v.grad.transpose(1, 2)[padding] == 0).all()
    assert v.grad[:2].any()


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_gradcheck(separate: bool, backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 4, 2, 5, 7, 4, torch.float64))
    spans = random_spans(2, 5, 7, 2, separate)

    def out_and_finite_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = span_attention(q, k, v, spans, scale=0.7, softcap=3.0, return_lse=True, backend=backend)
        return out, lse.masked_fill(lse.isneginf(), 0)

    assert torch.autograd.gradcheck(out_and_finite_lse, (q, k, v))


@pytest.mark.parametrize("needed", ["q", "k", "v", "kv"])
def test_gradients_of_some_inputs_only(needed: str, backend: str) -> None:
    q, k, v = random_qkv(1, 2, 1, 6, 11, 8)
    spans = overlapping((6, 4), True)
    inputs = {"q": q, "k": k, "v": v}
    everything = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    some = {name: x.clone().requires_grad_(name in needed) for name, x in inputs.items()}
    for leaves in (everything, some):
        span_attention(**leaves, spans=spans, backend=backend).square().sum().backward()
    for name in inputs:
        if name in needed:
            assert torch.equal(some[name].grad, everything[name].grad)
        else:
            assert some[name].grad is None


@pytest.mark.parametrize("which", ["out", "lse"])
def test_gradient_through_one_output_only(which: str, backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 1, 6, 11, 8))
    spans = overlapping((6, 4), True)

    def grads(q: Tensor, k: Tensor, v: Tensor, implementation: str) -> tuple[Tensor, ...]:
        out, lse = span_attention(q, k, v, spans, return_lse=True, backend=implementation)
        loss = out.square().sum() if which == "out" else lse[lse.isfinite()].square().sum()
        return torch.autograd.grad(loss, (q, k, v), allow_unused=True)

    expected = grads(q.double(), k.double(), v.double(), "reference")
    plain = grads(q, k, v, "reference")
    for name, actual, e, p in zip("qkv", grads(q, k, v, backend), expected, plain, strict=True):
        if which == "lse" and name == "v":
            assert actual is None or not actual.any()
        else:
            assert_close(actual, e, p, f"d{name}", terms=1.0)

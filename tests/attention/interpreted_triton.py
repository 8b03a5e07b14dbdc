"""The Triton kernels of span attention on CPU tensors. test_span_attention_triton.py runs this file in a
process of its own, since Triton settles at its import whether it interprets. By hand:

    TRITON_INTERPRET=1 pytest tests/attention/interpreted_triton.py

The interpreter is slow, so the tiles are small: short rows still have several, and chunks of tiles.
"""

from dataclasses import replace

import conformance
import pytest
import torch
from attention.cases import LARGE_CASES, SMALL_CASES, AttentionCase
from attention.checks import assert_results_close
from attention.plain import plain_attention
from attention.random_inputs import random_qkv, random_spans
from attention.test_layout_conformance import RULES as TRANSFORMERS_RULES
from attention.test_layout_conformance import (
    assert_outputs_conform,
    test_mmca_released,
    transformers_spans,
)
from attention.test_span_attention import (
    overlapping,
    test_a_key_in_both_ranges_counts_once_where_joint_and_twice_where_separate,
    test_gradient_through_one_output_only,
)
from attention.test_span_attention_invariants import LAYOUTS, assert_all_equal, out_and_grads
from conformance import Case
from pyvlm.triton_kernels import attention as triton_attention
from pyvlm.triton_kernels.attention import Config, ForwardTiles, Tiles
from pyvlm.triton_kernels.common import INTERPRETED
from tolerance import assert_close
from torch import Tensor

from pyvlm.layout import AttentionSpans, TokenLayout
from pyvlm.ops._backends import resolve
from pyvlm.ops.attention import span_attention
from pyvlm.reference.attention import span_attention as reference

# Imported, and collected here too, for the backend of this file.
__all__ = [
    "test_a_key_in_both_ranges_counts_once_where_joint_and_twice_where_separate",
    "test_gradient_through_one_output_only",
    "test_mmca_released",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = Tiles(16, 16, 4, 1)
DEFERRED = ForwardTiles(16, 16, 4, 1, deferred=True)
CONFIG = Config(DEFERRED, SMALL, SMALL, decode_keys=16, decode_rows=0, splits=4, descriptors=True, chunk=2)
POINTERS = replace(CONFIG, forward=replace(DEFERRED, deferred=False), descriptors=False, chunk=4)
DECODE = replace(POINTERS, decode_rows=64)


@pytest.fixture(autouse=True)
def config(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CONFIG)


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(triton_attention, "default_config", lambda *arguments: config)


@pytest.fixture
def backend() -> str:
    return "triton"


def test_the_kernels_are_interpreted() -> None:
    assert INTERPRETED.value
    assert resolve("span_attention", "triton", torch.device("cpu")) == "triton"


def test_auto_stays_native() -> None:
    assert resolve("span_attention", "auto", torch.device("cpu")) == "native"


# Runs 64 times shorter: of images of nine tokens.
SHARED_CASES = [*SMALL_CASES, *(case.reduced(64) for case in LARGE_CASES)]


def dtypes_and_configs() -> list[object]:
    """Each case in one dtype, by tensor descriptors or by pointers: neighbours differ in both."""
    parameters = []
    for i, case in enumerate(SHARED_CASES):
        dtype, config = DTYPES[i % 3], (CONFIG, POINTERS)[i // 3 % 2]
        if case.length > 200:
            forward = replace(config.forward, queries=64, keys=32)
            config = replace(config, forward=forward, grad_q=Tiles(64, 32, 4, 1), grad_kv=Tiles(32, 64, 4, 1))
        parameters.append(pytest.param(case, dtype, config, id=f"{case.name}-{dtype}"))
    return parameters


@pytest.mark.parametrize(("case", "dtype", "config"), dtypes_and_configs())
def test_shared_cases(
    case: AttentionCase, dtype: torch.dtype, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, config)
    q, k, v, _ = case.inputs(dtype)
    sinks = case.sink_scores(dtype)
    assert_results_close("triton", q, k, v, case.spans(), case.scale, case.softcap, sinks)


@pytest.mark.parametrize(
    ("ranges", "separate"), [(1, False), (2, False), (2, True)], ids=["one", "joint", "separate"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_spans(
    dtype: torch.dtype, ranges: int, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, POINTERS if dtype == torch.bfloat16 else CONFIG)
    q, k, v = random_qkv(1, 2, 1, 37, 55, 24, dtype)
    spans = random_spans(1, 37, 55, ranges, separate)
    softcap = 2.0 if dtype == torch.float16 else None
    sinks = torch.randn(2).to(dtype) if dtype == torch.bfloat16 else None
    assert_results_close("triton", q, k, v, spans, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_overlapping_ranges(separate: bool) -> None:
    q, k, v = random_qkv(1, 2, 1, 6, 11, 8, torch.bfloat16)
    assert_results_close("triton", q, k, v, overlapping((6, 4), separate))


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_full_tiles_with_idle_queries_among_them(separate: bool) -> None:
    # All queries see the first 70 keys, but some see nothing at all: their rows of a full tile are dropped.
    bounds = torch.tensor([[0, 70], [10, 64]], dtype=torch.int32).repeat(1, 40, 1, 1)
    bounds[:, [3, 17, 18, 39]] = 5
    if separate:
        bounds[:, 20:30, 1] = 0
    spans = AttentionSpans(bounds, torch.full((1, 80), 1, dtype=torch.uint8), (2, 2), separate)
    q, k, v = random_qkv(1, 2, 2, 40, 80, 16)
    for sinks in (None, torch.randn(2)):
        assert_results_close("triton", q, k, v, spans, sinks=sinks)


@pytest.mark.parametrize(
    ("ranges", "separate"), [(1, False), (2, False), (2, True)], ids=["one", "joint", "separate"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_keys(dtype: torch.dtype, ranges: int, separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, DECODE)
    splits = []
    launch = triton_attention.launch
    monkeypatch.setattr(
        triton_attention, "launch", lambda *call: (splits.append(call[-1]["splits"]), launch(*call))
    )
    q, k, v = random_qkv(2, 6, 2, 3, 131, 40, dtype)
    spans = random_spans(2, 3, 131, ranges, separate)
    spans.bounds[0, 0] = torch.tensor([0, 131])
    spans.bounds[1, -1] = 7  # nothing
    sinks = torch.randn(6).to(dtype) if ranges == 1 else None
    actual = span_attention(q, k, v, spans, sinks=sinks, return_lse=True, backend="triton")
    assert splits == [3, 3]  # 9 tiles of keys on at most 4 programs a sample and head, 3 each
    wide = None if sinks is None else sinks.double()
    expected = reference(q.double(), k.double(), v.double(), spans, None, None, wide)
    plain = plain_attention(q, k, v, spans, None, None, sinks)
    for name, *values in zip(("out", "lse"), actual, expected, plain, strict=True):
        assert_close(*values, name)


def few_queries() -> list[object]:
    """The cases that the kernel for few queries takes, each in one dtype."""
    parameters = []
    for i, case in enumerate(SHARED_CASES):
        spans = case.spans()
        streams = spans.bounds.shape[2] if spans.separate else 1
        if streams * case.heads // case.kv_heads * spans.bounds.shape[1] <= DECODE.decode_rows:
            parameters.append(pytest.param(case, DTYPES[i % 3], id=f"{case.name}-{DTYPES[i % 3]}"))
    assert len(parameters) > 30
    return parameters


@pytest.mark.parametrize(("case", "dtype"), few_queries())
def test_shared_cases_by_split_keys(
    case: AttentionCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, DECODE)
    monkeypatch.setattr(triton_attention, "forward_kernel", None)  # that for many, which would fail
    q, k, v, _ = case.inputs(dtype)
    sinks = case.sink_scores(dtype)
    assert_results_close("triton", q, k, v, case.spans(), case.scale, case.softcap, sinks)


@pytest.mark.parametrize("head_dim", [1, 5, 8, 72, 80, 128, 192])
def test_head_dims(head_dim: int) -> None:
    q, k, v = random_qkv(1, 2, 1, 17, 19, head_dim, torch.bfloat16)
    assert_results_close("triton", q, k, v, random_spans(1, 17, 19, 2, separate=True))


@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0), (1, 1, 1)],
    ids=["no rows", "no queries", "no keys", "nothing", "one of each"],
)
@pytest.mark.parametrize("config", [CONFIG, DECODE], ids=["tiles", "split keys"])
def test_sizes_of_zero_and_one(
    batch: int, queries: int, keys: int, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, config)
    q, k, v = random_qkv(batch, 2, 1, queries, keys, 8)
    assert_results_close("triton", q, k, v, random_spans(batch, queries, keys), sinks=torch.randn(2))


@pytest.mark.parametrize("config", [CONFIG, DECODE], ids=["tiles", "split keys"])
def test_a_query_that_sees_nothing_is_zero(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, config)
    kind = torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]], dtype=torch.uint8)
    spans = TokenLayout(kind).spans("mmca")
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 2, 1, 5, 5, 16, torch.bfloat16))
    out, lse = span_attention(q, k, v, spans, return_lse=True, backend="triton")
    empty = ~spans.dense().any(-1)
    assert torch.equal(lse.isneginf(), empty[:, None].expand_as(lse))
    assert (out.transpose(1, 2)[kind == 0] == 0).all()
    out.sum().backward()
    for x in (q, k, v):
        assert (x.grad.transpose(1, 2)[kind == 0] == 0).all()
    assert v.grad[0].any()


def test_an_lse_of_minus_infinity_has_no_gradient_whatever_its_cotangent_is() -> None:
    spans = TokenLayout(torch.tensor([[1, 0, 2, 1, 0]], dtype=torch.uint8)).spans("mmca")
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 1, 1, 5, 5, 8))
    lse = span_attention(q, k, v, spans, return_lse=True, backend="triton")[1]
    empty = lse.detach().isneginf()
    assert empty.any()

    def grads(cotangent: float) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            lse, (q, k), torch.where(empty, cotangent, torch.ones(())), retain_graph=True
        )

    for cotangent in (9.0, torch.inf, torch.nan):
        assert all(map(torch.equal, grads(cotangent), grads(0.0)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_strides(name: str) -> None:
    q, k, v = random_qkv(2, 2, 2, 9, 19, 16, torch.bfloat16)
    spans = random_spans(2, 9, 19)
    out_grad = torch.randn(q.shape).to(q.dtype)
    strided = [LAYOUTS[name](x) for x in (q, k, v, out_grad)]
    assert not any(x.is_contiguous() for x in strided)
    actual = out_and_grads(*strided[:3], spans, "triton", strided[3])
    assert_all_equal(actual, out_and_grads(q, k, v, spans, "triton", out_grad))
    like = torch.empty_like(strided[0])
    assert actual[0].stride() == actual[1].stride() == like.stride()


def test_expanded_inputs() -> None:
    q, k, v = random_qkv(1, 2, 2, 5, 7, 16)
    spans = random_spans(2, 5, 7)
    expanded = [x.expand(2, -1, -1, -1) for x in (q, k, v)]
    actual = out_and_grads(*expanded, spans, "triton", torch.ones(()).expand(2, 2, 5, 16))
    assert_all_equal(actual, out_and_grads(*(x.contiguous() for x in expanded), spans, "triton"))


@pytest.mark.parametrize(
    "other",
    [replace(CONFIG, descriptors=False), replace(CONFIG, forward=replace(DEFERRED, deferred=False))],
    ids=["pointers", "not deferred"],
)
def test_the_same_bits_in_every_run_and_in_another_way(
    other: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = random_qkv(1, 2, 1, 20, 37, 16, torch.bfloat16)
    spans = random_spans(1, 20, 37)
    first, again = (out_and_grads(q, k, v, spans, "triton") for _ in range(2))
    assert_all_equal(again, first)
    use(monkeypatch, other)
    assert_all_equal(out_and_grads(q, k, v, spans, "triton"), first)


@pytest.mark.parametrize("rule", ["mmca", "bidirectional_image"])
def test_a_row_depends_on_nothing_that_it_does_not_see(rule: str) -> None:
    case = AttentionCase("long", "", rule, ("t9 i11 t4 i6 t2 p1",))
    q, k, v, out_grad = case.inputs(torch.bfloat16)
    spans = case.spans()
    sees = spans.dense().any(1)
    out, dq, _, _ = out_and_grads(q, k, v, spans, "triton", out_grad)
    for i in (8, 14, 20, 30):
        hidden = ~sees[:, i, None, :, None]
        other_k, other_v = (torch.where(hidden, 30 * torch.randn(k.shape).to(k.dtype), x) for x in (k, v))
        other_out, other_dq, _, _ = out_and_grads(q, other_k, other_v, spans, "triton", out_grad)
        assert torch.equal(other_out[:, :, i], out[:, :, i]), i
        assert torch.equal(other_dq[:, :, i], dq[:, :, i]), i


@pytest.mark.parametrize(
    "case",
    conformance.cases(
        "attention/transformers_masks", lambda settings: settings["kind"] in TRANSFORMERS_RULES
    )[::4],
)
def test_transformers_masks(case: Case) -> None:
    for suffix, _, all_queries_see in transformers_spans(case):
        assert_outputs_conform(case, all_queries_see, "triton", suffix, case[f"valid_rows{suffix}"])


def test_ranges_beyond_the_keys_read_nothing_there() -> None:
    # On a GPU nobody checks the bounds: that would stall it. The keys lie within a larger tensor of NaN.
    spans = random_spans(1, 20, 21)
    q, k, v = random_qkv(1, 1, 1, 20, 21, 16)
    within = torch.stack([spans.bounds[..., 0], torch.full_like(spans.bounds[..., 1], 21)], -1)
    spans.bounds.copy_(within)
    expected = span_attention(q, k, v, spans, backend="triton")
    spans.bounds[..., 1] = 1 << 30
    spans.bounds[..., 0][within[..., 0] == 0] = -5
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 30), value=torch.nan)[:, :, :21] for x in (k, v))
    assert torch.equal(span_attention(q, k, v, spans, backend="triton"), expected)


@pytest.mark.parametrize("config", [CONFIG, DECODE], ids=["tiles", "split keys"])
def test_a_range_that_ends_before_it_begins_is_empty(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nor does anybody check that on a GPU.
    use(monkeypatch, config)
    spans = random_spans(1, 20, 37)
    q, k, v = random_qkv(1, 1, 1, 20, 37, 16)
    spans.bounds[:, ::3] = 0
    expected = out_and_grads(q, k, v, spans, "triton")
    for reversed_range in ([30, 4], [5, -(2**31)], [2**31 - 1, -5]):
        spans.bounds[:, ::3] = torch.tensor(reversed_range, dtype=torch.int32)
        assert_all_equal(out_and_grads(q, k, v, spans, "triton"), expected)


def test_what_the_kernels_do_not_take() -> None:
    spans = random_spans(1, 3, 5)
    with pytest.raises(TypeError, match=r'torch.float64: use backend="reference"'):
        span_attention(*random_qkv(1, 1, 1, 3, 5, 8, torch.float64), spans, backend="triton")
    with pytest.raises(ValueError, match=r'up to 256; q has 264: use backend="reference"'):
        span_attention(*random_qkv(1, 1, 1, 3, 5, 264), spans, backend="triton")


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 1, 1, 3, 5, 8))
    out = span_attention(q, k, v, random_spans(1, 3, 5), backend="triton")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.square().sum().backward()


def gradients_of_sinks(sinks: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: AttentionSpans) -> Tensor:
    out = span_attention(q, k, v, spans, sinks=sinks, backend="triton")
    return torch.autograd.grad(out.square().sum(), sinks)[0]


def test_sinks_of_another_dtype() -> None:
    q, k, v = random_qkv(1, 2, 1, 5, 7, 8, torch.bfloat16)
    spans = random_spans(1, 5, 7)
    wide = torch.randn(2).bfloat16().float().requires_grad_()
    narrow = wide.detach().bfloat16().requires_grad_()
    gradient = gradients_of_sinks(wide, q, k, v, spans)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient.bfloat16(), gradients_of_sinks(narrow, q, k, v, spans))

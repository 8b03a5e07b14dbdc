"""Tensors of more than 2³¹ elements, in Triton's interpreter: offsets of 32 bits wrap around as on a GPU, and
what then lies outside of the tensors is refused. test_long_tensors.py runs this file in a process of its own,
since Triton settles at its import whether it interprets. By hand:

    TRITON_INTERPRET=1 pytest tests/interpreted_long_tensors.py

The tensors take memory only where something is written: the operating system gives zeros for the rest. Of
launches of many programs those at the ends of the grid run. Results are those of the last rows alone, bit
for bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from memory_checks import also_given, forget, programs_at_the_ends
from pyvlm.triton_kernels import attention, loss, moe, norm
from pyvlm.triton_kernels.attention import Config, ForwardTiles, Tiles
from pyvlm.triton_kernels.common import INTERPRETED
from tolerance import assert_close
from torch import Tensor

from pyvlm.layout import TokenLayout
from pyvlm.ops import (
    add_at_image_tokens,
    expert_mlp,
    gated_activation,
    local_cross_attention,
    merge_levels,
    pack_image_tokens,
    place_image_tokens,
    rms_norm,
    span_attention,
    token_choice,
)
from pyvlm.spans import AttentionSpans

PAST_32_BITS = 2**31 + 2**20


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with programs_at_the_ends(64):
        yield
    forget()


def long(*rest: int, last: int = 4) -> Tensor:
    """[.., *rest] of more than 2³¹ bfloat16s, all but the last few rows 0."""
    rows = -(-PAST_32_BITS // torch.Size(rest).numel())
    x = torch.empty(rows, *rest, dtype=torch.bfloat16)
    x[-last:].normal_()
    return x


def results(run: Callable[..., Tensor], cotangent: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The output and the gradients."""
    given = [leaf.detach().requires_grad_() for leaf in leaves]
    out = run(*given)
    return [out.detach(), *torch.autograd.grad(out, given, cotangent)]


def assert_ends_equal(actual: list[Tensor], expected: list[Tensor], rows: int = 1) -> None:
    for i, (long_one, short_one) in enumerate(zip(actual, expected, strict=True)):
        assert long_one[-rows:].equal(short_one[-rows:]), f"result {i}"
        assert short_one[-rows:].count_nonzero() > 0, f"result {i}"


def test_the_kernels_are_interpreted() -> None:
    assert INTERPRETED.value


def spans_of(tokens: int, batch: int = 1, query_start: int = 0) -> AttentionSpans:
    kind = torch.ones(batch, tokens, dtype=torch.uint8)
    kind[:, 2:14] = 2
    return TokenLayout(kind).spans("mmca", query_start=query_start)


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def descriptors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether attention reads by descriptors, not by pointers."""
    tiles = Tiles(16, 16, 4, 1)
    forward = ForwardTiles(16, 16, 4, 1, deferred=request.param)
    config = Config(forward, tiles, tiles, decode_rows=0, descriptors=request.param)
    monkeypatch.setattr(attention, "default_config", lambda *_: config)
    return request.param


@pytest.mark.usefixtures("descriptors")
def test_heads_of_attention() -> None:
    spans = spans_of(32)
    q, k, v, cotangent = (long(32, 16)[None] for _ in range(4))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return span_attention(q, k, v, spans, backend="triton")

    actual = results(run, cotangent, q, k, v)
    expected = results(run, *(x[:, -2:].clone() for x in (cotangent, q, k, v)))
    assert_ends_equal([x[0] for x in actual], [x[0] for x in expected])


def far(x: Tensor, dim: int, step: int) -> Tensor:
    """x, its places along a dimension an odd number of steps apart, the last one beyond 2³¹ elements."""
    stride = (PAST_32_BITS // (x.shape[dim] - 1) // step + 1 | 1) * step
    strides = list(torch.empty_like(x, device="meta", memory_format=torch.contiguous_format).stride())
    strides[dim] = stride
    memory = torch.empty(stride * x.shape[dim], dtype=x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "heads", "tokens"])
def test_strides_of_attention(dim: int, descriptors: bool) -> None:
    step = 8 if descriptors else 1  # they want multiples of 16 bytes; the other strides are multiples
    batch = 2 if dim == 0 else 1
    spans = spans_of(20, batch)
    q, k, v, cotangent = (torch.randn(batch, 2, 20, 16).bfloat16() for _ in range(4))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return span_attention(q, k, v, spans, backend="triton")

    actual = results(run, *(far(x, dim, step) for x in (cotangent, q, k, v)))
    for one, other in zip(actual, results(run, cotangent, q, k, v), strict=True):
        assert one.equal(other)


def test_keys_of_a_decoded_token() -> None:
    spans = spans_of(64, query_start=63)
    k, v = long(64, 16)[None], long(64, 16)[None]
    q = torch.randn(1, k.shape[1], 1, 16).bfloat16()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return span_attention(q, k, v, spans, backend="triton")

    expected = run(*(x[:, -1:].clone() for x in (q, k, v)))
    assert_ends_equal([run(q, k, v)[0]], [expected[0]])


@pytest.mark.parametrize("op", [place_image_tokens, add_at_image_tokens])
@pytest.mark.parametrize("last_is_image", [False, True], ids=["text", "image"])
def test_rows_of_text(op: Callable[..., Tensor], last_is_image: bool) -> None:
    text, cotangent = long(1024)[None], long(1024)[None]
    features = torch.randn(4, 1024).bfloat16()
    mask = torch.zeros(text.shape[:2], dtype=torch.bool)
    mask[0, [1, 3, -3, -1 if last_is_image else -2]] = True

    def results_of(rows: int, features: Tensor) -> list[Tensor]:
        return results(
            lambda text, features: op(text, features, mask[:, -rows:], backend="triton"),
            cotangent[:, -rows:].contiguous(),
            text[:, -rows:].contiguous(),
            features,
        )

    actual, expected = results_of(text.shape[1], features), results_of(4, features[2:])
    assert_ends_equal([actual[0][0], actual[1][0]], [expected[0][0], expected[1][0]], rows=4)
    assert_ends_equal([actual[2]], [expected[2]], rows=2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_image_rows(dtype: torch.dtype) -> None:
    features, cotangent = long(1024), torch.randn(4, 1024).bfloat16()

    def results_of(rows: int) -> list[Tensor]:
        index = torch.tensor([rows - 2, rows - 1, rows - 4, rows - 1], dtype=dtype)
        return results(
            lambda features: pack_image_tokens(features, index, backend="triton"), cotangent, features[-rows:]
        )

    assert_ends_equal(results_of(len(features)), results_of(4), rows=4)


def test_rows_of_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "RESIDENT_WARPS", 2**20)  # so that the last ones have the last rows
    x, cotangent = long(32768), long(32768)
    weight = torch.randn(32768).bfloat16()

    def run(x: Tensor) -> Tensor:
        return rms_norm(x, weight, backend="triton")

    expected = results(run, cotangent[-4:].clone(), x[-4:].clone())
    assert_ends_equal(results(run, cotangent, x), expected)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_rows_of_gates(gated: bool) -> None:
    def run(gate: Tensor, up: Tensor | None = None) -> Tensor:
        return gated_activation(gate, up, "gelu_tanh", backend="triton")

    cotangent, *leaves = (long(1024) for _ in range(3 if gated else 2))
    expected = results(run, *(x[-4:].clone() for x in (cotangent, *leaves)))
    assert_ends_equal(results(run, cotangent, *leaves), expected)


def test_rows_of_a_joint_projection() -> None:
    joint = long(2048)

    def run(joint: Tensor) -> Tensor:
        with torch.no_grad():
            return gated_activation(*joint.chunk(2, -1), backend="triton")

    assert_ends_equal([run(joint)], [run(joint[-4:].clone())])


def test_rows_of_levels() -> None:
    maps = [long(64, 1024) for _ in range(2)]
    alpha, weight = torch.randn(2).bfloat16(), torch.randn(1, 1024).bfloat16()

    def run(maps: list[Tensor]) -> Tensor:
        also_given(*maps)
        with torch.no_grad():
            return merge_levels(maps, alpha, weight, backend="triton")

    expected = run([level[-1:].clone() for level in maps])
    assert_ends_equal([run(maps)[-1]], [expected[-1]])


OPTIONS_OF_LOSS = (-100, None, 0.0, 0.0, 0.0, True)  # none but the mean


def loss_gradients(
    given: tuple[Tensor, Tensor, Tensor], lse: Tensor, needs: tuple[bool, bool], block: int = 512
) -> tuple[Tensor, Tensor]:
    """Of hidden and weight, with some labels and with so many words at once."""
    config = replace(loss.default_config(torch.bfloat16, None), block=block, room=16 * block)
    grads = loss.linear_cross_entropy_backward(
        torch.tensor(1.0), *given, *OPTIONS_OF_LOSS, lse, (*needs, False), config
    )
    return grads[:2]


def test_words_of_the_loss() -> None:
    hidden, weight = torch.randn(5, 16384).bfloat16() / 128, long(16384)
    last = torch.tensor([3, -100, 2, -100, 3])
    labels = torch.where(last < 0, last, last + len(weight) - 4)
    lse = torch.full((5,), 2.0)
    _, grad_weight = loss_gradients((hidden, weight, labels), lse, (False, True), block=2**18)
    _, expected = loss_gradients((hidden, weight[-4:].clone(), last), lse, (False, True))
    assert_ends_equal([grad_weight[:, -64:]], [expected[:, -64:]], rows=4)


def test_rows_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = long(16384), torch.randn(60, 16384).bfloat16() / 128
    zeros = torch.zeros

    def zeros_or_untouched(size: int | torch.Size, **options: Any) -> Tensor:
        """The gradient of rows without a label stays untouched: it is new memory, which is 0."""
        return (torch.empty if size == hidden.shape else zeros)(size, **options)

    monkeypatch.setattr(torch, "zeros", zeros_or_untouched)
    labels = torch.full((len(hidden),), -100)
    labels[-3:] = torch.tensor([3, 59, 7])

    def results_of(rows: int) -> list[Tensor]:
        given = (hidden[-rows:], weight, labels[-rows:])
        out, lse = loss.linear_cross_entropy(*given, *OPTIONS_OF_LOSS)
        grad_hidden, grad_weight = loss_gradients(given, lse, (True, True))
        return [out[None], lse, grad_hidden[:, :64], grad_weight[:, :64]]

    assert_ends_equal(results_of(len(hidden)), results_of(4))


def test_partial_sums_of_the_loss() -> None:
    """One a row and half tile of words: those of tiles that are left out, all but the last four, stay 0."""
    config = replace(loss.default_config(torch.float32, None), group=1)  # the last rows go last
    words, tiles_run = config.statistics.columns, 4
    weight = torch.randn(512 * words, 4)
    hidden = torch.empty(PAST_32_BITS // (2 * 512), 4)
    hidden[-4:].normal_()
    labels = torch.full((len(hidden),), len(weight) - 1)
    _, lse = loss.linear_cross_entropy(hidden, weight, labels, *OPTIONS_OF_LOSS, config)
    plain, expected = (
        (hidden[-4:].to(dtype) @ weight[-tiles_run * words :].to(dtype).T).logsumexp(1)
        for dtype in (torch.float32, torch.float64)
    )
    assert_close(lse[-4:], expected, plain)


@pytest.mark.parametrize("by_descriptors", [False, True], ids=["pointers", "descriptors"])
def test_weights_of_experts(by_descriptors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(moe.default_config(torch.bfloat16, None, False), descriptors=by_descriptors)
    monkeypatch.setattr(moe, "default_config", lambda *_: config)
    gate_up = long(512, 256, last=1)
    experts = len(gate_up)
    down = long(256, 256, last=1)[-experts:]
    x, cotangent = torch.randn(2, 256).bfloat16() / 16, torch.randn(2, 256).bfloat16()

    def results_of(experts: int) -> list[Tensor]:
        logits = torch.zeros(2, experts)
        logits[:, -1] = 5.0
        routing = token_choice(logits, 1)

        def run(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            return expert_mlp(x, routing, gate_up, down, backend="triton")

        leaves = (gate_up[-experts:], down[-experts:])
        y, grad_x, grad_gate_up, grad_down = results(run, cotangent, x, *leaves)
        return [y, grad_x, grad_gate_up[:, -64:, -64:], grad_down[:, -64:, -64:]]

    assert_ends_equal(results_of(experts), results_of(1))


def test_rows_of_experts() -> None:
    x, cotangent = long(4096), long(4096)
    gate_up, down = torch.randn(2, 32, 4096).bfloat16() / 64, torch.randn(2, 4096, 16).bfloat16() / 4

    def results_of(rows: int) -> list[Tensor]:
        routing = token_choice(torch.tensor([0.0, 1.0]).expand(rows, 2).contiguous(), 1)

        def run(x: Tensor) -> Tensor:
            return expert_mlp(x, routing, gate_up, down, backend="triton")

        return [y[:, -64:] for y in results(run, cotangent[-rows:], x[-rows:])]

    assert_ends_equal(results_of(len(x)), results_of(4))


def test_maps_of_windows() -> None:
    key, value = long(2, 16, 64), long(2, 16, 64)
    query, cotangent = (torch.empty(len(key), 2, 4, 64, dtype=torch.bfloat16) for _ in range(2))
    query[-1].normal_()
    cotangent[-1].normal_()

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return local_cross_attention(query, [key], [value], (2, 2), backend="triton")

    given = (cotangent, query, key, value)
    actual, expected = results(run, *given), results(run, *(x[-1:].clone() for x in given))
    assert_ends_equal([x[..., -1:, :] for x in actual], [x[..., -1:, :] for x in expected])

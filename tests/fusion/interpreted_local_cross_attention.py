"""The Triton kernels of `local_cross_attention` on CPU tensors. test_local_cross_attention_triton.py runs
this file in a process of its own, since Triton settles at its import whether it interprets. By hand:

    TRITON_INTERPRET=1 pytest tests/fusion/interpreted_local_cross_attention.py

The interpreter is slow, so the problems are small.
"""

from dataclasses import replace

import pytest
import torch
from fusion.cross_attention_cases import LARGE_CASES, SMALL_CASES, LocalCase
from pyvlm.triton_kernels import cross_attention
from pyvlm.triton_kernels.common import INTERPRETED
from pyvlm.triton_kernels.cross_attention import TILES, Tiles
from tolerance import assert_close, assert_conforms
from torch import Tensor

from pyvlm.ops import local_cross_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASE = LocalCase("small", "two maps, no power of two", 2, 2, 6, (2, 3), (1, 2))
MASKED = replace(CASE, grid=(4, 2), images=3, masked=True)

Results = tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]


def results(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    case: LocalCase,
    grad_out: Tensor,
    scale: float = 0.4,
    tiles: Tiles = TILES,
) -> Results:
    """out, lse and all gradients of the kernels."""
    arguments = (query, keys, values, *case.grid, case.masks() or [], scale)
    out, lse = cross_attention.local_cross_attention(*arguments, tiles)
    return out, lse, *cross_attention.local_cross_attention_backward(grad_out, *arguments, out, lse, tiles)


def flat(found: Results) -> list[Tensor]:
    out, lse, grad_query, grad_keys, grad_values = found
    return [out, lse, grad_query, *grad_keys, *grad_values]


def by_reference(
    query: Tensor, keys: list[Tensor], values: list[Tensor], case: LocalCase, grad_out: Tensor, scale: float
) -> list[Tensor]:
    """out and all gradients by the definition."""
    leaves = [x.detach().clone().requires_grad_() for x in (query, *keys, *values)]
    maps = len(case.sides)
    out = local_cross_attention(
        *(leaves[0], leaves[1 : 1 + maps], leaves[1 + maps :], case.grid, case.masks(), scale, "reference")
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def assert_right(case: LocalCase, dtype: torch.dtype, scale: float = 0.4, tiles: Tiles = TILES) -> None:
    query, keys, values = case.inputs(dtype)
    grad_out = torch.randn(query.shape).to(dtype)
    out, lse, *grads = flat(results(query, keys, values, case, grad_out, scale, tiles))
    assert lse.dtype == torch.float32
    plain = by_reference(query, keys, values, case, grad_out, scale)
    doubles = (query.double(), [k.double() for k in keys], [v.double() for v in values])
    expected = by_reference(*doubles, case, grad_out.double(), scale)
    for i, tensor in enumerate((out, *grads)):
        assert tensor.dtype == dtype
        assert_close(tensor, expected[i], plain[i], f"result {i}")


def test_the_kernels_are_interpreted() -> None:
    assert INTERPRETED.value


def test_the_public_op_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, launch = [], cross_attention.launch
    monkeypatch.setattr(
        cross_attention,
        "launch",
        lambda kernel, *args: (launched.append(kernel.__name__), launch(kernel, *args)),
    )
    query, keys, values = MASKED.inputs(torch.float32)
    leaves = [x.requires_grad_() for x in (query, *keys, *values)]

    def by(backend: str) -> list[Tensor]:
        out = local_cross_attention(query, keys, values, MASKED.grid, MASKED.masks(), backend=backend)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    actual = by("triton")
    assert launched == ["forward_kernel", "backward_kernel"]
    for a, b in zip(actual, by("reference"), strict=True):
        assert_conforms(a, b, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASE, MASKED], ids=["", "masked"])
def test_every_dtype(case: LocalCase, dtype: torch.dtype) -> None:
    assert_right(case, dtype)


SIZES = [*SMALL_CASES, *(case.reduced() for case in LARGE_CASES)]


@pytest.mark.parametrize(
    "case", [case for case in SIZES if case.name != "one-key"], ids=lambda case: case.name
)
def test_sizes(case: LocalCase) -> None:
    assert_right(replace(case, images=min(case.images, 2), heads=min(case.heads, 2)), torch.float32)


def test_one_key_is_its_value() -> None:
    case = replace(CASE, sides=(1,))
    query, keys, values = case.inputs(torch.float32)
    grad_out = torch.randn(query.shape)
    out, _, grad_query, (grad_key,), (grad_value,) = results(query, keys, values, case, grad_out)
    for actual, expected in ((out, values[0]), (grad_value, grad_out)):
        assert_conforms(actual, expected)
    for gradient in (grad_query, grad_key):
        assert_conforms(gradient, torch.zeros_like(gradient), gradient=True)


@pytest.mark.parametrize("elements", [16, 32])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_windows_of_several_tiles(elements: int, masked: bool) -> None:
    assert_right(
        replace(CASE, grid=(2, 1), sides=(3, 1, 4), masked=masked),
        torch.float32,
        tiles=Tiles(elements=elements),
    )


@pytest.mark.parametrize("scale", [0.0, -0.7, 30.0])
def test_any_scale(scale: float) -> None:
    assert_right(CASE, torch.float32, scale)


def test_a_query_that_sees_nothing() -> None:
    query, keys, values = MASKED.inputs(torch.float32)
    out, lse, grad_query, grad_keys, grad_values = results(
        query, keys, values, MASKED, torch.randn(query.shape)
    )
    blind = lse.isneginf()
    assert 0 < blind.sum() < blind.numel()
    assert (out[blind] == 0).all()
    assert (grad_query[blind] == 0).all()
    for grads in (grad_keys, grad_values):
        for grad, mask in zip(grads, MASKED.masks(), strict=True):
            hidden = ~mask[:, None].expand(grad.shape[:3])
            assert (grad[hidden] == 0).all()


def test_hidden_keys_and_values_are_not_read() -> None:
    query, keys, values = MASKED.inputs(torch.float32)
    grad_out = torch.randn(query.shape)
    clean = flat(results(query, keys, values, MASKED, grad_out))
    for tensor, mask in zip((*keys, *values), MASKED.masks() * 2, strict=True):
        tensor.masked_fill_(~mask[:, None, :, None], torch.nan)
    broken = flat(results(query, keys, values, MASKED, grad_out))
    assert all(a.equal(b) for a, b in zip(broken, clean, strict=True))


def test_the_same_bits_in_every_run_and_for_any_strides() -> None:
    query, keys, values = CASE.inputs(torch.bfloat16)
    grad_out = torch.randn(query.shape).bfloat16()
    first = flat(results(query, keys, values, CASE, grad_out))

    def apart(x: Tensor) -> Tensor:
        return torch.stack([x, x], -2)[..., 0, :]

    moves = (Tensor.clone, Tensor.contiguous, apart, lambda x: x.mT.contiguous().mT)
    for move in moves:
        moved = results(move(query), [move(k) for k in keys], [move(v) for v in values], CASE, move(grad_out))
        assert all(a.equal(b) for a, b in zip(flat(moved), first, strict=True))


def test_results_lie_as_the_native_ones() -> None:
    query, keys, values = CASE.inputs(torch.float32)
    out, lse, *grads = flat(results(query, keys, values, CASE, torch.ones(query.shape)))
    assert lse.is_contiguous()
    assert all(tensor.transpose(1, 2).is_contiguous() for tensor in (out, *grads))


def test_what_the_kernels_do_not_take() -> None:
    query, keys, values = CASE.inputs(torch.float64)
    with pytest.raises(TypeError, match=r'query is torch.float64: use backend="reference"'):
        results(query, keys, values, CASE, query)

"""The Triton kernels of placement on CPU tensors. test_placement_triton.py runs this file in a process of its
own, since Triton settles at its import whether it interprets. By hand:

    TRITON_INTERPRET=1 pytest tests/fusion/interpreted_placement.py
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fusion.placement_cases import LARGE_CASES, SMALL_CASES, PlacementCase
from pyvlm.triton_kernels import placement
from pyvlm.triton_kernels.common import INTERPRETED
from tolerance import assert_close
from torch import Tensor

from pyvlm.ops import add_at_image_tokens, pack_image_tokens, place_image_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Shortened: a program a row, and the interpreter is slow.
CASES = [
    *(replace(case, text_tokens=min(case.text_tokens, 20), side=min(case.side, 6)) for case in SMALL_CASES),
    *(case.reduced() for case in LARGE_CASES),
]

Op = Callable[..., Tensor]  # of leaves, and `backend=`


def results(op: Op, leaves: list[Tensor], grad: Tensor, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradient of every leaf."""
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    out = op(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def assert_right(op: Op, leaves: list[Tensor], copies: bool = True) -> None:
    dtype = leaves[0].dtype
    grad = torch.randn(op(*leaves, backend="reference").shape).to(dtype)
    actual = results(op, leaves, grad, "triton", dtype)
    plain = results(op, leaves, grad, "reference", dtype)
    expected = results(op, leaves, grad, "reference", torch.float64)
    # A sum may differ: the interpreter cuts float32 off where a GPU rounds it to bfloat16.
    assert actual[0].equal(plain[0]) or not copies
    for i, value in enumerate(actual):
        assert value.dtype == dtype
        assert_close(value, expected[i], plain[i], f"result {i}")


def test_the_kernels_are_interpreted() -> None:
    assert INTERPRETED.value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_cases(case: PlacementCase, dtype: torch.dtype) -> None:
    mask, index = case.image_mask(), case.index()
    copies = case.op != "add" or dtype != torch.bfloat16
    assert_right(
        lambda *leaves, backend: case.run(leaves, mask, index, backend), list(case.inputs(dtype)), copies
    )


@pytest.mark.parametrize("parts", [None, 1, 3])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_used_several_times_or_never(
    dtype: torch.dtype, index_dtype: torch.dtype, parts: int | None
) -> None:
    mask = torch.rand(3, 9) < 0.5
    rows, width = int(mask.sum()), 7
    index = torch.randint(-1, 5, (rows,) if parts is None else (rows, parts), dtype=index_dtype)
    features, newline = torch.randn(6, width).to(dtype), torch.randn(width).to(dtype)
    text = torch.randn(3, 9, width * (parts or 1)).to(dtype)
    assert_right(
        lambda t, f, n, backend: place_image_tokens(t, f, mask, index, n, backend=backend),
        [text, features, newline],
    )
    assert_right(lambda f, n, backend: pack_image_tokens(f, index, n, backend=backend), [features, newline])


@pytest.mark.parametrize("uses", [0, 1, placement.NEWLINES, placement.NEWLINES + 1, 3 * placement.NEWLINES])
def test_newlines_in_chunks(uses: int) -> None:
    index = torch.cat([torch.full((uses,), -1), torch.arange(3)])[torch.randperm(uses + 3)]
    assert_right(
        lambda f, n, backend: pack_image_tokens(f, index, n, backend=backend),
        [torch.randn(3, 5), torch.randn(5)],
    )


MASKS = {
    "no placeholder": torch.zeros(2, 3, dtype=torch.bool),
    "placeholders alone": torch.ones(2, 3, dtype=torch.bool),
    "no token": torch.zeros(2, 0, dtype=torch.bool),
    "no sample": torch.zeros(0, 3, dtype=torch.bool),
    "not contiguous": torch.tensor([[True, False], [False, True], [True, True]]).T,
}


@pytest.mark.parametrize("width", [0, 1, 40, placement.MOST_COLUMNS + 3])
@pytest.mark.parametrize("name", MASKS)
def test_masks_and_widths(name: str, width: int) -> None:
    mask = MASKS[name]
    rows = int(mask.sum())
    index = torch.arange(rows).flip(0)
    leaves = [torch.randn(*mask.shape, width), torch.randn(rows, width)]
    for op in (place_image_tokens, add_at_image_tokens):
        assert_right(lambda t, r, backend, op=op: op(t, r, mask, backend=backend), leaves)
    assert_right(lambda t, r, backend: place_image_tokens(t, r, mask, index, backend=backend), leaves)


def test_any_strides() -> None:
    mask, index = torch.tensor([[True, False, True], [False, True, True]]), torch.tensor([1, -1, 0, 1])
    leaves = [torch.randn(2, 3, 6), torch.randn(2, 6), torch.randn(6)]
    strided = [torch.stack([leaf, leaf], -1)[..., 0] for leaf in leaves]
    strided_index = torch.stack([index, index], 1)[:, 0]
    grad = torch.randn(2, 3, 6)
    expected = results(
        lambda t, f, n, backend: place_image_tokens(t, f, mask, index, n, backend=backend),
        leaves, grad, "triton", torch.float32,
    )  # fmt: skip
    strided_mask = mask.T.contiguous().T
    actual = results(
        lambda t, f, n, backend: place_image_tokens(t, f, strided_mask, strided_index, n, backend=backend),
        strided, grad.mT.contiguous().mT, "triton", torch.float32,
    )  # fmt: skip
    assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))


def test_nan_in_rows_that_nobody_sees_stays_there() -> None:
    mask, index = torch.tensor([[False, True, True, False], [True, False, False, True]]), [0, 4, 2, 0]
    text = torch.randn(2, 4, 20).masked_fill(mask[..., None], torch.nan)
    features, newline = torch.randn(5, 20), torch.full((20,), torch.nan)
    features[[1, 3]] = torch.nan
    found = results(
        lambda t, f, n, backend: place_image_tokens(t, f, mask, torch.tensor(index), n, backend=backend),
        [text, features, newline], torch.randn(2, 4, 20), "triton", torch.float32,
    )  # fmt: skip
    assert all(value.isfinite().all() for value in found)
    assert (found[1][mask] == 0).all()
    assert (found[2][[1, 3]] == 0).all()
    assert (found[3] == 0).all()


def within_nan(tensor: Tensor) -> Tensor:
    """The same values, with NaN (integers: the largest) before and behind them in memory."""
    filling = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    larger = torch.full((3 * len(tensor), *tensor.shape[1:]), filling, dtype=tensor.dtype)
    larger[len(tensor) : 2 * len(tensor)] = tensor
    return larger[len(tensor) : 2 * len(tensor)]


def test_what_points_outside_is_not_read() -> None:
    # On a GPU the error of a wrong count or index comes later: till then nothing may be read outside.
    text, features, newline = (within_nan(torch.randn(shape)) for shape in ((2, 3, 8), (3, 8), (8,)))
    index = within_nan(torch.tensor([0, 3, -2, 2**40, -1]))
    for mask in (torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, True, False]] * 2)):
        assert placement.place_image_tokens(text, features, mask, index, newline).isfinite().all()
        assert placement.place_image_tokens(text, features, mask, None, None).isfinite().all()
        assert placement.add_at_image_tokens(text, features, mask).isfinite().all()
        grads = placement.place_image_tokens_backward(text, mask, index, 3, 8, [True] * 3)
        assert all(grad.isfinite().all() for grad in grads)
        for number in (2, 3):  # fewer rows than placeholders
            assert placement.add_at_image_tokens_backward(text, mask, number).isfinite().all()
    assert placement.pack_image_tokens(features, index, newline).isfinite().all()


def test_what_is_not_needed_is_empty() -> None:
    mask, index = torch.tensor([[True, False, True]]), torch.tensor([1, -1])
    grad = torch.randn(1, 3, 8)
    for rows, given in ((2, None), (3, index)):
        everything = placement.place_image_tokens_backward(grad, mask, given, rows, 8, [True] * 3)
        for needs in ([False] * 3, [True, False, False], [False, True, False], [False, False, True]):
            found = placement.place_image_tokens_backward(grad, mask, given, rows, 8, needs)
            for value, needed, full in zip(found, needs, everything, strict=True):
                assert value.equal(full) if needed else value.numel() == 0

"""Image rows into the token sequence on NVIDIA GPUs: Triton kernels, and how they are launched.

Shapes: B samples · L tokens · H features of a token · R image feature rows · C features of such a row ·
S placeholders, counted row-major over [B, L] · P feature rows side by side in a placeholder (H = P·C).

The host reads neither mask nor index, so nothing waits for the GPU, and new ones compile nothing. Nobody has
checked them either: what points outside is not read, and comes out as 0. Offsets are 64-bit. Tensors that are
not contiguous are copied. Sums are in fp32 (fp64 for fp64), in a fixed order and without atomics.

A name's last letter N means some columns of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from pyvlm.triton_kernels.common import cdiv, launch, next_power_of_2
from torch import Tensor

# Arguments that differ from call to call. Triton would compile anew where one of them becomes 1 or stops
# being a multiple of 16, so it is told not to look.
RUNTIME = ("num_rows", "num_features")


@dataclass(frozen=True)
class Tiles:
    """Columns of a row that a program copies, and its warps and loads in flight."""

    columns: int
    warps: int = 4
    stages: int = 2


MOST_COLUMNS = 2048  # 16 numbers a thread; not yet measured on a GPU
NEWLINES = 64  # that one program adds up: the newline may stand for some thousand rows


@triton.jit
def columns_of(program, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """The row that a program works on, and its columns."""
    tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    column_N = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return (program // tiles).to(tl.int64), column_N, column_N < WIDTH


@triton.jit
def image_row(image_mask, ordinal, token):
    """The image row that a token holds the place of, -1 where it is text."""
    return tl.where(tl.load(image_mask + token) != 0, tl.load(ordinal + token) - 1, -1)


@triton.constexpr_function
def acc_type(pointer):
    """The type that sums are made in."""
    return tl.float64 if pointer.dtype.element_ty == tl.float64 else tl.float32


@triton.jit(do_not_specialize=RUNTIME)
def place_kernel(
    text,
    features,
    newline,
    index,
    image_mask,
    ordinal,
    out,
    num_rows: tl.int64,
    num_features: tl.int64,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [tokens, P·C]: text, and at the placeholders an image row, or with ADDS their sum.

    Without a mask all tokens are placeholders. ordinal: their number up to a token and with it. Program: some
    columns of a part.
    """
    item, column_N, within_N = columns_of(tl.program_id(0), WIDTH, BLOCK_N)
    token = item // PARTS
    row = token if image_mask is None else image_row(image_mask, ordinal, token)
    if row >= 0:
        source = row
        if index is not None:
            entry = index + row * PARTS + item % PARTS
            source = tl.load(entry, mask=row < num_rows, other=-2).to(tl.int64)
        out_N = tl.zeros([BLOCK_N], out.dtype.element_ty)
        if (source >= 0) & (source < num_features):
            out_N = tl.load(features + source * WIDTH + column_N, mask=within_N, other=0.0)
        if newline is not None and source == -1:
            out_N = tl.load(newline + column_N, mask=within_N, other=0.0)
        if ADDS:
            text_N = tl.load(text + item * WIDTH + column_N, mask=within_N, other=0.0)
            out_N = (text_N.to(acc_type(out)) + out_N.to(acc_type(out))).to(out.dtype.element_ty)
        tl.store(out + item * WIDTH + column_N, out_N, mask=within_N)
    else:
        if text is not None:
            text_N = tl.load(text + item * WIDTH + column_N, mask=within_N, other=0.0)
            tl.store(out + item * WIDTH + column_N, text_N, mask=within_N)


@triton.jit(do_not_specialize=RUNTIME)
def split_kernel(
    grad,
    image_mask,
    ordinal,
    grad_text,
    grad_rows,
    num_rows: tl.int64,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad [tokens, H] dealt out to grad_text, 0 at the placeholders, and to grad_rows [S, H]; either may be
    None. Program: some columns of a token."""
    token, column_N, within_N = columns_of(tl.program_id(0), WIDTH, BLOCK_N)
    row = image_row(image_mask, ordinal, token)
    at_N = token * WIDTH + column_N
    if row >= 0:
        if grad_rows is not None and row < num_rows:
            grad_N = tl.load(grad + at_N, mask=within_N, other=0.0)
            tl.store(grad_rows + row * WIDTH + column_N, grad_N, mask=within_N)
        if grad_text is not None:
            zero_N = tl.zeros([BLOCK_N], grad.dtype.element_ty)
            tl.store(grad_text + at_N, zero_N, mask=within_N)
    else:
        if grad_text is not None:
            grad_N = tl.load(grad + at_N, mask=within_N, other=0.0)
            tl.store(grad_text + at_N, grad_N, mask=within_N)


@triton.jit(do_not_specialize=RUNTIME)
def sum_kernel(
    grad,
    position,
    uses,
    bounds,
    out,
    num_rows: tl.int64,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [R, C]: the sum of the gradients of all parts that a feature row went into, in the order of the
    index; with CHUNK, of so many parts that were newlines.

    uses: entries of the index, sorted by what they point at; bounds: where those of −1, 0, .. begin.
    position: the token of a placeholder, or None where rows are tokens. Program: some columns of a row.
    """
    item, column_N, within_N = columns_of(tl.program_id(0), WIDTH, BLOCK_N)
    if CHUNK > 0:
        begin = tl.load(bounds) + item * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(bounds + 1))
    else:
        begin = tl.load(bounds + item + 1)
        end = tl.load(bounds + item + 2)
    sum_N = tl.zeros([BLOCK_N], acc_type(grad))
    for i in tl.range(begin, end):
        use = tl.load(uses + i)
        token = use // PARTS
        if position is not None:
            token = tl.load(position + token)
        if token < num_rows:
            start = (token * PARTS + use % PARTS) * WIDTH
            grad_N = tl.load(grad + start + column_N, mask=within_N, other=0.0)
            sum_N += grad_N.to(acc_type(grad))
    tl.store(out + item * WIDTH + column_N, sum_N.to(out.dtype.element_ty), mask=within_N)


def pack_image_tokens(features: Tensor, index: Tensor, newline: Tensor | None) -> Tensor:
    """The op `pyvlm::pack_image_tokens`, of arguments that `pyvlm.ops.pack_image_tokens` has checked."""
    parts = index.shape[1] if index.dim() == 2 else 1
    out = features.new_empty((index.shape[0], parts * features.shape[1]))
    _place(None, features, None, index, newline, out)
    return out


def pack_image_tokens_backward(
    grad: Tensor, index: Tensor, num_features: int, feature_width: int, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """The op `pyvlm::pack_image_tokens_backward`: gradients of features and newline, empty unless needed."""
    return _sum_by_source(grad.contiguous(), index, None, num_features, feature_width, needs)


def place_image_tokens(
    text: Tensor, features: Tensor, image_mask: Tensor, index: Tensor | None, newline: Tensor | None
) -> Tensor:
    """The op `pyvlm::place_image_tokens`, of arguments that `pyvlm.ops.place_image_tokens` has checked."""
    out = torch.empty_like(text, memory_format=torch.contiguous_format)
    _place(text, features, image_mask, index, newline, out)
    return out


def place_image_tokens_backward(
    grad: Tensor,
    image_mask: Tensor,
    index: Tensor | None,
    num_features: int,
    feature_width: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `pyvlm::place_image_tokens_backward`: gradients of text, features and newline, empty unless
    needed."""
    grad, ordinal = grad.contiguous(), _ordinal(image_mask)
    grad_text = torch.empty_like(grad) if needs[0] else None
    grad_features, grad_newline = grad.new_empty(0), grad.new_empty(0)
    if index is None:
        rows = grad.new_empty((num_features, feature_width)) if needs[1] else None
        _split(grad, image_mask, ordinal, grad_text, rows)
        grad_features = grad_features if rows is None else rows
        grad_newline = grad.new_zeros(feature_width) if needs[2] else grad_newline
    else:
        _split(grad, image_mask, ordinal, grad_text, None)
        if needs[1] or needs[2]:
            # The s-th placeholder is where the count of them reaches s + 1.
            count = torch.arange(1, index.shape[0] + 1, device=grad.device)
            position = torch.searchsorted(ordinal, count)
            grad_features, grad_newline = _sum_by_source(
                grad, index, position, num_features, feature_width, needs[1:]
            )
    return grad.new_empty(0) if grad_text is None else grad_text, grad_features, grad_newline


def add_at_image_tokens(hidden: Tensor, updates: Tensor, image_mask: Tensor) -> Tensor:
    """The op `pyvlm::add_at_image_tokens`, of arguments that `pyvlm.ops.add_at_image_tokens` has checked."""
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    _place(hidden, updates, image_mask, None, None, out, adds=True)
    return out


def add_at_image_tokens_backward(grad: Tensor, image_mask: Tensor, num_updates: int) -> Tensor:
    """The op `pyvlm::add_at_image_tokens_backward`: the gradient of the updates."""
    grad_updates = grad.new_empty((num_updates, grad.shape[2]))
    _split(grad.contiguous(), image_mask, _ordinal(image_mask), None, grad_updates)
    return grad_updates


def _ordinal(image_mask: Tensor) -> Tensor:
    """Placeholders up to each token and with it, over the whole batch: int64 [B·L]."""
    return image_mask.flatten().cumsum(0)


def _bytes(image_mask: Tensor) -> Tensor:
    return image_mask.contiguous().view(torch.uint8)


def _tiles(width: int) -> Tiles:
    return Tiles(min(MOST_COLUMNS, next_power_of_2(max(width, 1))))


def _launch(kernel: Any, items: int, width: int, **arguments: Any) -> None:
    tiles = _tiles(width)
    with torch.cuda.device_of(arguments["out"] if "out" in arguments else arguments["grad"]):
        grid = items * cdiv(width, tiles.columns)
        launch(kernel, (grid,), tiles, arguments | {"WIDTH": width, "BLOCK_N": tiles.columns})


def _place(
    text: Tensor | None,
    features: Tensor,
    image_mask: Tensor | None,
    index: Tensor | None,
    newline: Tensor | None,
    out: Tensor,
    adds: bool = False,
) -> None:
    num_features, width = features.shape
    parts = index.shape[1] if index is not None and index.dim() == 2 else 1
    _launch(
        place_kernel,
        out.numel() // max(width, 1),
        width,
        text=None if text is None else text.contiguous(),
        features=features.contiguous(),
        newline=None if newline is None else newline.contiguous(),
        index=None if index is None else index.contiguous(),
        image_mask=None if image_mask is None else _bytes(image_mask),
        ordinal=None if image_mask is None else _ordinal(image_mask),
        out=out,
        num_rows=num_features if index is None else index.shape[0],
        num_features=num_features,
        PARTS=parts,
        ADDS=adds,
    )


def _split(
    grad: Tensor, image_mask: Tensor, ordinal: Tensor, grad_text: Tensor | None, grad_rows: Tensor | None
) -> None:
    if grad_text is None and grad_rows is None:
        return
    _launch(
        split_kernel,
        image_mask.numel(),
        grad.shape[2],
        grad=grad,
        image_mask=_bytes(image_mask),
        ordinal=ordinal,
        grad_text=grad_text,
        grad_rows=grad_rows,
        num_rows=0 if grad_rows is None else grad_rows.shape[0],
    )


def _sum_by_source(
    grad: Tensor,
    index: Tensor,
    position: Tensor | None,
    num_features: int,
    feature_width: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of features and newline. A stable sort brings together what came from one row: the host
    need not know whether rows were used once, and the order of each sum is that of the index."""
    sorted_index, uses = torch.sort(index.flatten(), stable=True)
    sources = torch.arange(-1, num_features + 1, dtype=index.dtype, device=index.device)
    arguments = {
        "grad": grad,
        "position": position,
        "uses": uses,
        "bounds": torch.searchsorted(sorted_index, sources),
        "num_rows": grad.numel() // max(grad.shape[-1], 1),
        "PARTS": index.shape[1] if index.dim() == 2 else 1,
    }
    grad_features, grad_newline = grad.new_empty(0), grad.new_empty(0)
    if needs[0]:
        grad_features = grad.new_empty((num_features, feature_width))
        _launch(sum_kernel, num_features, feature_width, **arguments, out=grad_features, CHUNK=0)
    if needs[1]:
        # So many chunks there are where all are newlines; the host does not know how many are.
        shape = (cdiv(index.numel(), NEWLINES), feature_width)
        sums = grad.new_empty(shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        _launch(sum_kernel, shape[0], feature_width, **arguments, out=sums, CHUNK=NEWLINES)
        grad_newline = sums.sum(0).to(grad.dtype)
    return grad_features, grad_newline

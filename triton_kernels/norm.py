"""RMSNorm on NVIDIA GPUs: Triton kernels, and how they are launched.

Shapes: R rows, the dimensions before the channels as they lie in memory · C channels. A name's last letters M
and N mean some rows of a tensor [R, C] and its channels, padded to a power of two.

A row is read once and stays in registers; all is computed in fp32 and rounded once. As many programs as a GPU
runs at once sum the gradient of the weight, in a fixed order and without atomics.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from pyvlm.triton_kernels.common import (
    cdiv,
    launch,
    load_rows_within,
    multiprocessors,
    next_power_of_2,
    store_rows,
)
from torch import Tensor

# Arguments that differ from call to call. Triton would compile anew where one of them becomes 1 or stops
# being a multiple of 16, so it is told not to look.
RUNTIME = ("num_rows", "programs", "eps")


@dataclass(frozen=True)
class Tiles:
    """Rows and padded channels of a program, its warps and loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int = 1


NUMBERS = 1024  # of a tile where a row has fewer: a head's channels; not yet measured on a GPU
NUMBERS_OF_A_WARP = 512  # 16 a thread
# Of a multiprocessor, that share a gradient of the weight: with up to 80 registers a thread all of them run
# at once. The last of more would have the GPU to themselves, and too few loads in flight for its memory.
RESIDENT_WARPS = 24


@triton.jit
def scale_of(weight, column_N, there_N, UNIT_OFFSET: tl.constexpr):
    """What normalised channels are multiplied by."""
    scale_N = tl.load(weight + column_N, mask=there_N, other=0.0).to(tl.float32)
    return scale_N + 1 if UNIT_OFFSET else scale_N


@triton.jit(do_not_specialize=RUNTIME)
def rms_norm_kernel(
    x,
    weight,
    y,
    rstd,
    num_rows: tl.int64,
    eps: tl.float32,
    WIDTH: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = x · rstd · weight, rstd = 1 / sqrt(mean(x²) + eps). Program: some rows."""
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = tl.arange(0, BLOCK_N)
    there_M, there_N = row_M < num_rows, column_N < WIDTH
    x_MN = load_rows_within(x, row_M, there_M, column_N, there_N, WIDTH).to(tl.float32)
    rstd_M = 1 / tl.sqrt(tl.sum(x_MN * x_MN, 1) / WIDTH + eps)
    y_MN = x_MN * rstd_M[:, None]
    if weight is not None:
        y_MN *= scale_of(weight, column_N, there_N, UNIT_OFFSET)[None, :]
    store_rows(y, y_MN, row_M, there_M, column_N, there_N, WIDTH)
    tl.store(rstd + row_M, rstd_M, mask=there_M)


@triton.jit(do_not_specialize=RUNTIME)
def rms_norm_backward_kernel(
    grad_y,
    x,
    weight,
    rstd,
    grad_x,
    partial,
    num_rows: tl.int64,
    programs: tl.int64,
    WIDTH: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_x = rstd · (g − x̂ · mean(g · x̂)) with g = grad_y · weight and x̂ = x · rstd.

    Either output may be None. Program: every so many tiles of rows; partial [programs, C] takes its sum of
    grad_y · x̂.
    """
    program = tl.program_id(0).to(tl.int64)
    column_N = tl.arange(0, BLOCK_N)
    there_N = column_N < WIDTH
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(program * BLOCK_M, num_rows, programs * BLOCK_M):
        row_M = first + tl.arange(0, BLOCK_M)
        there_M = row_M < num_rows
        rstd_M = tl.load(rstd + row_M, mask=there_M, other=0.0)
        grad_MN = load_rows_within(grad_y, row_M, there_M, column_N, there_N, WIDTH).to(tl.float32)
        normed_MN = load_rows_within(x, row_M, there_M, column_N, there_N, WIDTH).to(tl.float32)
        normed_MN *= rstd_M[:, None]
        if partial is not None:
            sum_MN += grad_MN * normed_MN
        if grad_x is not None:
            if weight is not None:
                grad_MN *= scale_of(weight, column_N, there_N, UNIT_OFFSET)[None, :]
            along_M = tl.sum(grad_MN * normed_MN, 1) / WIDTH
            grad_MN = (grad_MN - normed_MN * along_M[:, None]) * rstd_M[:, None]
            store_rows(grad_x, grad_MN, row_M, there_M, column_N, there_N, WIDTH)
    if partial is not None:
        tl.store(partial + program * WIDTH + column_N, tl.sum(sum_MN, 0), mask=there_N)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """The op `pyvlm::rms_norm`, of arguments that `pyvlm.ops.rms_norm` has checked: y, and rstd [..]."""
    y = _like(x, x.device)
    rstd = _number_a_row(y)
    arguments = {"x": _rows(x, y), "weight": _parameter(weight), "y": y, "rstd": rstd, "eps": eps}
    _launch(rms_norm_kernel, x, unit_offset, arguments)
    return y, rstd


def rms_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    unit_offset: bool,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The op `pyvlm::rms_norm_backward`: gradients of x and weight, empty unless wanted."""
    layout = _like(x, torch.device("meta"))
    grad_x = torch.empty_like(layout, device=x.device) if want_x else None
    tiles = _tiles(x)
    resident = multiprocessors(x.device) * max(1, RESIDENT_WARPS // tiles.warps)
    programs = min(resident, cdiv(x.numel(), max(x.shape[-1], 1) * tiles.rows))
    sums = want_weight and weight is not None
    partial = x.new_empty((programs, x.shape[-1]), dtype=torch.float32) if sums else None
    arguments = {
        "grad_y": _rows(grad_y, layout),
        "x": _rows(x, layout),
        "weight": _parameter(weight),
        "rstd": _rows(rstd, _number_a_row(layout)),
        "grad_x": grad_x,
        "partial": partial,
        "programs": programs,
    }
    _launch(rms_norm_backward_kernel, x, unit_offset, arguments)
    grad_weight = x.new_empty(0) if partial is None else partial.sum(0).to(weight.dtype)
    return x.new_empty(0) if grad_x is None else grad_x, grad_weight


def _like(x: Tensor, device: torch.device) -> Tensor:
    """What results are written to: the order of x's dimensions in memory, or contiguous where its channels
    are no neighbours."""
    like = torch.empty_like(x, device=device)
    return like if like.stride(-1) == 1 or like.shape[-1] == 1 else x.new_empty(x.shape, device=device)


def _number_a_row(y: Tensor) -> Tensor:
    """A float32 [..] whose elements lie in the order of the rows of y."""
    strides = [stride // max(y.shape[-1], 1) for stride in y.stride()[:-1]]
    return torch.empty_strided(y.shape[:-1], strides, dtype=torch.float32, device=y.device)


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """x with its rows in memory as those of `like` lie."""
    return (
        x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype, device=x.device).copy_(x)
    )


def _parameter(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _tiles(x: Tensor) -> Tiles:
    columns = next_power_of_2(max(x.shape[-1], 1))
    rows = max(1, NUMBERS // columns)
    return Tiles(rows, columns, warps=min(16, max(1, rows * columns // NUMBERS_OF_A_WARP)))


def _launch(kernel: Any, x: Tensor, unit_offset: bool, arguments: dict[str, Any]) -> None:
    if x.numel() == 0:
        return
    tiles, width = _tiles(x), x.shape[-1]
    rows = x.numel() // width
    constants = {
        "WIDTH": width,
        "UNIT_OFFSET": unit_offset,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
    }
    grid = arguments.get("programs", cdiv(rows, tiles.rows))
    with torch.cuda.device_of(x):
        launch(kernel, (grid,), tiles, arguments | {"num_rows": rows} | constants)

"""What the Triton kernels of every family share, and how they are launched."""

from typing import Any

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISION = "tf32x3"  # of float32 alone: three products of 19-bit parts lose next to nothing
LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is for kernels too, and takes 4 microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], tiles: Any, arguments: dict[str, Any]) -> None:
    """Runs a kernel on those of the arguments that it has, with the `warps` and `stages` of its tiles."""
    if 0 not in grid:
        arguments = {name: arguments[name] for name in kernel.arg_names}
        # Triton will stop to fuse multiplications and additions unless it is told to.
        kernel[grid](**arguments, num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True)


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None for the CPU, where Triton interprets."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; on the CPU, where Triton interprets, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b, on top of acc where there is one."""
    if INTERPRETED:  # the interpreter cannot multiply bfloat16; widened, the products are the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """Exact to a few units in the last place, by exp2 away from 0 and by its power series near it."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    away = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E)))
    return tl.where(tl.abs(x) < 0.25, series, away)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation and its slope."""
    if ACTIVATION == "silu":
        sigmoid = 1 / (1 + tl.exp2(x * -LOG2E))
        value = x * sigmoid
        slope = sigmoid * (1 + x * (1 - sigmoid))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp2(x * x * (-0.5 * LOG2E))
    elif ACTIVATION == "gelu_tanh":
        bent = tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x))
        value = 0.5 * x * (1 + bent)
        inner_slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        slope = 0.5 * (1 + bent) + 0.5 * x * (1 - bent * bent) * inner_slope
    elif ACTIVATION == "quick_gelu":
        sigmoid = 1 / (1 + tl.exp2(x * (-1.702 * LOG2E)))
        value = x * sigmoid
        slope = sigmoid * (1 + 1.702 * x * (1 - sigmoid))
    elif ACTIVATION == "relu":
        value = tl.where(x < 0, 0.0, x)  # tl.maximum would lose NaN
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        value = tl.where(x < 0, 0.0, x * x)
        slope = tl.where(x < 0, 0.0, 2 * x)
    return value, slope


# Tiles of matrices: M rows, N columns, K of the dimension that is summed over.


@triton.jit
def tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column tile of a program: down GROUP row tiles, then to the next column, so that programs that
    run together read the same rows and weights from the L2 cache."""
    group = program // (GROUP * column_tiles)
    first = group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def load_rows_within(rows, row_M, within_M, column_N, within_N, width):
    """A tile of a [·, width] tensor, and zeros where it is not within."""
    pointers = rows + row_M.to(tl.int64)[:, None] * width + column_N[None, :]
    return tl.load(pointers, mask=within_M[:, None] & within_N[None, :], other=0.0)


@triton.jit
def load_columns_within(rows, row_K, within_K, column_M, within_M, width):
    """The same, transposed. Without wgmma `load_rows_within(...).T` would not be loaded asynchronously."""
    pointers = rows + row_K.to(tl.int64)[None, :] * width + column_M[:, None]
    return tl.load(pointers, mask=within_M[:, None] & within_K[None, :], other=0.0)


@triton.jit
def store_rows(rows, tile, row_M, within_M, column_N, within_N, width):
    """Writes what is within of a tile of a [·, width] tensor, in its dtype."""
    pointers = rows + row_M.to(tl.int64)[:, None] * width + column_N[None, :]
    tl.store(pointers, tile.to(rows.dtype.element_ty), mask=within_M[:, None] & within_N[None, :])


@triton.jit
def halves(tile_MN):
    """The left and the right columns: what is made of a whole tile would not fit into the registers."""
    return tl.split(tile_MN.reshape(tile_MN.shape[0], 2, tile_MN.shape[1] // 2).permute(0, 2, 1))

"""What the Triton kernels of every family share, and how they are launched."""

from typing import Any

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISION = "tf32x3"  # of float32 alone: three products of 19-bit parts lose next to nothing
LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def launch(kernel: Any, grid: tuple[int, ...], tiles: Any, arguments: dict[str, Any]) -> None:
    """Runs a kernel on those of the arguments that it has, with the `warps` and `stages` of its tiles."""
    if 0 not in grid:
        arguments = {name: arguments[name] for name in kernel.arg_names}
        # Triton will stop to fuse multiplications and additions unless it is told to.
        kernel[grid](**arguments, num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True)


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None for the CPU, where Triton interprets."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


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

"""Activations, gated and plain, on NVIDIA GPUs: Triton kernels, and how they are launched.

Shapes: R rows, the dimensions before the channels · I channels. A name's last letters M and N mean some rows
and columns of a tensor [R, I].

Half of a joint projection is read where it lies: rows may be as far apart as they like, columns are
neighbours. All is computed in fp32 and rounded once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from pyvlm.triton_kernels.common import activate, cdiv, launch, load_rows_within, next_power_of_2, store_rows
from torch import Tensor

# Arguments that differ from call to call. Triton would compile anew where one of them becomes 1 or stops
# being a multiple of 16, so it is told not to look.
RUNTIME = ("num_rows",)


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a program, its warps and loads in flight."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1


NUMBERS = 2048  # of a tile, 16 a thread; not yet measured on a GPU


@triton.jit
def tile_within(program, num_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows and columns that a program works on, and which of them are there."""
    tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    row_M = (program // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return row_M, row_M < num_rows, column_N, column_N < WIDTH


@triton.jit(do_not_specialize=RUNTIME)
def gated_kernel(
    gate,
    up,
    out,
    num_rows: tl.int64,
    WIDTH: tl.constexpr,
    GATE_LD: tl.constexpr,
    UP_LD: tl.constexpr,
    OUT_LD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = act(gate) · up, or act(gate) without an up. out may be the gate itself."""
    row_M, there_M, column_N, there_N = tile_within(tl.program_id(0), num_rows, WIDTH, BLOCK_M, BLOCK_N)
    gate_MN = load_rows_within(gate, row_M, there_M, column_N, there_N, GATE_LD).to(tl.float32)
    out_MN, _ = activate(gate_MN, ACTIVATION)
    if up is not None:
        out_MN *= load_rows_within(up, row_M, there_M, column_N, there_N, UP_LD).to(tl.float32)
    store_rows(out, out_MN, row_M, there_M, column_N, there_N, OUT_LD)


@triton.jit(do_not_specialize=RUNTIME)
def gated_backward_kernel(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    num_rows: tl.int64,
    WIDTH: tl.constexpr,
    GRAD_LD: tl.constexpr,
    GATE_LD: tl.constexpr,
    UP_LD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_gate = grad · up · act'(gate), grad_up = grad · act(gate); the activation is computed again."""
    row_M, there_M, column_N, there_N = tile_within(tl.program_id(0), num_rows, WIDTH, BLOCK_M, BLOCK_N)
    gate_MN = load_rows_within(gate, row_M, there_M, column_N, there_N, GATE_LD).to(tl.float32)
    grad_MN = load_rows_within(grad, row_M, there_M, column_N, there_N, GRAD_LD).to(tl.float32)
    act_MN, slope_MN = activate(gate_MN, ACTIVATION)
    if up is not None:
        up_MN = load_rows_within(up, row_M, there_M, column_N, there_N, UP_LD).to(tl.float32)
        store_rows(grad_up, grad_MN * act_MN, row_M, there_M, column_N, there_N, WIDTH)
        grad_MN *= up_MN
    store_rows(grad_gate, grad_MN * slope_MN, row_M, there_M, column_N, there_N, WIDTH)


def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """The op `pyvlm::gated_activation`, of arguments that `pyvlm.ops.gated_activation` has checked."""
    out = gate.new_empty(gate.shape)
    _launch_gated(_rows(gate), up, out, activation)
    return out


def gated_activation_(gate: Tensor, up: Tensor | None, activation: str) -> None:
    """The op `pyvlm::gated_activation_`: the same, written over gate."""
    if gate.numel() == 0:
        return
    rows = _rows(gate)
    _launch_gated(rows, up, rows, activation)
    if rows.data_ptr() != gate.data_ptr():  # its rows lie in no order that the kernel takes
        gate.copy_(rows.view(gate.shape))


def gated_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The op `pyvlm::gated_activation_backward`: gradients of gate and, where there is one, of up."""
    grad_gate = gate.new_empty(gate.shape)
    grad_up = gate.new_empty(0) if up is None else gate.new_empty(up.shape)
    arguments = {"grad": _rows(grad), "gate": _rows(gate), "up": None if up is None else _rows(up)}
    _launch(
        gated_backward_kernel,
        gate,
        activation,
        **arguments,
        GRAD_LD=arguments["grad"].stride(0),
        grad_gate=grad_gate,
        grad_up=grad_up,
    )
    return grad_gate, grad_up


def _rows(x: Tensor) -> Tensor:
    """[R, I] with neighbouring columns: a view wherever the dimensions before I can be one."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() > 0 else x.new_empty(0, max(x.shape[-1], 1))
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        return rows.contiguous()
    if rows.shape[0] == 1 and x.dim() > 1:  # as far from a next one as several: it compiles nothing new
        return rows.as_strided(rows.shape, (x.stride(-2), 1))
    return rows


def _launch_gated(gate: Tensor, up: Tensor | None, out: Tensor, activation: str) -> None:
    rows = None if up is None else _rows(up)
    out_ld = out.stride(0) if out is gate else gate.shape[1]
    _launch(gated_kernel, gate, activation, gate=gate, up=rows, out=out, OUT_LD=out_ld)


def _launch(kernel: Any, like: Tensor, activation: str, **arguments: Any) -> None:
    if like.numel() == 0:
        return
    gate, up, width = arguments["gate"], arguments["up"], like.shape[-1]
    columns = min(NUMBERS, next_power_of_2(width))
    tiles = Tiles(NUMBERS // columns, columns)
    numbers = {
        "num_rows": like.numel() // width,
        "WIDTH": width,
        "GATE_LD": gate.stride(0),
        "UP_LD": width if up is None else up.stride(0),
        "ACTIVATION": activation,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
    }
    grid = cdiv(numbers["num_rows"], tiles.rows) * cdiv(width, tiles.columns)
    with torch.cuda.device_of(like):
        launch(kernel, (grid,), tiles, arguments | numbers)

"""The experts' MLP on NVIDIA GPUs: prepares tensors, chooses tiles and launches the Triton kernels.

Shapes: T tokens, E experts, S slots (token, expert), H hidden, I intermediate, U rows of gate_up (2I where
gated, else I).

The host never reads the routing, so nothing waits for the GPU; how many slots and tokens there are are
run-time arguments, and new ones compile nothing. Tensors that are not contiguous are copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyvlm.triton_kernels.common import DTYPES, PRECISION, capability, cdiv, launch, next_power_of_2
from pyvlm.triton_kernels.moe_backward import (
    grad_bias_kernel,
    grad_hidden_kernel,
    grad_matrix_kernel,
    grad_rows_kernel,
    grad_weight_kernel,
)
from pyvlm.triton_kernels.moe_forward import down_kernel, sum_slots_kernel, up_kernel
from pyvlm.triton_kernels.moe_tiles import schedule_kernel
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tiles:
    """A tile of a product, the terms that are added at once, and the warps and loads in flight for it.

    `columns` counts rows of gate_up in the up kernel: gated, half of them are the gate's.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """Which tiles each kernel takes.

    Attributes:
        up, down: of the forward.
        grad_hidden, grad_rows, grad_matrix: of the backward.
        descriptors: load by tensor descriptors, which the hardware knows from compute capability 9.0 on.
        group: row tiles that are worked on together, column by column.
    """

    up: Tiles
    down: Tiles
    grad_hidden: Tiles
    grad_rows: Tiles
    grad_matrix: Tiles
    descriptors: bool = False
    group: int = 8


# Chosen so that ahead-of-time compilation spills no registers (tests/moe/moe_triton_aot.json shows what each
# takes) and so that few rows still give every multiprocessor some weights to read; not yet measured on a GPU.
# By GPU, then for many rows an expert, and for few: then reading the weights is what takes the time.
FEW_ROWS = 16
_HOPPER_AND_BLACKWELL = (
    Config(
        up=Tiles(128, 256, 64, 8, 4),
        down=Tiles(128, 256, 64, 8, 4),
        grad_hidden=Tiles(128, 128, 64, 8, 4),
        grad_rows=Tiles(128, 256, 64, 8, 4),
        grad_matrix=Tiles(128, 256, 64, 8, 4),
        descriptors=True,
    ),
    Config(
        up=Tiles(16, 128, 128, 4, 4),
        down=Tiles(16, 64, 128, 4, 5),
        grad_hidden=Tiles(16, 64, 128, 4, 4),
        grad_rows=Tiles(16, 64, 128, 4, 4),
        grad_matrix=Tiles(128, 128, 32, 8, 3),
        descriptors=True,
    ),
)
_OTHER = (
    Config(*[Tiles(128, 128, 32, 8, 4)] * 5),
    Config(*[Tiles(16, 64, 64, 4, 4)] * 4, grad_matrix=Tiles(128, 128, 32, 8, 3)),
)
_FLOAT32 = (
    Config(
        up=Tiles(128, 128, 32, 8, 3),
        down=Tiles(128, 64, 32, 8, 3),
        grad_hidden=Tiles(128, 64, 32, 8, 3),
        grad_rows=Tiles(128, 128, 32, 8, 3),
        grad_matrix=Tiles(128, 128, 32, 8, 3),
    ),
    Config(*[Tiles(16, 64, 64, 4, 3)] * 4, grad_matrix=Tiles(64, 64, 32, 4, 3)),
)
_INTERPRETER = Config(*[Tiles(64, 64, 64, 4, 1)] * 5, descriptors=True)


def default_config(dtype: torch.dtype, capability: tuple[int, int] | None, few_rows: bool) -> Config:
    """The tiles for a dtype, a compute capability (None: Triton's interpreter), and few rows an expert."""
    if capability is None:
        return _INTERPRETER
    table = _HOPPER_AND_BLACKWELL if capability[0] in (9, 10, 11) else _OTHER
    if dtype == torch.float32:
        table = _FLOAT32
    return table[few_rows]


def expert_mlp(
    x: Tensor,
    token: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    slot: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    keep_hidden: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """The op `pyvlm::expert_mlp`, of arguments that `pyvlm.ops.expert_mlp` has checked.

    Args:
        x: `[T, H]`, fp32, bf16 or fp16.
        token, expert_offsets, token_offsets, slot: int32, of a `Routing`. Not read by the host; indices are
            clamped to what there is.
        weight: fp32 or fp64 `[S]`; taken as fp32.
        gate_up: `[E, U, H]`.
        down: `[E, H, I]`.
        activation: as for `pyvlm.ops.expert_mlp`.
        gated: whether gate_up has rows of a gate.
        gate_up_bias: `[E, U]` or None.
        down_bias: `[E, H]` or None.
        keep_hidden: whether the backward will want the pre-activation.
        config: tiles other than the default ones, for tests and measurements.

    Returns:
        y `[T, H]`, and the pre-activation `[S, U]` with its bias, a row a slot, else an empty tensor.

    Raises:
        TypeError: a dtype that the kernels do not have (float64).
    """
    p = _Problem(
        x, token, weight, expert_offsets, token_offsets, slot, gate_up, down, gate_up_bias, down_bias,
        activation, gated, config,
    )  # fmt: skip
    act = p.x.new_empty((p.slots, p.intermediate))
    hidden = p.x.new_empty((p.slots, p.up_rows)) if keep_hidden else None
    with torch.cuda.device_of(x):
        tiles = p.config.up
        columns = tiles.columns // 2 if gated else tiles.columns
        tensors = {"gate_up": p.described(p.gate_up, 1, columns, tiles.depth), "act": act, "hidden": hidden}
        p.launch_on_rows(up_kernel, tiles, columns, p.intermediate, tensors)
        tiles = p.config.down
        rows = p.x.new_empty((p.slots, p.hidden))
        tensors = {
            "act": p.described(act, tiles.rows, tiles.depth),
            "down": p.described(p.down, 1, tiles.columns, tiles.depth),
            "rows": rows,
        }
        p.launch_on_rows(down_kernel, tiles, tiles.columns, p.hidden, tensors)
        y = p.sum_slots(rows)
    return y, p.x.new_empty(0) if hidden is None else hidden


def expert_mlp_backward(
    grad_y: Tensor,
    x: Tensor,
    hidden: Tensor,
    token: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    slot: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    needs: Sequence[bool],
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `pyvlm::expert_mlp_backward`: gradients of `expert_mlp` for a cotangent of y.

    The further arguments are those of the forward, and the pre-activation that it kept; bitwise
    deterministic.

    Args:
        needs: which of the results are wanted; the others are empty, and cost nothing.

    Returns:
        grad_x, grad_weight, grad_gate_up, grad_down, grad_gate_up_bias and grad_down_bias.
    """
    p = _Problem(
        x, token, weight, expert_offsets, token_offsets, slot, gate_up, down, gate_up_bias, down_bias,
        activation, gated, config,
    )  # fmt: skip
    grad_y, hidden = grad_y.contiguous(), hidden.contiguous()
    wants_x, wants_weight, wants_gate_up, wants_down, wants_gate_up_bias, wants_down_bias = needs
    grads = [x.new_empty(0) for _ in needs]
    grad_hidden = weighted_act = weight_parts = None
    tiles = p.config.grad_hidden
    if wants_x or wants_gate_up or wants_gate_up_bias:
        grad_hidden = p.x.new_empty((p.slots, p.up_rows))
    if wants_down:
        weighted_act = p.x.new_empty((p.slots, p.intermediate))
    if wants_weight:
        shape = (cdiv(p.intermediate, tiles.columns), p.slots)
        weight_parts = p.weight.new_empty(shape)
    tensors = {
        "grad_y": grad_y,
        "hidden": hidden,
        "grad_hidden": grad_hidden,
        "weighted_act": weighted_act,
        "weight_parts": weight_parts,
        "down": p.described(p.down, 1, tiles.depth, tiles.columns),
    }
    with torch.cuda.device_of(x):
        if grad_hidden is not None or weighted_act is not None or weight_parts is not None:
            p.launch_on_rows(grad_hidden_kernel, tiles, tiles.columns, p.intermediate, tensors)
        if wants_x:
            grads[0] = p.sum_slots(_grad_rows(p, grad_hidden))
        if wants_weight:
            grads[1] = _grad_weight(p, grad_y, weight_parts).to(weight.dtype)
        if wants_gate_up:
            grads[2] = _grad_matrix(p, p.gate_up, grad_hidden, p.x, left_of_tokens=False)
        if wants_down:
            grads[3] = _grad_matrix(p, p.down, grad_y, weighted_act, left_of_tokens=True)
        if wants_gate_up_bias:
            grads[4] = _grad_bias(p, grad_hidden, of_tokens=False)
        if wants_down_bias:
            grads[5] = _grad_bias(p, grad_y, of_tokens=True)
    return tuple(grads)


class _Problem:
    """The inputs that forward and backward share, and what kernels are told about them."""

    def __init__(
        self,
        x: Tensor,
        token: Tensor,
        weight: Tensor,
        expert_offsets: Tensor,
        token_offsets: Tensor,
        slot: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: str,
        gated: bool,
        config: Config | None,
    ) -> None:
        if x.dtype not in DTYPES:
            raise TypeError(
                f"the Triton kernels of expert_mlp take {', '.join(map(str, DTYPES))}; x is {x.dtype}: "
                'use backend="reference"'
            )
        self.x, self.weight = x.contiguous(), weight.float().contiguous()
        self.gate_up, self.down = gate_up.contiguous(), down.contiguous()
        self.tokens, self.hidden = x.shape
        self.slots = len(token)
        self.experts, self.up_rows, _ = gate_up.shape
        self.intermediate = down.shape[2]
        self.busy = min(self.slots, self.experts)  # at most so many experts have slots
        few_rows = self.slots <= FEW_ROWS * self.busy
        self.config = config or default_config(x.dtype, capability(x.device), few_rows)
        # The hardware's descriptors want 16-byte strides and addresses, and no empty dimension.
        align = 16 // x.element_size()
        self.descriptors = (
            self.config.descriptors
            and min(self.slots, self.hidden, self.intermediate) > 0
            and self.hidden % align == self.intermediate % align == 0
            and all(matrices.data_ptr() % 16 == 0 for matrices in (self.gate_up, self.down))
        )
        self.schedules: dict[int, dict[str, Tensor | int]] = {}
        self.common: dict[str, Any] = {
            "x": self.x,
            "token": token.contiguous(),
            "weight": self.weight,
            "expert_offsets": expert_offsets.contiguous(),
            "token_offsets": token_offsets.contiguous(),
            "slot": slot.contiguous(),
            "gate_up_bias": None if gate_up_bias is None else gate_up_bias.contiguous(),
            "down_bias": None if down_bias is None else down_bias.contiguous(),
            "tokens": self.tokens,
            "experts": self.experts,
            "slots": self.slots,
            "SIZE_H": self.hidden,
            "SIZE_I": self.intermediate,
            "SIZE_U": self.up_rows,
            "ACTIVATION": activation,
            "GATED": gated,
            "PRECISION": PRECISION,
            "DESCRIPTORS": self.descriptors,
            "GROUP": self.config.group,
        }

    def described(self, tensor: Tensor, *block: int) -> Tensor | TensorDescriptor:
        """A tensor as the kernels load blocks of it: by a descriptor, where they can."""
        return TensorDescriptor.from_tensor(tensor, list(block)) if self.descriptors else tensor

    def launch(self, kernel: Any, grid: int, tiles: Tiles, columns: int, tensors: dict[str, Any]) -> None:
        blocks = {"BLOCK_M": tiles.rows, "BLOCK_N": columns, "BLOCK_K": tiles.depth}
        launch(kernel, (grid,), tiles, self.common | blocks | tensors)

    def launch_on_rows(
        self, kernel: Any, tiles: Tiles, columns: int, width: int, tensors: dict[str, Any]
    ) -> None:
        """Runs a kernel on all row tiles, and on tiles of `columns` of a result of some width."""
        schedule = self.schedule(tiles.rows)
        grid = schedule["row_tiles"] * cdiv(width, columns)
        self.launch(kernel, grid, tiles, columns, schedule | tensors)

    def schedule(self, rows: int) -> dict[str, Tensor | int]:
        """Which row tiles there are, found once for each size."""
        if rows not in self.schedules:
            # At worst each busy expert has one slot in its last tile.
            row_tiles = (self.slots - self.busy) // rows + self.busy
            # Two tensors, so that both are aligned: Triton would compile anew for a view that is not.
            tile_expert, tile_slot = (self.common["token"].new_empty(row_tiles) for _ in range(2))
            schedule = {"tile_expert": tile_expert, "tile_slot": tile_slot, "row_tiles": row_tiles}
            tiles = Tiles(rows, 1, 1, 4, 1)
            grid = self.experts + 1 if row_tiles else 0
            self.launch(schedule_kernel, grid, tiles, 1, schedule | {"BLOCK_X": 128})
            self.schedules[rows] = schedule
        return self.schedules[rows]

    def sum_slots(self, rows: Tensor) -> Tensor:
        out = rows.new_empty((self.tokens, self.hidden))
        columns = min(1024, next_power_of_2(max(self.hidden, 1)))
        grid = self.tokens * cdiv(self.hidden, columns)
        self.launch(sum_slots_kernel, grid, Tiles(1, columns, 1, 4, 2), columns, {"rows": rows, "out": out})
        return out


def _grad_rows(p: _Problem, grad_hidden: Tensor) -> Tensor:
    rows = p.x.new_empty((p.slots, p.hidden))
    tiles = p.config.grad_rows
    tensors = {
        "grad_hidden": p.described(grad_hidden, tiles.rows, tiles.depth),
        "gate_up": p.described(p.gate_up, 1, tiles.depth, tiles.columns),
        "rows": rows,
    }
    p.launch_on_rows(grad_rows_kernel, tiles, tiles.columns, p.hidden, tensors)
    return rows


def _grad_weight(p: _Problem, grad_y: Tensor, weight_parts: Tensor) -> Tensor:
    grad_weight = torch.empty_like(p.weight)
    tiles = Tiles(16, 128, 1, 4, 2)
    schedule = p.schedule(tiles.rows)
    tensors = {
        "grad_y": grad_y,
        "weight_parts": weight_parts,
        "parts": len(weight_parts),
        "grad_weight": grad_weight,
    }
    p.launch(grad_weight_kernel, schedule["row_tiles"], tiles, tiles.columns, schedule | tensors)
    return grad_weight


def _grad_matrix(p: _Problem, matrices: Tensor, left: Tensor, right: Tensor, left_of_tokens: bool) -> Tensor:
    grad_matrix = torch.empty_like(matrices)
    tiles = p.config.grad_matrix
    experts, height, width = matrices.shape
    arguments = {
        "left": left,
        "right": right,
        "grad_matrix": grad_matrix,
        "SIZE_M": height,
        "SIZE_N": width,
        "LEFT_OF_TOKENS": left_of_tokens,
    }
    grid = experts * cdiv(height, tiles.rows) * cdiv(width, tiles.columns)
    p.launch(grad_matrix_kernel, grid, tiles, tiles.columns, arguments)
    return grad_matrix


def _grad_bias(p: _Problem, rows: Tensor, of_tokens: bool) -> Tensor:
    width = rows.shape[1]
    grad_bias = rows.new_empty((p.experts, width))
    tiles = Tiles(32, 64, 1, 4, 3)
    arguments: dict[str, Any] = {"rows": rows, "grad_bias": grad_bias, "SIZE_N": width}
    if not of_tokens:
        arguments |= {"token": None, "weight": None}
    grid = p.experts * cdiv(width, tiles.columns)
    p.launch(grad_bias_kernel, grid, tiles, tiles.columns, arguments)
    return grad_bias

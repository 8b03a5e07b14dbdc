"""The language-model head and its loss on NVIDIA GPUs: prepares tensors, chooses tiles, launches the kernels.

Shapes: T tokens, H features, V words.

How many rows have a label only the GPU knows, and the host does not wait to learn it: rows with a label come
first in a list of all rows, and programs beyond the last of them return at once. The products are therefore
the kernels' own: cuBLAS would multiply every row, labelled or not, or have to be told how many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyvlm.triton_kernels.common import DTYPES, PRECISION, capability, cdiv, launch
from pyvlm.triton_kernels.loss_kernels import (
    combine_kernel,
    grad_bias_kernel,
    grad_hidden_kernel,
    grad_logits_kernel,
    grad_weight_kernel,
    statistics_kernel,
)
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """A tile of a product, the terms that are added at once, and the warps and loads in flight for it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """Which tiles each kernel takes.

    Attributes:
        statistics, grad_logits: of the kernels that make logits.
        grad_hidden, grad_weight: of the products of the backward.
        room: numbers that the gradients of logits take together: 32 MiB in half precision. More where there
            are so many rows that `least` words of each take more.
        block, least: the most and the fewest words whose gradients are there at once, a twentieth and an
            eightieth of a vocabulary of 152,000. With 2,048 words of 2,048 features grad_weight has a tile of
            128 by 256 for each multiprocessor of an H100.
        unit: blocks of words are multiples of it, and it is one of the tiles' sides along words.
        group: row tiles that are worked on together, column by column.

    Raises:
        ValueError: `unit` is no such multiple, `block` or `least` none of it, or grad_logits' columns are
            none of grad_hidden's depth: something would be read that nobody has written.
    """

    statistics: Tiles
    grad_logits: Tiles
    grad_hidden: Tiles
    grad_weight: Tiles
    room: int = 2**24
    block: int = 8192
    least: int = 2048
    unit: int = 256
    group: int = 8

    def __post_init__(self) -> None:
        written, *read = self.grad_logits.columns, self.grad_hidden.depth, self.grad_weight.rows
        sides_fit = not any(self.unit % side for side in (written, *read)) and written % read[0] == 0
        if not sides_fit or any(words % self.unit or words < self.unit for words in (self.block, self.least)):
            raise ValueError(
                f"grad_logits makes tiles of {written} words, grad_hidden and grad_weight take {read[0]} and "
                f"{read[1]}, in units of {self.unit} and blocks of {self.least} to {self.block}: expected "
                "units to be multiples of tiles, blocks of units, and grad_logits' words of grad_hidden's"
            )


# Chosen so that ahead-of-time compilation spills no registers (tests/fusion/loss_triton_aot.json shows what
# each takes); not yet measured on a GPU.
_LARGE = Tiles(128, 256, 64, 8, 4)
_HOPPER_AND_BLACKWELL = Config(_LARGE, Tiles(128, 128, 64, 8, 4), _LARGE, _LARGE)
_OTHER = Config(*[Tiles(128, 128, 32, 8, 4)] * 4)
_FLOAT32 = Config(*[Tiles(128, 64, 32, 8, 3)] * 4)
_INTERPRETER = Config(*[Tiles(64, 64, 64, 4, 1)] * 4, room=2**14, block=512, least=128, unit=64)
# Of the words, those that may wait for the sums: the gradients of their logits are made twice.
_MOST_THAT_WAIT = 1 / 4


def default_config(dtype: torch.dtype, capability: tuple[int, int] | None) -> Config:
    """The tiles for a dtype and a compute capability (None: Triton's interpreter)."""
    if capability is None:
        return _INTERPRETER
    if dtype == torch.float32:
        return _FLOAT32
    return _HOPPER_AND_BLACKWELL if capability[0] in (9, 10, 11) else _OTHER


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    bias: Tensor | None,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    mean: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """The op `pyvlm::linear_cross_entropy`, of arguments that `pyvlm.ops.linear_cross_entropy` has checked.

    Args:
        hidden: `[T, H]`, fp32, bf16 or fp16.
        weight: `[V, H]`.
        labels: int64 `[T]`; one outside the vocabulary is an error on the GPU, as in torch's cross-entropy.
        ignore_index: the label of rows that have none.
        bias: `[V]` or None.
        softcap: 0 for none.
        label_smoothing, z_loss, mean: as for `pyvlm.ops.linear_cross_entropy`.
        config: tiles other than the default ones, for tests and measurements.

    Returns:
        The loss, a float32 scalar, and log Z float32 `[T]`, 0 for rows without a label.

    Raises:
        TypeError: a dtype that the kernels do not have (float64).
    """
    p = _Problem(hidden, weight, labels, ignore_index, bias, softcap, label_smoothing, z_loss, config)
    torch._assert_async(
        (~p.labeled | ((labels >= 0) & (labels < p.words))).all(),
        "linear_cross_entropy: a label is neither ignore_index nor a word of the vocabulary",
    )
    tiles = p.config.statistics
    half_tiles = 2 * cdiv(p.words, tiles.columns)
    lse = torch.zeros(p.tokens, dtype=torch.float32, device=hidden.device)
    losses = torch.zeros_like(lse)
    sums = [lse.new_empty(half_tiles, p.tokens) for _ in range(3 if label_smoothing > 0 else 2)]
    tensors = {
        "largest": sums[0],
        "exponentials": sums[1],
        "logit_sums": sums[2] if label_smoothing > 0 else None,
        "targets": torch.empty_like(lse),
        "lse": lse,
        "losses": losses,
        "HALF_TILES": half_tiles,
    }
    with torch.cuda.device_of(hidden):
        p.launch_on_rows(statistics_kernel, tiles, p.words, tensors)
        rows = Tiles(32, 1, 1, 4, 1)
        p.launch(combine_kernel, cdiv(p.tokens, rows.rows), rows, tensors)
    loss = losses.sum()
    return (loss / p.count.clamp(min=1) if mean else loss).reshape(()), lse


def linear_cross_entropy_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    bias: Tensor | None,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    mean: bool,
    lse: Tensor,
    needs: Sequence[bool],
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `pyvlm::linear_cross_entropy_backward`: gradients for a cotangent of the loss.

    The further arguments are those of the forward, and its lse; bitwise deterministic. Beside the results it
    takes `config.room` gradients of logits, and float32 sums `[T, H]` where these would take more than a
    quarter of grad_weight's own memory (see `loss_kernels`) or that is not wanted.

    Args:
        needs: which of the results are wanted; the others are empty, and cost nothing.

    Returns:
        grad_hidden, grad_weight and grad_bias.
    """
    p = _Problem(hidden, weight, labels, ignore_index, bias, softcap, label_smoothing, z_loss, config)
    wants_hidden, wants_weight, wants_bias = needs[0], needs[1], needs[2] and bias is not None
    results = (
        hidden.new_zeros(hidden.shape if wants_hidden else 0),
        hidden.new_empty(weight.shape if wants_weight else 0),
        hidden.new_empty(p.words if wants_bias else 0),
    )
    if not (wants_hidden or wants_weight or wants_bias):
        return results
    tiles, narrowest = p.config, p.width(p.tokens)
    blocks = cdiv(p.words, narrowest)
    adds_up = wants_hidden and blocks > 1
    in_weight = 4 // hidden.element_size()  # numbers of grad_weight that take the place of a sum
    if adds_up and wants_weight and in_weight * p.tokens <= _MOST_THAT_WAIT * p.words:
        flat = results[1].view(-1)
        sums = flat[: len(flat) // in_weight * in_weight].view(torch.float32)
    else:
        sums, in_weight = lse.new_empty(hidden.shape if adds_up else 0), 0
    tensors: dict[str, Any] = {
        "lse": lse.contiguous(),
        "scale": (grad_loss.float() / p.count.clamp(min=1) if mean else grad_loss.float()).reshape(1),
        "grads": hidden.new_empty(min(p.tokens * p.block, p.room * tiles.unit)),
        "sums": sums,
        "in_weight": in_weight,
        "grad_hidden": results[0],
        "grad_weight": results[1],
        "grad_bias": results[2],
        "again": 0,
    }

    def grad_logits() -> None:
        t = tiles.grad_logits
        columns = p.block // t.columns
        full = p.room * tiles.unit // (t.rows * t.columns)  # tiles that the room has
        p.launch(grad_logits_kernel, min(full + columns, cdiv(p.tokens, t.rows) * columns), t, tensors)

    def grad_weight() -> None:
        t = tiles.grad_weight
        grid = cdiv(p.block, t.rows) * cdiv(p.features, t.columns)
        p.launch(grad_weight_kernel, grid, t, tensors)

    with torch.cuda.device_of(hidden):
        for index in range(blocks):
            tensors["index"] = index
            grad_logits()
            if wants_hidden:
                p.launch_on_rows(grad_hidden_kernel, tiles.grad_hidden, p.features, tensors)
            if wants_weight:
                grad_weight()
            if wants_bias:
                t = Tiles(32, 128, 1, 4, 2)
                p.launch(grad_bias_kernel, cdiv(p.block, t.columns), t, tensors)
        if in_weight:
            tensors["again"] = 1
            # Of the sums a row takes in_weight words; they begin at 32 bytes. The last block does not wait.
            for index in range(cdiv(in_weight * p.tokens + 18, narrowest)):
                tensors["index"] = -2 - index
                grad_logits()
                grad_weight()
    return results


class _Problem:
    """The inputs that forward and backward share, and what kernels are told about them."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        bias: Tensor | None,
        softcap: float,
        label_smoothing: float,
        z_loss: float,
        config: Config | None,
    ) -> None:
        if hidden.dtype not in DTYPES:
            raise TypeError(
                f"the Triton kernels of linear_cross_entropy take {', '.join(map(str, DTYPES))}; hidden is "
                f'{hidden.dtype}: use backend="reference"'
            )
        self.hidden = hidden.contiguous()
        self.tokens, self.features = hidden.shape
        self.words = len(weight)
        self.config = config or default_config(hidden.dtype, capability(hidden.device))
        unit = self.config.unit
        self.block = min(self.config.block, cdiv(self.words, unit) * unit)
        least = self.tokens * min(self.config.least, self.block)
        self.room = max(self.config.room, least) // unit  # in numbers of `unit`
        self.labeled = labels != ignore_index
        self.count = self.labeled.sum(dtype=torch.int32)
        rows = (~self.labeled).to(torch.uint8).sort(stable=True).indices
        self.common: dict[str, Any] = {
            "hidden": self.hidden,
            "weight": weight.contiguous(),
            "bias": None if bias is None else bias.contiguous(),
            "labels": labels.contiguous(),
            "rows": rows.to(torch.int32),
            "count": self.count,
            "tokens": self.tokens,
            "features": self.features,
            "smoothing": label_smoothing,
            "z_loss": z_loss,
            "room": self.room,
            "BLOCK_V": self.block,
            "UNIT": self.config.unit,
            "SIZE_H": self.features,
            "SIZE_V": self.words,
            "SOFTCAP": softcap,
            "PRECISION": PRECISION,
            "GROUP": self.config.group,
        }

    def width(self, labeled: int) -> int:
        """Words of a block where so many rows have a label, as `block_of` has them."""
        unit = self.config.unit
        return min(self.room // max(labeled, 1), self.block // unit) * unit

    def launch(self, kernel: Any, grid: int, tiles: Tiles, tensors: dict[str, Any]) -> None:
        blocks = {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_K": tiles.depth}
        launch(kernel, (grid,), tiles, self.common | blocks | tensors)

    def launch_on_rows(self, kernel: Any, tiles: Tiles, width: int, tensors: dict[str, Any]) -> None:
        """Runs a kernel on all tiles of rows, and of `tiles.columns` of a result of some width."""
        row_tiles = cdiv(self.tokens, tiles.rows)
        grid = row_tiles * cdiv(width, tiles.columns)
        self.launch(kernel, grid, tiles, tensors | {"row_tiles": row_tiles})

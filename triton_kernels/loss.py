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
        block: words whose gradients are there at once: a twentieth of a vocabulary of 152,000. A multiple of
            every tile's sides, and grad_logits' columns one of grad_hidden's depth: see `loss_kernels`.
        group: row tiles that are worked on together, column by column.
    """

    statistics: Tiles
    grad_logits: Tiles
    grad_hidden: Tiles
    grad_weight: Tiles
    block: int = 8192
    group: int = 8


# Chosen so that ahead-of-time compilation spills no registers (tests/fusion/loss_triton_aot.json shows what
# each takes); not yet measured on a GPU.
_LARGE = Tiles(128, 256, 64, 8, 4)
_HOPPER_AND_BLACKWELL = Config(_LARGE, Tiles(128, 128, 64, 8, 4), _LARGE, _LARGE)
_OTHER = Config(*[Tiles(128, 128, 32, 8, 4)] * 4)
_FLOAT32 = Config(*[Tiles(128, 64, 32, 8, 3)] * 4)
_INTERPRETER = Config(*[Tiles(64, 64, 64, 4, 1)] * 4, block=512)


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
    takes the gradients of `config.block` words' logits and, where there are more words, float32 `[T, H]`.

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
    block, tiles = p.config.block, p.config
    several = p.words > block
    tensors: dict[str, Any] = {
        "lse": lse.contiguous(),
        "scale": (grad_loss.float() / p.count.clamp(min=1) if mean else grad_loss.float()).reshape(1),
        "grads": p.hidden.new_empty(p.tokens, block),
        "sums": lse.new_empty(hidden.shape) if wants_hidden and several else None,
        "grad_hidden": results[0],
        "grad_weight": results[1],
        "grad_bias": results[2],
    }
    with torch.cuda.device_of(hidden):
        for first in range(0, p.words, block):
            words = min(block, p.words - first)
            tensors |= {"first_word": first, "words": words}
            p.launch_on_rows(grad_logits_kernel, tiles.grad_logits, words, tensors)
            if wants_hidden:
                ends = {"FIRST": first == 0, "LAST": first + words == p.words}
                p.launch_on_rows(grad_hidden_kernel, tiles.grad_hidden, p.features, tensors | ends)
            if wants_weight:
                t = tiles.grad_weight
                grid = cdiv(words, t.rows) * cdiv(p.features, t.columns)
                p.launch(grad_weight_kernel, grid, t, tensors)
            if wants_bias:
                t = Tiles(32, 128, 1, 4, 2)
                p.launch(grad_bias_kernel, cdiv(words, t.columns), t, tensors)
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
            "BLOCK_V": self.config.block,
            "SIZE_H": self.features,
            "SIZE_V": self.words,
            "SOFTCAP": softcap,
            "PRECISION": PRECISION,
            "GROUP": self.config.group,
        }

    def launch(self, kernel: Any, grid: int, tiles: Tiles, tensors: dict[str, Any]) -> None:
        blocks = {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_K": tiles.depth}
        launch(kernel, (grid,), tiles, self.common | blocks | tensors)

    def launch_on_rows(self, kernel: Any, tiles: Tiles, width: int, tensors: dict[str, Any]) -> None:
        """Runs a kernel on all tiles of rows, and of `tiles.columns` of a result of some width."""
        row_tiles = cdiv(self.tokens, tiles.rows)
        grid = row_tiles * cdiv(width, tiles.columns)
        self.launch(kernel, grid, tiles, tensors | {"row_tiles": row_tiles})

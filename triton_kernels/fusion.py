"""Merging the levels of an encoder on NVIDIA GPUs: prepares tensors, chooses tiles and launches.

Shapes: L levels, N images, T tokens, C channels, H output features, R = N·T rows.

One projection for all levels comes out of their sum: a kernel reads each level once and writes one row of C
channels a token, and cuBLAS multiplies that. Projections of their own need every level normalised: the same
kernel writes a few levels side by side, [R, levels · C], and cuBLAS multiplies them by as many projections,
copied next to each other, in one product, which sums over the levels in float32. A product that normalised
while it loads would save that buffer's traffic, 4 bytes for every 2H floating-point operations (a third of
the product's time where H = 1024, less where a few levels fit the L2 cache), but would do so again for every
tile of columns, and without cuBLAS.

In the backward, all that the parameters need of the rows is Σ dm ⊙ v̂_l, Σ dm and Σ grad_out; the rest are
sums of some [L, C] numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyvlm.triton_kernels.common import DTYPES, cdiv, launch, multiprocessors, next_power_of_2
from pyvlm.triton_kernels.fusion_levels import merge_backward_kernel, merge_kernel, table_kernel
from torch import Tensor

MAX_CHANNELS = 32768  # a row of more does not fit the registers of a program


@dataclass(frozen=True)
class Tiles:
    """Rows of a tile, and the warps that work on it."""

    rows: int
    warps: int
    stages: int = 1  # the next level is loaded ahead by hand


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        forward, backward: their tiles.
        resident_warps: of the backward's programs on a multiprocessor. Each program leaves rows of sums.
        levels: projections of their own are taken so many at once.
    """

    forward: Tiles
    backward: Tiles
    resident_warps: int
    levels: int = 8


def default_config(channels: int, sums_of_levels: bool) -> Config:
    """The tiles for rows of some channels; whether the backward has sums over rows to keep for each level.

    Chosen so that ahead-of-time compilation spills no registers (tests/fusion/fusion_triton_aot.json shows
    what each takes), and to take few instructions: 9 a value forward and 15 backward with 1,024 channels in
    bfloat16, where an H200 has time for 12 and 25 while it reads and writes; not yet measured on a GPU.
    A warp or two to a row keep sums over a row among few threads. Sums of levels are read and written once a
    tile: then more rows share that. All programs of the backward run at once, or the last of them would have
    the GPU to themselves, and too few loads in flight for its memory: 8 warps fit a multiprocessor whatever
    registers they take, and 12 of those that share a row in twos (the table shows 168 registers).
    """
    columns = next_power_of_2(max(channels, 1))
    backward = _tiles(columns, 4, 32) if sums_of_levels else _tiles(columns, 2, 16)
    return Config(_tiles(columns, 1, 32), backward, resident_warps=12 if backward.warps <= 2 else 8)


def _tiles(columns: int, warps: int, values: int) -> Tiles:
    """Tiles of so many values a thread, of more warps where a row alone has more."""
    warps = min(max(warps, columns // (32 * values)), 32)
    rows = min(max(warps * 32 * values // columns, 1), 64)
    return Tiles(rows, warps)


def merge_levels(
    levels: Sequence[Tensor],
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    keep_statistics: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `pyvlm::merge_levels`, of arguments that `pyvlm.ops.merge_levels` has checked.

    Args:
        levels: L maps `[N, T, C]`, fp32, bf16 or fp16. Images and tokens may have any strides, and each level
            its own; channels that are not contiguous are copied.
        alpha: `[L]`.
        weight, bias: `[H, C]` and `[H]`, or `[L, H, C]` and `[L, H]`.
        ln_weight, ln_bias: `[C]` or `[L, C]`.
        eps: of the norms.
        keep_statistics: whether the backward will want the statistics.
        config: other than the default one, for tests and measurements.

    Returns:
        `[N, T, H]`; mean and rstd, fp32 `[L, N·T]`, or two empty tensors.

    Raises:
        TypeError: a dtype that the kernels do not have (float64).
        ValueError: rows of more than MAX_CHANNELS channels.
    """
    p = _Problem(levels, alpha, weight, ln_weight, ln_bias, config)
    statistics = (len(p.levels), p.rows) if keep_statistics else 0
    mean, rstd = (alpha.new_empty(statistics, dtype=torch.float32) for _ in range(2))
    out = alpha.new_zeros(p.features) if bias is None else p.summed(bias).to(alpha.dtype)
    with torch.cuda.device_of(alpha):
        tensors: dict[str, Any] = {"table": p.table([]), "mean": None, "rstd": None}
        if keep_statistics:
            tensors |= {"mean": mean, "rstd": rstd}
        for first, depth, groups in p.chunks():
            merged = alpha.new_empty((p.rows, groups, p.channels))
            chunk = {"merged": merged, "first": first, "depth": depth, "eps": eps}
            grid = (p.row_tiles(p.config.forward), groups)
            p.launch(merge_kernel, grid, p.config.forward, tensors | chunk)
            projection = p.weight[first : first + groups].transpose(0, 1).flatten(1)
            out = torch.addmm(out, merged.flatten(1), projection.t())
    return out.view(*levels[0].shape[:2], p.features), mean, rstd


def merge_levels_backward(
    grad_out: Tensor,
    levels: Sequence[Tensor],
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
    config: Config | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `pyvlm::merge_levels_backward`: gradients of `merge_levels` for a cotangent of its output.

    The further arguments are those of the forward, and the statistics that it kept; bitwise deterministic.

    Args:
        needs: which are wanted of the gradients of the levels (all or none), alpha, weight, bias, ln_weight
            and ln_bias; the others are empty, and cost nothing.

    Returns:
        These gradients, the first of them a list, and contiguous.
    """
    p = _Problem(levels, alpha, weight, ln_weight, ln_bias, config)
    wants_levels, wants_alpha, wants_weight, wants_bias, wants_ln_weight, wants_ln_bias = needs
    grad_out = grad_out.reshape(p.rows, p.features)
    grad_levels = [v.new_empty(v.shape) for v in levels] if wants_levels else []
    grad_weight = weight.new_empty(weight.shape if wants_weight else 0)
    wants_bias_sums = wants_ln_bias or (wants_alpha and ln_bias is not None)
    wanted = (wants_alpha, wants_ln_weight, wants_bias_sums)
    alpha_sums = weight_sums = bias_sums = alpha.new_empty(0, dtype=torch.float32)
    if wants_levels or wants_weight or any(wanted):
        statistics = {"mean": mean, "rstd": rstd}
        alpha_sums, weight_sums, bias_sums = _sums_over_rows(
            p, grad_out, statistics, grad_levels, grad_weight if wants_weight else None, wanted
        )
    grad_alpha, alpha_L1 = alpha_sums, alpha.float()[:, None]
    # Three, as they are results of an op: none of those may be another one.
    grad_bias, grad_ln_weight, grad_ln_bias = (alpha.new_empty(0) for _ in range(3))
    if wants_ln_weight:
        grad_ln_weight = _like(weight_sums, ln_weight)
    if wants_ln_bias:
        grad_ln_bias = _like(alpha_L1 * bias_sums, ln_bias)
    if wants_alpha and ln_bias is not None:
        grad_alpha = grad_alpha + (bias_sums * ln_bias.float()).sum(1)
    if wants_bias or (wants_alpha and bias is not None):
        out_sums = grad_out.sum(0, dtype=torch.float32)
        if wants_alpha:
            grad_alpha = grad_alpha + (out_sums * bias.float()).sum(-1)
        if wants_bias:
            grad_bias = _like(alpha_L1 * out_sums, bias)
    return grad_levels, grad_alpha.to(alpha.dtype), grad_weight, grad_bias, grad_ln_weight, grad_ln_bias


def _sums_over_rows(
    p: "_Problem",
    grad_out: Tensor,
    statistics: dict[str, Tensor],
    grad_levels: Sequence[Tensor],
    grad_weight: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Writes the gradients of the levels and of the projections, where there are any, and returns those of
    three sums over rows that are wanted, in float32: Σ dm · γ_l v̂_l `[L]`, Σ dm ⊙ Σ_l α_l v̂_l, and Σ dm,
    `[1, C]` or, of each projection, `[L, C]`; the second of each level too, where each has its γ.
    """
    tiles = p.config.backward
    row_tiles = p.row_tiles(tiles)
    resident = max(1, p.config.resident_warps // tiles.warps) * multiprocessors(grad_out.device)
    sums: tuple[list[Tensor], ...] = ([], [], [])
    with torch.cuda.device_of(grad_out):
        table = p.table(grad_levels)
        for first, depth, groups in p.chunks():
            tiles_each = cdiv(row_tiles, max(1, resident // groups))
            programs = cdiv(row_tiles, max(tiles_each, 1))
            grad_merged = merged = None
            if grad_levels or any(wanted):
                grad_merged = torch.bmm(grad_out.expand(groups, -1, -1), p.weight[first : first + groups])
            if grad_weight is not None:
                merged = grad_out.new_empty((p.rows, groups, p.channels))
            rows_of_gamma = depth if p.common["ln_weights"] is not None else groups
            shapes = ((groups * depth,), (rows_of_gamma, p.channels), (groups, p.channels))
            parts = [
                grad_out.new_empty((programs, *shape), dtype=torch.float32) if wants else None
                for wants, shape in zip(wanted, shapes, strict=True)
            ]
            arguments = {
                "table": table,
                "grad_merged": grad_merged,
                "merged": merged,
                **dict(zip(("alpha_parts", "weight_parts", "bias_parts"), parts, strict=True)),
                "first": first,
                "depth": depth,
                "tiles": tiles_each,
                "GRAD_LEVELS": len(grad_levels) > 0,
            }
            p.launch(merge_backward_kernel, (programs, groups), tiles, statistics | arguments)
            if merged is not None:
                product = grad_weight.view(p.weight.shape)[first : first + groups]
                torch.bmm(grad_out.t().expand(groups, -1, -1), merged.transpose(0, 1), out=product)
            for found, part in zip(sums, parts, strict=True):
                if part is not None:
                    found.append(part.sum(0))
    return tuple(torch.cat(found) if found else grad_out.new_empty(0) for found in sums)


def _like(grad_of_levels: Tensor, parameter: Tensor) -> Tensor:
    """A gradient a level [L, ·] as that of a parameter, which the levels may share."""
    shared = parameter.dim() == 1
    return (grad_of_levels.sum(0) if shared else grad_of_levels).to(parameter.dtype)


class _Problem:
    """The inputs that forward and backward share, and what kernels are told about them."""

    def __init__(
        self,
        levels: Sequence[Tensor],
        alpha: Tensor,
        weight: Tensor,
        ln_weight: Tensor | None,
        ln_bias: Tensor | None,
        config: Config | None,
    ) -> None:
        if levels[0].dtype not in DTYPES:
            raise TypeError(
                f"the Triton kernels of merge_levels take {', '.join(map(str, DTYPES))}; the levels are "
                f'{levels[0].dtype}: use backend="reference"'
            )
        if any((v.shape, v.dtype, v.device) != (levels[0].shape, alpha.dtype, alpha.device) for v in levels):
            raise ValueError(
                "the Triton kernels of merge_levels take levels of one shape, and of the dtype and device of "
                f"alpha, {alpha.dtype} on {alpha.device}; got "
                + ", ".join(f"{list(v.shape)} {v.dtype} on {v.device}" for v in levels)
            )
        images, self.tokens, self.channels = levels[0].shape
        if self.channels > MAX_CHANNELS:
            raise ValueError(
                f"the Triton kernels of merge_levels take up to {MAX_CHANNELS} channels, and the levels have "
                f'{self.channels}: use backend="reference"'
            )
        self.rows = images * self.tokens
        self.levels = [v if v.stride(2) == 1 else v.contiguous() for v in levels]
        self.alpha = alpha.contiguous()
        self.shared = weight.dim() == 2
        self.weight = weight[None] if self.shared else weight
        self.features = weight.shape[-2]
        self.vector = _vector(self.levels)
        beta = None
        if ln_bias is not None:
            beta = self.summed(ln_bias)[None] if self.shared else self.alpha[:, None].float() * ln_bias
        gamma = None if ln_weight is None else ln_weight.contiguous()
        levels_have_gamma = gamma is not None and gamma.dim() == 2
        within_group = levels_have_gamma and self.shared
        self.config = config or default_config(self.channels, within_group)
        self.common: dict[str, Any] = {
            "alpha": self.alpha,
            "ln_weight": None if within_group else gamma,
            "ln_weights": gamma if within_group else None,
            "beta": beta,
            "rows": self.rows,
            "tokens": self.tokens,
            "SIZE_C": self.channels,
            "VECTOR": self.vector,
            "GROUPS_HAVE_GAMMA": levels_have_gamma and not self.shared,
            "BLOCK_C": next_power_of_2(max(self.channels, 1)),
        }

    def summed(self, parameter: Tensor) -> Tensor:
        """Σ_l α_l of a parameter [·] or [L, ·], in float32."""
        return (self.alpha.float()[:, None] * parameter.float()).sum(0)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """What is worked on at once: a first level, the levels of a group, and groups."""
        if self.shared:
            yield 0, len(self.levels), 1
            return
        for first in range(0, len(self.levels), self.config.levels):
            yield first, 1, min(self.config.levels, len(self.levels) - first)

    def row_tiles(self, tiles: Tiles) -> int:
        """How many tiles there are of rows; none where these hold nothing."""
        return cdiv(self.rows, tiles.rows) if self.channels else 0

    def table(self, grads: Sequence[Tensor]) -> Tensor:
        """Where the kernels find the levels, and the gradients to write; see `fusion_levels`."""
        entries: list[int] = []
        for i, v in enumerate(self.levels):
            strides = [stride // self.vector for stride in v.stride()[:2]]
            entries += [v.data_ptr(), *strides, grads[i].data_ptr() if grads else 0]
        table = self.alpha.new_empty(len(entries), dtype=torch.int64)
        arguments = {"entries": tuple(2 * entry + 3 for entry in entries), "table": table}
        launch(table_kernel, (1,), Tiles(1, 1), arguments)
        return table

    def launch(self, kernel: Any, grid: tuple[int, int], tiles: Tiles, arguments: dict[str, Any]) -> None:
        launch(kernel, grid, tiles, self.common | {"BLOCK_R": tiles.rows} | arguments)


def _vector(levels: Sequence[Tensor]) -> int:
    """How many elements all addresses and strides are multiples of: a power of two, at most 16 bytes."""
    size = levels[0].element_size()
    vector = 16 // size
    while any(v.data_ptr() % (vector * size) or any(s % vector for s in v.stride()[:2]) for v in levels):
        vector //= 2
    return vector

"""Fusion of encoder features in plain PyTorch: what every kernel of `pyvlm.ops.fusion` is held to.

Shapes: N images · T tokens of a map, row-major · C channels of a map · H output features. A grid is (rows,
columns). Norms, sums over levels and resizing run in float32 for half-precision inputs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def merge_levels(
    levels: Sequence[Tensor],
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Σ_l α_l (W_l · LN_l(v_l) + b_l). One W for all levels comes out of the sum: one product."""
    dtype = accumulator(levels[0].dtype)
    num_levels, channels = len(levels), levels[0].shape[-1]
    alpha, weight = alpha.to(dtype), weight.to(dtype)
    gammas = [None] * num_levels if ln_weight is None else ln_weight.to(dtype).expand(num_levels, channels)
    betas = [None] * num_levels if ln_bias is None else ln_bias.to(dtype).expand(num_levels, channels)
    scaled = [
        a * F.layer_norm(v_NTC.to(dtype), (channels,), gamma, beta, eps)
        for a, v_NTC, gamma, beta in zip(alpha, levels, gammas, betas, strict=True)
    ]
    if weight.dim() == 2:
        out_NTH = F.linear(torch.stack(scaled).sum(0), weight)
    else:
        out_NTH = torch.stack([F.linear(x, w) for x, w in zip(scaled, weight, strict=True)]).sum(0)
    if bias is not None:
        out_NTH = out_NTH + (alpha[:, None] * bias.to(dtype)).sum(0)
    return out_NTH.to(levels[0].dtype)


def resize_map(
    x_NTC: Tensor,
    grid: tuple[int, int],
    target: tuple[int, int],
    mode: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """A row-major map of `grid` brought to `target`; untouched where the two agree."""
    if grid == target:
        return x_NTC
    x_NChw = x_NTC.to(accumulator(x_NTC.dtype)).transpose(1, 2).unflatten(2, grid)
    resized = F.interpolate(
        x_NChw, size=target, mode=mode, align_corners=align_corners if mode == "bilinear" else None
    )
    return resized.flatten(2).transpose(1, 2).to(x_NTC.dtype)


def fuse_grids(
    features: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    target: tuple[int, int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """Every map on the target grid, channels side by side, then one projection (none without a weight)."""
    fused = torch.cat(
        [resize_map(x, grid, target, mode, align_corners) for x, grid in zip(features, grids, strict=True)],
        dim=-1,
    )
    return fused if weight is None else F.linear(fused, weight, bias)


def patches_to_token(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    patches: Sequence[int],
    biases: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Each expert's patches, m by m, projected to one token; the experts' tokens one after another."""
    biases = [None] * len(features) if biases is None else biases
    tokens = [
        F.linear(x_NTC.reshape(x_NTC.shape[0], x_NTC.shape[1] // m, m * x_NTC.shape[2]), weight, bias)
        for x_NTC, weight, m, bias in zip(features, weights, patches, biases, strict=True)
    ]
    return torch.cat(tokens, dim=1)

"""Fusion of several encoders, levels and grids into one token sequence: the public functions.

Shapes: N images · T tokens of a map, row-major, without CLS · C channels of a map · H output features. A grid
is (rows, columns).
Every function raises TypeError for a wrong dtype and ValueError for a wrong shape, device or option, naming
the argument. `backend` is "auto" or a name in `pyvlm.ops._backends`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyvlm.ops._backends import resolve
from pyvlm.ops._checks import Shapes, as_grid, as_list
from pyvlm.reference import fusion as reference

RESIZE_MODES = ("bilinear", "nearest", "area")


def merge_levels(
    levels: Sequence[Tensor] | Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Merges levels (layers) of one encoder: Σ_l α_l (W_l · LN_l(v_l) + b_l).

    Source: "From CLIP to DINO: Visual Encoders Shout in Multi-modal Large Language Models" (COMM, arXiv
    2310.08825).

    Args:
        levels: L maps [N, T, C], as a sequence or stacked [L, N, T, C].
        alpha: [L], the weight of each level as it is used (a softmax over them is the caller's).
        weight, bias: [H, C] and [H], shared by all levels, or [L, H, C] and [L, H]; no bias where None.
        ln_weight, ln_bias: LayerNorm's γ and β, [C] or [L, C]; 1 and 0 where None.
        eps: LayerNorm's ε.

    Returns:
        [N, T, H] in the dtype of the levels.
    """
    levels = as_list("merge_levels", "levels", levels)
    shapes = Shapes("merge_levels")
    for i, level in enumerate(levels):
        shapes.check(f"levels[{i}]", level, "NTC")
    shapes.sizes["L"] = len(levels)
    shapes.check("alpha", alpha, "L").check("weight", weight, "HC", "LHC").check("bias", bias, "H", "LH")
    shapes.check("ln_weight", ln_weight, "C", "LC").check("ln_bias", ln_bias, "C", "LC")
    implementation = resolve("merge_levels", backend, alpha.device)
    if implementation == "reference":
        return reference.merge_levels(levels, alpha, weight, bias, ln_weight, ln_bias, eps)
    parameters = (alpha, weight, bias, ln_weight, ln_bias)
    keep_statistics = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*levels, *parameters)
    )
    out, _, _ = _Triton.apply(*parameters, eps, keep_statistics, *levels)
    return out


def fuse_grids(
    features: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    target: tuple[int, int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Brings maps of several encoders to one grid, concatenates their channels in order, and projects them.

    The form of Eagle (arXiv 2408.15998; bilinear with `align_corners=True`), Prismatic (2402.07865),
    DeepSeek-VL (2403.05525) and ViP-LLaVA (2312.00784). A map that is on the target grid already passes
    untouched. No antialiasing.

    Args:
        features: one map [N, h_i·w_i, C_i] an encoder.
        grids: (h_i, w_i) of each map.
        target: (h, w) of the result.
        weight, bias: [H, ΣC_i] and [H]; without a weight the concatenation itself is returned.
        mode: "bilinear", "nearest" or "area".
        align_corners: for "bilinear" only, as in `torch.nn.functional.interpolate`.

    Returns:
        [N, h·w, H], or [N, h·w, ΣC_i] without a weight.
    """
    features = as_list("fuse_grids", "features", features)
    if len(grids) != len(features):
        raise ValueError(f"fuse_grids: {len(features)} features but {len(grids)} grids; give one grid a map")
    if mode not in RESIZE_MODES:
        raise ValueError(
            f"fuse_grids: mode={mode!r} is unknown; expected one of {', '.join(map(repr, RESIZE_MODES))}"
        )
    if align_corners and mode != "bilinear":
        raise ValueError(f'fuse_grids: align_corners=True needs mode="bilinear", not {mode!r}')
    if bias is not None and weight is None:
        raise ValueError("fuse_grids: a bias was given without a weight; give both or neither")
    grids = [as_grid("fuse_grids", f"grids[{i}]", grid) for i, grid in enumerate(grids)]
    target = as_grid("fuse_grids", "target", target)
    shapes = Shapes("fuse_grids")
    channels = 0
    for i, (feature, grid) in enumerate(zip(features, grids, strict=True)):
        shapes.check(f"features[{i}]", feature, "NTC")
        if feature.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"fuse_grids: features[{i}] has {feature.shape[1]} tokens, but its grid {grid} has "
                f"{grid[0] * grid[1]}; drop CLS and register tokens, or name the right grid"
            )
        channels += feature.shape[2]
        shapes.forget("T", "C")
    shapes.sizes["C"] = channels
    shapes.check("weight", weight, "HC").check("bias", bias, "H")
    resolve("fuse_grids", backend, features[0].device)
    return reference.fuse_grids(features, grids, target, weight, bias, mode, align_corners)


def patches_to_token(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    patches: Sequence[int],
    biases: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Projects m consecutive patches of each expert to one token; the experts' tokens follow one another.

    Source: "MouSi: Poly-Visual-Expert Vision-Language Models" (arXiv 2401.17221), MLP projection fusion. The
    order of the experts is the order of `features`.

    Args:
        features: one map [N, T_i, C_i] an expert.
        weights: [H, m_i·C_i] an expert; columns are patch by patch.
        patches: m_i of each expert; it divides T_i.
        biases: [H] or None an expert; none at all where None.

    Returns:
        [N, ΣT_i/m_i, H].
    """
    op = "patches_to_token"
    features = as_list(op, "features", features)
    for name, given in (("weights", weights), ("patches", patches), ("biases", biases)):
        if given is not None and len(given) != len(features):
            raise ValueError(
                f"{op}: {len(features)} features but {len(given)} {name}, expected one an expert"
            )
    shapes = Shapes(op)
    for i, (feature, weight, m) in enumerate(zip(features, weights, patches, strict=True)):
        shapes.check(f"features[{i}]", feature, "NTC")
        if m < 1 or feature.shape[1] % m:
            raise ValueError(
                f"{op}: patches[{i}] is {m}, which does not divide the {feature.shape[1]} tokens of "
                f"features[{i}]"
            )
        shapes.forget("T", "C")
        shapes.sizes["C"] = m * feature.shape[2]
        shapes.check(f"weights[{i}]", weight, "HC").forget("C")
        shapes.check(f"biases[{i}]", None if biases is None else biases[i], "H")
    resolve(op, backend, features[0].device)
    return reference.patches_to_token(features, weights, patches, biases)


class _Triton(torch.autograd.Function):
    """`merge_levels` by the Triton kernels; the levels come last, since a list of them would not be seen."""

    @staticmethod
    def forward(
        alpha: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ln_weight: Tensor | None,
        ln_bias: Tensor | None,
        eps: float,
        keep_statistics: bool,
        *levels: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from pyvlm.triton_kernels import fusion  # not before it is needed: Triton takes a second to import

        return fusion.merge_levels(levels, alpha, weight, bias, ln_weight, ln_bias, eps, keep_statistics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        parameters, levels, statistics = inputs[:5], inputs[7:], output[1:]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters, *statistics, *levels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        from pyvlm.triton_kernels import fusion

        alpha, weight, bias, ln_weight, ln_bias, mean, rstd, *levels = ctx.saved_tensors
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = [any(ctx.needs_input_grad[7:]), *ctx.needs_input_grad[:5]]
        of_levels, *grads = fusion.merge_levels_backward(
            grad_out, levels, alpha, weight, bias, ln_weight, ln_bias, mean, rstd, needs
        )
        found = [grad if needed else None for grad, needed in zip(grads, needs[1:], strict=True)]
        return (*found, None, None, *(of_levels or [None] * len(levels)))

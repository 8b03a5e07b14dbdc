"""Fusion of the maps of several encoders into one sequence: the public functions.

Shapes: N images · T tokens of a map, row-major, without CLS · C channels of a map · H output features. A grid
is (rows, columns).
Every function raises TypeError for a wrong dtype and ValueError for a wrong shape, device or option, naming
the argument. `backend` is "auto" or a name in `pyvlm.ops._backends`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvlm import _native
from pyvlm.ops._backends import refuse_second_derivative, resolve
from pyvlm.ops._checks import Shapes, as_grid, as_list
from pyvlm.reference import fusion as reference

RESIZE_MODES = ("bilinear", "nearest", "area")


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
    untouched. No antialiasing. The native op never makes the concatenation where there is a weight: each map
    is projected by its own columns, before it is resized where it has fewer tokens than the target and no
    fewer channels than the result.

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
    if resolve("fuse_grids", backend, features[0].device) == "reference":
        return reference.fuse_grids(features, grids, target, weight, bias, mode, align_corners)
    sides = [side for grid in grids for side in grid]
    y: Tensor = torch.ops.pyvlm.fuse_grids(features, sides, target, weight, bias, mode, align_corners)
    return y


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
    if resolve(op, backend, features[0].device) == "reference":
        return reference.patches_to_token(features, weights, patches, biases)
    given = [None] * len(features) if biases is None else biases
    present = [w.new_empty(0) if b is None else b for w, b in zip(weights, given, strict=True)]
    y: Tensor = torch.ops.pyvlm.patches_to_token(features, weights, present, patches)
    return y


# ---- the torch side of fuse_grids and patches_to_token


def _fake_fuse_grids(
    features: list[Tensor],
    grids: list[int],
    target: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mode: str,
    align_corners: bool,
) -> Tensor:
    width = sum(x.shape[2] for x in features) if weight is None else weight.shape[0]
    return features[0].new_empty((features[0].shape[0], target[0] * target[1], width))


def _fake_fuse_grids_backward(
    grad_y: Tensor,
    features: list[Tensor],
    grids: list[int],
    target: list[int],
    weight: Tensor | None,
    mode: str,
    align_corners: bool,
    needs: list[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    *needs_features, needs_weight, needs_bias = needs
    return (
        _fake_gradients(grad_y, features, needs_features),
        grad_y.new_empty(weight.shape if needs_weight and weight is not None else 0),
        grad_y.new_empty(grad_y.shape[-1:] if needs_bias else 0),
    )


def _fake_patches_to_token(
    features: list[Tensor], weights: list[Tensor], biases: list[Tensor], patches: list[int]
) -> Tensor:
    tokens = sum(x.shape[1] // m for x, m in zip(features, patches, strict=True))
    return features[0].new_empty((features[0].shape[0], tokens, weights[0].shape[0]))


def _fake_patches_to_token_backward(
    grad_y: Tensor, features: list[Tensor], weights: list[Tensor], patches: list[int], needs: list[bool]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    count = len(features)
    return (
        _fake_gradients(grad_y, features, needs[:count]),
        _fake_gradients(grad_y, weights, needs[count : 2 * count]),
        [grad_y.new_empty(grad_y.shape[-1:] if needed else 0) for needed in needs[2 * count :]],
    )


def _fake_gradients(grad_y: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [grad_y.new_empty(t.shape if needed else 0) for t, needed in zip(tensors, needs, strict=True)]


def _keep_fuse_grids(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, ctx.grids, ctx.target, weight, _, ctx.mode, ctx.align_corners = inputs
    if weight is None:  # the gradient of resizing needs the maps' shapes alone
        ctx.shapes = [x.shape for x in features]
    else:
        ctx.save_for_backward(weight, *features)


def _fuse_grids_gradients(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    if ctx.saved_tensors:
        weight, *features = ctx.saved_tensors
    else:
        weight, features = None, [grad_y.new_empty(()).expand(shape) for shape in ctx.shapes]
    of_features, _, _, of_weight, of_bias, _, _ = ctx.needs_input_grad
    needs = [*of_features, of_weight, of_bias]
    options = (ctx.grids, ctx.target, weight, ctx.mode, ctx.align_corners, needs)
    grads, grad_weight, grad_bias = torch.ops.pyvlm.fuse_grids_backward(grad_y, features, *options)
    return (
        _where_needed(grads, of_features),
        None,
        None,
        grad_weight if of_weight else None,
        grad_bias if of_bias else None,
        None,
        None,
    )


def _keep_patches_to_token(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, weights, _, ctx.patches = inputs
    ctx.count = len(features)
    ctx.save_for_backward(*features, *weights)


def _patches_to_token_gradients(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    features, weights = list(ctx.saved_tensors[: ctx.count]), list(ctx.saved_tensors[ctx.count :])
    groups = ctx.needs_input_grad[:3]
    needs = [needed for group in groups for needed in group]
    found = torch.ops.pyvlm.patches_to_token_backward(grad_y, features, weights, ctx.patches, needs)
    return *(_where_needed(grads, group) for grads, group in zip(found, groups, strict=True)), None


def _where_needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


if _native.C is not None:  # it defines the schemas
    torch.library.register_fake("pyvlm::fuse_grids", _fake_fuse_grids)
    torch.library.register_fake("pyvlm::fuse_grids_backward", _fake_fuse_grids_backward)
    torch.library.register_fake("pyvlm::patches_to_token", _fake_patches_to_token)
    torch.library.register_fake("pyvlm::patches_to_token_backward", _fake_patches_to_token_backward)
    torch.library.register_autograd(
        "pyvlm::fuse_grids", _fuse_grids_gradients, setup_context=_keep_fuse_grids
    )
    torch.library.register_autograd(
        "pyvlm::patches_to_token", _patches_to_token_gradients, setup_context=_keep_patches_to_token
    )
    refuse_second_derivative("fuse_grids")
    refuse_second_derivative("patches_to_token")

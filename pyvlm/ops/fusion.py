"""Fusion of the levels of one encoder: the public function. `pyvlm.ops.grids` fuses several encoders.

Shapes: L levels · N images · T tokens of a map, without CLS · C channels of a map · H output features.
Raises TypeError for a wrong dtype and ValueError for a wrong shape, device or option, naming
the argument. `backend` is "auto" or a name in `pyvlm.ops._backends`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyvlm import _native
from pyvlm.ops._backends import refuse_second_derivative, resolve, triton_function
from pyvlm.ops._checks import Shapes, as_list
from pyvlm.reference import fusion as reference


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
        levels: L maps [N, T, C], as a sequence or stacked [L, N, T, C]. Views with the CLS token cut off are
            read as they lie.
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
    implementation = resolve("merge_levels", backend, alpha.device, levels[0].dtype)
    if implementation == "reference":
        return reference.merge_levels(levels, alpha, weight, bias, ln_weight, ln_bias, eps)
    differentiable = (*levels, alpha, weight, bias, ln_weight, ln_bias)
    keep_statistics = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in differentiable
    )
    if implementation == "triton" and alpha.is_cpu:
        out, _, _ = _InterpretedTriton.apply(
            alpha, weight, bias, ln_weight, ln_bias, eps, keep_statistics, *levels
        )
        return out
    out, _, _ = torch.ops.pyvlm.merge_levels(
        levels, alpha, weight, bias, ln_weight, ln_bias, eps, keep_statistics
    )
    return out


def _fake_merge_levels(
    levels: Sequence[Tensor],
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    keep_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, t, _ = levels[0].shape
    dtype = reference.accumulator(levels[0].dtype)
    statistics = (len(levels), n * t) if keep_statistics else (0,)
    mean, rstd = (levels[0].new_empty(statistics, dtype=dtype) for _ in range(2))
    return levels[0].new_empty(n, t, weight.shape[-2]), mean, rstd


def _fake_merge_levels_backward(
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
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor]:
    def grad(like: Tensor | None, needed: bool) -> Tensor:
        if like is None:
            return levels[0].new_empty(0)
        return like.new_empty(like.shape if needed else 0)

    of_levels = [grad(level, True) for level in levels] if needs[0] else []
    parameters = (alpha, weight, bias, ln_weight, ln_bias)
    of_alpha, of_weight, of_bias, of_ln_weight, of_ln_bias = map(grad, parameters, needs[1:])
    return of_levels, of_alpha, of_weight, of_bias, of_ln_weight, of_ln_bias


def _merge_levels_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    levels, *parameters, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*levels, *parameters, mean, rstd)


def _merge_levels_backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_out is None:
        return ([None] * len(ctx.needs_input_grad[0]), *[None] * 7)
    *levels, alpha, weight, bias, ln_weight, ln_bias, mean, rstd = ctx.saved_tensors
    needs = [any(ctx.needs_input_grad[0]), *ctx.needs_input_grad[1:6]]
    parameters = (alpha, weight, bias, ln_weight, ln_bias)
    of_levels, *found = torch.ops.pyvlm.merge_levels_backward(
        grad_out, levels, *parameters, mean, rstd, needs
    )
    grads = [grad if needed else None for grad, needed in zip(found, needs[1:], strict=True)]
    return (of_levels if needs[0] else [None] * len(levels), *grads, None, None)


_triton = triton_function("fusion", "merge_levels")
_triton_backward = triton_function("fusion", "merge_levels_backward")


class _InterpretedTriton(torch.autograd.Function):
    """The Triton kernels on CPU tensors, in Triton's interpreter: torch's CPU kernels are the native ones.

    The levels come last: autograd sees no tensors in a list.
    """

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
        return _triton(levels, alpha, weight, bias, ln_weight, ln_bias, eps, keep_statistics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        parameters, levels, statistics = inputs[:5], inputs[7:], output[1:]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters, *statistics, *levels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        alpha, weight, bias, ln_weight, ln_bias, mean, rstd, *levels = ctx.saved_tensors
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = [any(ctx.needs_input_grad[7:]), *ctx.needs_input_grad[:5]]
        of_levels, *grads = _triton_backward(
            grad_out, levels, alpha, weight, bias, ln_weight, ln_bias, mean, rstd, needs
        )
        found = [grad if needed else None for grad, needed in zip(grads, needs[1:], strict=True)]
        return (*found, None, None, *(of_levels if needs[0] else [None] * len(levels)))


if _native.C is not None:  # it defines the schemas
    torch.library.impl("pyvlm::merge_levels", "CUDA", _triton)
    torch.library.impl("pyvlm::merge_levels_backward", "CUDA", _triton_backward)
    torch.library.register_fake("pyvlm::merge_levels", _fake_merge_levels)
    torch.library.register_fake("pyvlm::merge_levels_backward", _fake_merge_levels_backward)
    torch.library.register_autograd(
        "pyvlm::merge_levels", _merge_levels_backward, setup_context=_merge_levels_setup_context
    )
    refuse_second_derivative("merge_levels")

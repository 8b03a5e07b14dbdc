"""RMSNorm (arXiv 1910.07467), also with Gemma's weight that is stored less 1 (arXiv 2403.08295).

Shape legend
    C channels · x has any dimensions before them
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyvlm import _native
from pyvlm.ops import _backends
from pyvlm.ops._checks import Shapes
from pyvlm.reference import norm as reference


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, of which backward needs x and one number a row.

    Written out in PyTorch it takes six to eight passes and keeps two or three tensors of x's size, in half
    precision in float32. Here all is computed in float32 (float64 for float64) and rounded once.

    Args:
        x: [.., C], any strides; the result keeps the order of its dimensions in memory.
        weight: [C], of any floating dtype; None: 1.
        eps: what is added to the mean of the squares.
        unit_offset: multiplies by 1 + weight, as Gemma's norms do.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        [.., C] in the dtype of x.

    Raises:
        TypeError: x or weight is no floating-point tensor.
        ValueError: the weight's size is not that of the channels, x has no dimensions, eps is negative, or
            they are on several devices.
    """
    if not _plainly_right(x, weight):
        _check(x, weight)
    if not eps >= 0:
        raise ValueError(f"rms_norm: eps={eps}, expected a number of at least 0")
    implementation = _backends.resolve("rms_norm", backend, x.device, x.dtype)
    if implementation == "reference":
        return reference.rms_norm(x, weight, eps, unit_offset)
    if implementation == "triton" and x.is_cpu:
        interpreted: Tensor = _Interpreted.apply(x, weight, eps, unit_offset)
        return interpreted
    y: Tensor = torch.ops.pyvlm.rms_norm(x, weight, eps, unit_offset)[0]
    return y


def _plainly_right(x: Any, weight: Any) -> bool:
    """What nearly all calls are; a look at each shape by its letters takes as long as a token's norm."""
    return (
        isinstance(x, Tensor)
        and x.dim() > 0
        and x.is_floating_point()
        and (
            weight is None
            or (
                isinstance(weight, Tensor)
                and weight.shape == x.shape[-1:]
                and weight.is_floating_point()
                and weight.device == x.device
            )
        )
    )


def _check(x: Tensor, weight: Tensor | None) -> None:
    dimensions = x.dim() if isinstance(x, Tensor) else 1
    if dimensions < 1:
        raise ValueError("rms_norm: x has no dimensions, expected [.., C]")
    letters = (*(f"x.shape[{i}]" for i in range(dimensions - 1)), "C")
    floating = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    Shapes("rms_norm").check("x", x, letters).check("weight", weight, "C", dtypes=floating)


def _fake(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    y = _fake_rows(x)
    strides = [stride // max(y.shape[-1], 1) for stride in y.stride()[:-1]]
    rstd = torch.empty_strided(y.shape[:-1], strides, dtype=_computed_in(x), device=x.device)
    return y, rstd


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    unit_offset: bool,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = _fake_rows(x) if want_x else x.new_empty(0)
    grad_weight = x.new_empty(0) if weight is None or not want_weight else weight.new_empty(weight.shape)
    return grad_x, grad_weight


def _fake_rows(x: Tensor) -> Tensor:
    """Like x, or contiguous where channels would be no neighbours."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 or y.shape[-1] == 1 else x.new_empty(x.shape)


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Interpreted(torch.autograd.Function):
    """The Triton kernels on CPU tensors, in Triton's interpreter: torch's CPU kernels are the native ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
        y: Tensor
        y, rstd = _backends.triton_function("norm", "rms_norm")(x, weight, eps, unit_offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.unit_offset = unit_offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad[0], weight is not None and ctx.needs_input_grad[1]
        grad_x, grad_weight = _backends.triton_function("norm", "rms_norm_backward")(
            grad, x, weight, rstd, ctx.unit_offset, want_x, want_weight
        )
        return grad_x if want_x else None, grad_weight if want_weight else None, None, None


if _native.C is not None:  # it defines the schemas, and the gradient (csrc/bindings/norm.cpp)
    for _op in ("rms_norm", "rms_norm_backward"):
        torch.library.impl(f"pyvlm::{_op}", "CUDA", _backends.triton_function("norm", _op))
    torch.library.register_fake("pyvlm::rms_norm", _fake)
    torch.library.register_fake("pyvlm::rms_norm_backward", _fake_backward)
    _backends.refuse_second_derivative("rms_norm")

"""Activations and gated ones, the middle of an MLP (GLU variants, arXiv 2002.05202).

Shape legend
    I channels · gate and up have any dimensions before them
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyvlm import _native
from pyvlm.ops import _backends
from pyvlm.ops._checks import Shapes, check_activation
from pyvlm.reference import gating as reference


def gated_activation(
    gate: Tensor, up: Tensor | None, activation: str = "silu", inplace: bool = False, backend: str = "auto"
) -> Tensor:
    """act(gate) · up in one pass, of which backward needs only gate and up: it computes the rest again.

    PyTorch makes two passes or more, rounds between them, and keeps act(gate) as a third tensor.

    Args:
        gate: [.., I], any strides; half of a joint projection is read where it lies.
        up: [.., I], or None: act(gate) alone, for MLPs without gates.
        activation: "silu" (SwiGLU), "gelu", "gelu_tanh" (GEGLU), "quick_gelu" (CLIP's x · sigmoid(1.702 x)),
            "relu" (ReGLU) or "relu2" (its square).
        inplace: writes the result over gate and returns that; only where no gradient is needed.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        [.., I] in the dtype of gate and up (under autocast, where they may differ, the wider one's).

    Raises:
        TypeError: dtypes that differ outside autocast, or are not floating-point.
        ValueError: shapes that differ, several devices, an unknown activation, or `inplace` where gradients
            are needed or the dtypes differ.
    """
    check_activation(activation)
    if not _plainly_right(gate, up):
        _check(gate, up)
    if inplace and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (gate, up)):
        raise ValueError("gated_activation: inplace=True overwrites gate, which its gradient needs")
    if up is not None and gate.dtype != up.dtype:
        if inplace:
            raise ValueError(f"gated_activation: inplace=True, but gate is {gate.dtype} and up {up.dtype}")
        gate, up = (x.to(torch.promote_types(gate.dtype, up.dtype)) for x in (gate, up))
    implementation = _backends.resolve("gated_activation", backend, gate.device, gate.dtype)
    if implementation == "reference":
        y = reference.gated_activation(gate, up, activation)
        return gate.copy_(y) if inplace else y
    if implementation == "triton" and gate.is_cpu:
        if inplace:
            _backends.triton_function("gating", "gated_activation_")(gate, up, activation)
            return gate
        interpreted: Tensor = _Interpreted.apply(gate, up, activation)
        return interpreted
    if inplace:
        torch.ops.pyvlm.gated_activation_(gate, up, activation)
        return gate
    result: Tensor = torch.ops.pyvlm.gated_activation(gate, up, activation)
    return result


def _plainly_right(gate: Any, up: Any) -> bool:
    """What nearly all calls are; a look at each shape by its letters takes longer than a token's values."""
    return (
        isinstance(gate, Tensor)
        and gate.dim() > 0
        and gate.is_floating_point()
        and (
            up is None
            or (
                isinstance(up, Tensor)
                and gate.shape == up.shape
                and gate.dtype == up.dtype
                and gate.device == up.device
            )
        )
    )


def _check(gate: Tensor, up: Tensor | None) -> None:
    dimensions = gate.dim() if isinstance(gate, Tensor) else 1
    if dimensions < 1:
        raise ValueError("gated_activation: gate has no dimensions, expected [.., I]")
    letters = (*(f"gate.shape[{i}]" for i in range(dimensions - 1)), "I")
    Shapes("gated_activation").check("gate", gate, letters).check("up", up, letters)


def _fake(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(grad_y: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


class _Interpreted(torch.autograd.Function):
    """The Triton kernels on CPU tensors, in Triton's interpreter: torch's CPU kernels are the native ones."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        y: Tensor = _backends.triton_function("gating", "gated_activation")(gate, up, activation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = _backends.triton_function("gating", "gated_activation_backward")(
            grad, gate, up, ctx.activation
        )
        return grad_gate, None if up is None else grad_up, None


if _native.C is not None:  # it defines the schemas, and the gradient (csrc/bindings/gating.cpp)
    for _op in ("gated_activation", "gated_activation_", "gated_activation_backward"):
        torch.library.impl(f"pyvlm::{_op}", "CUDA", _backends.triton_function("gating", _op))
    torch.library.register_fake("pyvlm::gated_activation", _fake)
    torch.library.register_fake("pyvlm::gated_activation_", lambda gate, up, activation: None)
    torch.library.register_fake("pyvlm::gated_activation_backward", _fake_backward)
    _backends.refuse_second_derivative("gated_activation")

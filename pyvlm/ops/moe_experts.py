"""Mixture of experts: the experts themselves, under a sparse routing or soft.

Shape legend
    T tokens · E experts · S slots (token, expert) · H hidden · I intermediate
    G groups of consecutive tokens · N tokens in a group · P slots an expert (soft MoE)
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyvlm import _native
from pyvlm.ops import _backends
from pyvlm.ops._moe_checks import check_experts, check_routing_values
from pyvlm.ops.moe import Routing
from pyvlm.reference import moe as reference

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]


def expert_mlp(
    x: Tensor,
    routing: Routing,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation = "silu",
    gated: bool = True,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every expert's MLP on its tokens, weighted and summed by token: y_t = Σ_e weight_te · f_e(x_t).

    f_e(x) = down_e · (act(gate_e x) ⊙ (up_e x)), or down_e · act(up_e x) where not gated. The sum over a
    token's experts is made in float32 (float64), in their order and without atomics: the same bits every
    time. The weights have the layout of transformers 5.

    Args:
        x: [T, H].
        routing: of T tokens to E experts.
        gate_up: [E, 2I, H], gate rows first; [E, I, H] where not gated.
        down: [E, H, I].
        activation: "silu", "gelu" (erf), "gelu_tanh", "quick_gelu" (CLIP's), "relu" or "relu2" (its square).
        gate_up_bias: [E, 2I] or [E, I].
        down_bias: [E, H].
        backend: "auto", "reference", "native" or "triton".

    Returns:
        [T, H] in the dtype of x (of autocast, where that is on); zero where a token has no expert.

    Raises:
        TypeError: x and the weights differ in dtype outside autocast.
        ValueError: shapes or experts that do not fit together, an unknown activation, several devices, or a
            routing whose indices point outside its tokens and slots.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [tokens, hidden], got {list(x.shape)}; flatten batch and length first")
    check_experts(x, gate_up, down, activation, gated, gate_up_bias, down_bias)
    if routing.num_tokens != len(x):
        raise ValueError(
            f"the routing is of {routing.num_tokens} tokens and x has {len(x)}: route these very tokens"
        )
    if routing.num_experts != len(gate_up):
        raise ValueError(f"the routing is to {routing.num_experts} experts and gate_up holds {len(gate_up)}")
    if routing.token.device != x.device:
        raise ValueError(
            f"the routing is on {routing.token.device} and x on {x.device}: move them to one device"
        )
    tensors = (routing.token, routing.weight, routing.expert_offsets, routing.token_offsets, routing.slot)
    implementation = _backends.resolve("expert_mlp", backend, x.device, x.dtype)
    if implementation == "reference":
        check_routing_values(routing)
        return reference.expert_mlp(x, tensors, gate_up, down, activation, gated, gate_up_bias, down_bias)
    differentiable = (x, routing.weight, gate_up, down, gate_up_bias, down_bias)
    keep_hidden = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    interpreted = implementation == "triton" and x.device.type == "cpu"
    op = _InterpretedTriton.apply if interpreted else torch.ops.pyvlm.expert_mlp
    y, _ = op(x, *tensors, gate_up, down, activation, gated, gate_up_bias, down_bias, keep_hidden)
    return y


def soft_moe(
    x: Tensor,
    phi: Tensor,
    gate_up: Tensor,
    down: Tensor,
    scale: float | Tensor = 1.0,
    activation: Activation = "gelu",
    gated: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Experts on weighted means of all tokens of a group: nothing is chosen, nothing is dropped.

    logits[n, e, p] = scale · cos(x_n, phi_ep). The input of slot (e, p) is the mean of x under the softmax of
    the logits over tokens; the output of token n is the mean of the slots' outputs under their softmax over
    all (e, p). Every token sees every other of its group, so this is for encoders, not for decoders.

    From Sparse to Soft Mixtures of Experts (arXiv 2308.00951), with the normalisation of
    google-research/vmoe.

    Args:
        x: [G, N, H].
        phi: [H, E, P], the slots' directions.
        gate_up, down, activation, gated, gate_up_bias, down_bias: as for `expert_mlp`.
        scale: a number or a learned scalar tensor.
        backend: "auto" or "reference".

    Returns:
        [G, N, H].

    Raises:
        TypeError: x and the weights differ in dtype outside autocast.
        ValueError: shapes that do not fit together, an unknown activation or several devices.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [groups, tokens, hidden], got {list(x.shape)}")
    check_experts(x, gate_up, down, activation, gated, gate_up_bias, down_bias)
    if phi.dim() != 3 or phi.shape[:2] != (x.shape[-1], len(gate_up)):
        raise ValueError(
            f"phi must be [hidden {x.shape[-1]}, experts {len(gate_up)}, slots], got {list(phi.shape)}"
        )
    _backends.resolve("soft_moe", backend, x.device)
    return reference.soft_moe(x, phi, gate_up, down, scale, activation, gated, gate_up_bias, down_bias)


def _fake(
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
) -> tuple[Tensor, Tensor]:
    hidden = x.new_empty((token.shape[0], gate_up.shape[1]) if keep_hidden else 0)
    return torch.empty_like(x, memory_format=torch.contiguous_format), hidden


def _fake_backward(grad_y: Tensor, x: Tensor, hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, gate_up, down, gate_up_bias, down_bias, needs = (args[i] for i in (1, 5, 6, 9, 10, 11))
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for t, needed in zip((x, weight, gate_up, down, gate_up_bias, down_bias), needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.gated, gate_up_bias, down_bias, _ = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, gate_up_bias, down_bias, hidden)


def _backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return _gradients(torch.ops.pyvlm.expert_mlp_backward, ctx, grad_y)


def _gradients(
    op: Callable[..., tuple[Tensor, ...]], ctx: Any, grad_y: Tensor | None
) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 13
    if grad_y is None:
        return tuple(grads)
    x, *routing, gate_up, down, gate_up_bias, down_bias, hidden = ctx.saved_tensors
    differentiable = (0, 2, 6, 7, 10, 11)  # x, weight, gate_up, down and the biases among the inputs
    needs = [ctx.needs_input_grad[i] for i in differentiable]
    weights = (gate_up, down, ctx.activation, ctx.gated, gate_up_bias, down_bias)
    found = op(grad_y, x, hidden, *routing, *weights, needs)
    for i, needed, grad in zip(differentiable, needs, found, strict=True):
        grads[i] = grad if needed else None
    return tuple(grads)


_triton = _backends.triton_function("moe", "expert_mlp")
_triton_backward = _backends.triton_function("moe", "expert_mlp_backward")


class _InterpretedTriton(torch.autograd.Function):
    """The Triton kernels on CPU tensors, in Triton's interpreter: torch's CPU kernels are the native ones."""

    forward = staticmethod(_triton)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return _gradients(_triton_backward, ctx, grad_y)


if _native.C is not None:  # it defines the schemas
    torch.library.impl("pyvlm::expert_mlp", "CUDA", _triton)
    torch.library.impl("pyvlm::expert_mlp_backward", "CUDA", _triton_backward)
    torch.library.register_fake("pyvlm::expert_mlp", _fake)
    torch.library.register_fake("pyvlm::expert_mlp_backward", _fake_backward)
    torch.library.register_autograd("pyvlm::expert_mlp", _backward, setup_context=_setup_context)
    _backends.refuse_second_derivative("expert_mlp")

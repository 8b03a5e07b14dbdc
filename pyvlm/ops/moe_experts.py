"""Mixture of experts: the experts themselves, under a sparse routing or soft.

Shape legend
    T tokens · E experts · S slots (token, expert) · H hidden · I intermediate
    G groups of consecutive tokens · N tokens in a group · P slots an expert (soft MoE)
"""

from typing import Literal

from torch import Tensor

from pyvlm.ops import _backends
from pyvlm.ops._moe_checks import check_experts, check_routing_values
from pyvlm.ops.moe import Routing
from pyvlm.reference import moe as reference

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


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
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "relu2" (its square).
        gate_up_bias: [E, 2I] or [E, I].
        down_bias: [E, H].
        backend: "auto" or "reference".

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
    check_routing_values(routing)
    _backends.resolve("expert_mlp", backend, x.device)
    tensors = (routing.token, routing.weight, routing.expert_offsets, routing.token_offsets, routing.slot)
    return reference.expert_mlp(x, tensors, gate_up, down, activation, gated, gate_up_bias, down_bias)


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

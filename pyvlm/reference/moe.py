"""Mixture-of-experts routing and experts in plain PyTorch: the definition of `pyvlm.ops.moe`.

Shape legend
    T tokens · E experts · S slots (token, expert) · K choices a token · H hidden · I intermediate
    G groups of consecutive tokens · N tokens in a group · P slots an expert (soft MoE)

A sparse router returns five tensors: token [S], weight [S], expert_offsets [E+1], token_offsets [T+1], slot
[S] (`pyvlm.ops.Routing` explains them). They are a sparse E × T matrix by rows, and its non-zeros by columns.

How many slots there are depends on the data, so on a GPU every router of logits, and the split into experts,
waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvlm.reference.gating import ACTIVATIONS

RoutingTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: what routers and sums over experts are computed in."""
    return torch.promote_types(dtype, torch.float32)


def router_probabilities(logits_TE: Tensor) -> Tensor:
    """Softmax over experts, in float32 (float64 for float64 logits)."""
    return logits_TE.softmax(dim=-1, dtype=accumulation_dtype(logits_TE.dtype))


def top_choices(score_TE: Tensor, top_k: int) -> Tensor:
    """The `top_k` best experts of each token, best first, ties to the lower index: int64 [T, K]."""
    # A stable sort: torch.topk promises nothing about ties.
    return score_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def sort_slots(
    expert_S: Tensor, token_S: Tensor, weight_S: Tensor, num_experts: int, num_tokens: int
) -> RoutingTensors:
    """The routing tensors of slots given in any order."""
    order_S = (expert_S * num_tokens + token_S).argsort(stable=True)
    expert_S, token_S = expert_S[order_S], token_S[order_S]
    by_token_S = token_S.argsort(stable=True)
    return (
        token_S.int(),
        weight_S[order_S],
        _offsets(expert_S, num_experts),
        _offsets(token_S[by_token_S], num_tokens),
        by_token_S.int(),
    )


def routing_from_choices(
    index_TK: Tensor, weight_TK: Tensor, num_experts: int, drop_out_of_range: bool
) -> RoutingTensors:
    num_tokens, top_k = index_TK.shape
    expert_S = index_TK.flatten().long()
    token_S = torch.arange(num_tokens, device=index_TK.device).repeat_interleave(top_k)
    weight_S = weight_TK.flatten().to(accumulation_dtype(weight_TK.dtype))
    if drop_out_of_range:
        kept_S = expert_S < num_experts
        expert_S, token_S, weight_S = expert_S[kept_S], token_S[kept_S], weight_S[kept_S]
    return sort_slots(expert_S, token_S, weight_S, num_experts, num_tokens)


def expert_choice(logits_TE: Tensor, capacity_G: Tensor, group_offsets: Tensor) -> RoutingTensors:
    prob_TE = router_probabilities(logits_TE)
    return _slots_of(_best_in_groups(prob_TE, capacity_G, group_offsets), prob_TE)


def token_choice(
    logits_TE: Tensor, top_k: int, capacity: int | None, normalize: bool, drop: str, bias_E: Tensor | None
) -> RoutingTensors:
    num_tokens, num_experts = logits_TE.shape
    prob_TE = router_probabilities(logits_TE)
    choice_TK = top_choices(prob_TE if bias_E is None else prob_TE + bias_E, top_k)
    # Routes are numbered choice by choice: every first choice comes before any second one.
    chosen_KTE = F.one_hot(choice_TK.T, num_experts).bool()
    if capacity is not None and drop == "position":
        number_KTE = chosen_KTE.flatten(0, 1).cumsum(0).view_as(chosen_KTE)
        chosen_KTE = chosen_KTE & (number_KTE <= capacity)
    chosen_TE = chosen_KTE.any(0)
    if capacity is not None and drop == "priority":
        everyone = torch.tensor([0, num_tokens], device=logits_TE.device)
        contender_TE = prob_TE.masked_fill(~chosen_TE, -1.0)
        chosen_TE = chosen_TE & _best_in_groups(contender_TE, everyone.new_tensor([capacity]), everyone)
    gate_TE = prob_TE
    if normalize:
        kept_T1 = (prob_TE * chosen_TE).sum(-1, keepdim=True)
        gate_TE = prob_TE / kept_T1.clamp(min=torch.finfo(prob_TE.dtype).eps)
    return _slots_of(chosen_TE, gate_TE)


def threshold_choice(logits_TE: Tensor, threshold_E: Tensor) -> RoutingTensors:
    prob_TE = router_probabilities(logits_TE)
    return _slots_of(prob_TE >= threshold_E, prob_TE)


def expert_mlp(
    x_TH: Tensor,
    routing: RoutingTensors,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    token, weight, expert_offsets, token_offsets, slot = routing
    rows_SH = _GatherTokens.apply(x_TH, token, token_offsets, slot)
    rows_by_expert = rows_SH.split(expert_offsets.diff().tolist())
    out_SH = torch.cat(_experts(rows_by_expert, gate_up, down, activation, gated, gate_up_bias, down_bias))
    weighted_SH = out_SH.to(accumulation_dtype(out_SH.dtype)) * weight[:, None]
    return _SumSlots.apply(weighted_SH, token, token_offsets, slot).to(out_SH.dtype)


def soft_moe(
    x_GNH: Tensor,
    phi_HEP: Tensor,
    gate_up: Tensor,
    down: Tensor,
    scale: float | Tensor,
    activation: str,
    gated: bool,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    dtype = accumulation_dtype(x_GNH.dtype)
    direction_GNH, direction_HEP = _unit(x_GNH.to(dtype), dim=-1), _unit(phi_HEP.to(dtype), dim=0)
    logits_GNEP = scale * torch.einsum("gnh,hep->gnep", direction_GNH, direction_HEP)
    dispatch_GNEP = logits_GNEP.softmax(dim=1).to(x_GNH.dtype)
    combine_GNEP = logits_GNEP.flatten(2).softmax(dim=-1).view_as(logits_GNEP).to(x_GNH.dtype)
    slots_EGPH = torch.einsum("gnep,gnh->egph", dispatch_GNEP, x_GNH)
    slots_by_expert = slots_EGPH.unbind()
    out_EGPH = torch.stack(
        _experts(slots_by_expert, gate_up, down, activation, gated, gate_up_bias, down_bias)
    )
    return torch.einsum("gnep,egph->gnh", combine_GNEP, out_EGPH)


def _best_in_groups(score_TE: Tensor, capacity_G: Tensor, group_offsets: Tensor) -> Tensor:
    """Bool [T, E]: is the token among the `capacity` best of its group for the expert; ties to the lower
    index."""
    size_G = group_offsets.diff()
    group_T = torch.repeat_interleave(size_G, output_size=len(score_TE))
    by_score_TE = score_TE.argsort(dim=0, descending=True, stable=True)
    by_group_TE = by_score_TE.gather(0, group_T[by_score_TE].argsort(dim=0, stable=True))
    # Row t of by_group_TE belongs to group_T[t] in every column, at the same rank.
    rank_T = torch.arange(len(group_T), device=score_TE.device) - group_offsets[:-1][group_T]
    best_TE = by_group_TE[rank_T < capacity_G[group_T]]
    return torch.zeros_like(score_TE, dtype=torch.bool).scatter_(0, best_TE, True)


def _slots_of(chosen_TE: Tensor, gate_TE: Tensor) -> RoutingTensors:
    num_tokens, num_experts = chosen_TE.shape
    token_S, expert_S = chosen_TE.nonzero().unbind(1)
    return sort_slots(expert_S, token_S, gate_TE[token_S, expert_S], num_experts, num_tokens)


def _offsets(sorted_S: Tensor, size: int) -> Tensor:
    """Where the entries of each value start, and the end: int32 [size + 1]."""
    # Not by bincount, which waits for the device.
    return torch.searchsorted(sorted_S, torch.arange(size + 1, device=sorted_S.device), out_int32=True)


def _sum_slots(rows_SH: Tensor, token_offsets: Tensor, slot: Tensor) -> Tensor:
    """The sum of each token's slots, in the order of their experts: [T, H]. No atomics: the same bits every
    time."""
    total_TH = F.embedding_bag(
        slot,
        rows_SH.to(accumulation_dtype(rows_SH.dtype)),
        token_offsets,
        mode="sum",
        include_last_offset=True,
    )
    return total_TH.to(rows_SH.dtype)


class _GatherTokens(torch.autograd.Function):
    """rows[s] = x[token[s]]; its transpose is `_SumSlots`, where autograd's own would add with atomics on a
    GPU."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, token: Tensor, token_offsets: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(token, token_offsets, slot)
        return x_TH.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor, None, None, None]:
        return _SumSlots.apply(grad_SH, *ctx.saved_tensors), None, None, None


class _SumSlots(torch.autograd.Function):
    """y[t] = sum of the rows of token t."""

    @staticmethod
    def forward(ctx: Any, rows_SH: Tensor, token: Tensor, token_offsets: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(token, token_offsets, slot)
        return _sum_slots(rows_SH, token_offsets, slot)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None, None]:
        return _GatherTokens.apply(grad_TH, *ctx.saved_tensors), None, None, None


def _experts(
    inputs: Sequence[Tensor],
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> list[Tensor]:
    """Each expert's MLP on its own input, which may be empty: its weights then have a gradient all the same,
    zero."""
    no_bias = [None] * len(gate_up)
    # unbind, not indexing: its backward stacks the gradients once, where each index would fill all E of them.
    up_biases = no_bias if gate_up_bias is None else gate_up_bias.unbind()
    down_biases = no_bias if down_bias is None else down_bias.unbind()
    outputs = []
    for x, w_up, b_up, w_down, b_down in zip(
        inputs, gate_up.unbind(), up_biases, down.unbind(), down_biases, strict=True
    ):
        hidden = F.linear(x, w_up, b_up)
        if gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = ACTIVATIONS[activation](gate) * up
        else:
            hidden = ACTIVATIONS[activation](hidden)
        outputs.append(F.linear(hidden, w_down, b_down))
    return outputs


def _unit(x: Tensor, dim: int) -> Tensor:
    # The epsilon stands inside the root, as in the original: a zero row stays zero.
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + 1e-6)

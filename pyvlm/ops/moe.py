"""Mixture of experts: routers that decide which expert sees which token, and the experts themselves.

Shape legend
    T tokens · E experts · S slots (token, expert) · H hidden · I intermediate
    G groups of consecutive tokens · N tokens in a group · P slots an expert (soft MoE)

Every sparse router returns the same `Routing`, so one `expert_mlp` serves them all. Gradients reach the
router's logits through `Routing.weight`; the choice itself has none. Nothing here is random.

Values (NaN logits, an index out of range) are checked on CPU tensors only: on another device reading them
would stall it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyvlm.ops import _backends
from pyvlm.ops._moe_checks import (
    check_capacities,
    check_expert_vector,
    check_experts,
    check_group_offsets,
    check_logits,
    check_positive_int,
    check_routing_values,
    check_rows,
    check_top_k,
)
from pyvlm.reference import moe as reference

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert works on which token: the non-zeros of a sparse E × T matrix, by rows and by columns.

    Slots are sorted by expert and, within an expert, by token. Expert e owns the slots expert_offsets[e] up
    to expert_offsets[e + 1]; token t the slots slot[token_offsets[t]] up to slot[token_offsets[t + 1]], in
    the order of their experts. A token may have no slot: its output is zero.

    Attributes:
        token: int32 [S], the token of each slot.
        weight: float32 (float64 for float64 logits) [S], what the expert's output is multiplied by;
            differentiable.
        expert_offsets: int32 [E + 1].
        token_offsets: int32 [T + 1].
        slot: int32 [S], slots sorted by token.
        num_tokens: T.

    Raises:
        TypeError: a wrong dtype.
        ValueError: lengths that do not fit together, or several devices.
    """

    token: Tensor
    weight: Tensor
    expert_offsets: Tensor
    token_offsets: Tensor
    slot: Tensor
    num_tokens: int

    def __post_init__(self) -> None:
        for name in ("token", "expert_offsets", "token_offsets", "slot"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.int32:
                raise TypeError(f"Routing.{name} must be int32, got {tensor.dtype}; convert it with .int()")
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"Routing.weight must be float32 or float64, got {self.weight.dtype}")
        for name, tensor in self._tensors().items():
            if tensor.dim() != 1 or tensor.device != self.token.device:
                raise ValueError(
                    f"Routing.{name} must be one-dimensional and on {self.token.device} as token is, "
                    f"got shape {list(tensor.shape)} on {tensor.device}"
                )
        slots = len(self.token)
        if len(self.weight) != slots or len(self.slot) != slots:
            raise ValueError(
                f"Routing needs one weight and one slot entry a token entry: got {slots} tokens, "
                f"{len(self.weight)} weights and {len(self.slot)} slots"
            )
        if len(self.token_offsets) != self.num_tokens + 1:
            raise ValueError(
                f"Routing.token_offsets must hold num_tokens + 1 = {self.num_tokens + 1} entries, "
                f"got {len(self.token_offsets)}"
            )
        if len(self.expert_offsets) < 2:
            raise ValueError(
                "Routing.expert_offsets must hold num_experts + 1 entries, at least 2, "
                f"got {len(self.expert_offsets)}"
            )

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.expert_offsets) - 1

    @property
    def expert(self) -> Tensor:
        """The expert of each slot, int64 [S]."""
        experts = torch.arange(self.num_experts, device=self.token.device)
        return experts.repeat_interleave(self.expert_offsets.diff(), output_size=len(self.token))

    def to(self, device: torch.device | str) -> "Routing":
        """The same routing on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_tokens"}


def expert_choice(
    logits: Tensor, capacity: int | Tensor, group_offsets: Tensor | None = None, backend: str = "auto"
) -> Routing:
    """Each expert takes the `capacity` tokens of each group that it scores highest.

    p = softmax of the logits over experts; the weight of a slot is p, not renormalised. Ties go to the lower
    token index; a group with fewer tokens than the capacity gives them all. A later token can push out an
    earlier one, so a decoder may use this only over groups that it reads whole, such as images.

    Mixture-of-Experts with Expert Choice Routing (arXiv 2202.09368).

    Args:
        logits: [T, E], any floating dtype; -inf keeps an expert from scoring a token.
        capacity: tokens an expert takes in a group, at least 1; a tensor, integer [G], gives each group its
            own.
        group_offsets: integer [G + 1], rising from 0 to T: group g is the rows from its g-th entry up to the
            next one. None: all tokens are one group.
        backend: "auto" or "reference".

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, a capacity below 1, offsets that do not rise from 0 to T, NaN or +inf in a
            row of the logits, or nothing but -inf.
    """
    check_logits(logits)
    num_tokens = len(logits)
    if group_offsets is None:
        group_offsets = torch.tensor([0, num_tokens], device=logits.device)
    else:
        check_group_offsets(group_offsets, logits)
    groups = len(group_offsets) - 1
    if isinstance(capacity, Tensor):
        check_capacities(capacity, groups, logits)
    else:
        check_positive_int("capacity", capacity)
        capacity = group_offsets.new_tensor([capacity]).expand(groups)
    _backends.resolve("expert_choice", backend, logits.device)
    return Routing(*reference.expert_choice(logits, capacity, group_offsets), num_tokens)


def token_choice(
    logits: Tensor,
    top_k: int,
    capacity: int | None = None,
    normalize: bool = True,
    drop: Literal["position", "priority"] = "position",
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Routing:
    """Each token takes the `top_k` experts that it scores highest.

    p = softmax of the logits over experts; ties go to the lower expert index. The weight of a slot is p,
    divided (`normalize`) by the sum over the slots that the token keeps. Without a capacity a token's experts
    depend on nothing but the token. With one, an expert keeps `capacity` tokens: the first ones, where all
    first choices are numbered before any second one ("position"), or those with the largest p ("priority",
    ties to the lower token). Both let a later token push out an earlier one.

    `normalize=True` is Mixtral (arXiv 2401.04088), `normalize=False` Qwen3-MoE with `norm_topk_prob=False`;
    `top_k=2, drop="position"` is DeepSpeed's `top2gating` and `drop="priority"` its `topkgating` with
    `drop_policy="probs"`.

    Args:
        logits: [T, E], any floating dtype; -inf keeps a token from an expert with p = 0, as far as there are
            others.
        top_k: experts a token chooses, 1 to E.
        capacity: tokens an expert keeps, at least 1, or None for all of them.
        bias: [E], added to p for the choice only, not to the weights (loss-free balancing, arXiv 2408.15664).
        backend: "auto" or "reference".

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, top_k outside 1 to E, a capacity below 1, an unknown `drop`, NaN or +inf in
            a row of the logits, or nothing but -inf.
    """
    check_logits(logits)
    check_top_k(top_k, logits)
    if capacity is not None:
        check_positive_int("capacity", capacity)
    if drop not in ("position", "priority"):
        raise ValueError(f'drop={drop!r} is unknown; expected "position" or "priority"')
    if bias is not None:
        check_expert_vector("bias", bias, logits)
    _backends.resolve("token_choice", backend, logits.device)
    return Routing(*reference.token_choice(logits, top_k, capacity, normalize, drop, bias), len(logits))


def threshold_choice(logits: Tensor, thresholds: Tensor, backend: str = "auto") -> Routing:
    """Each expert takes every token whose probability reaches the expert's threshold.

    p = softmax of the logits over experts; the slots are those with p[t, e] >= thresholds[e], and their
    weight is p. With thresholds known in advance (a running quantile of earlier batches) no token depends on
    another: the causal counterpart of expert choice.

    Args:
        logits: [T, E], any floating dtype.
        thresholds: [E], floating.
        backend: "auto" or "reference".

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, NaN or +inf in a row of the logits, or nothing but -inf.
    """
    check_logits(logits)
    check_expert_vector("thresholds", thresholds, logits)
    _backends.resolve("threshold_choice", backend, logits.device)
    return Routing(*reference.threshold_choice(logits, thresholds), len(logits))


def merge_routings(parts: Sequence[tuple[Routing, Tensor]], num_tokens: int) -> Routing:
    """One routing of `num_tokens` tokens out of routings of some of them, so that the experts run once.

    Args:
        parts: pairs of a routing and the rows, integer [its num_tokens], that its tokens have in the whole.
            No row may occur twice; rows that occur nowhere are routed nowhere.
        num_tokens: T of the whole.

    Raises:
        TypeError: rows of a wrong dtype.
        ValueError: no parts, different numbers of experts, or rows that do not match their routing or lie
            outside the whole.
    """
    if not parts:
        raise ValueError("merge_routings needs at least one routing, got none")
    num_experts = parts[0][0].num_experts
    for routing, rows in parts:
        if routing.num_experts != num_experts:
            raise ValueError(
                f"all routings must be to the same experts, got {num_experts} and {routing.num_experts}"
            )
        check_rows(rows, routing, num_tokens)
    expert = torch.cat([routing.expert for routing, _ in parts])
    token = torch.cat([rows[routing.token] for routing, rows in parts])
    weight = torch.cat([routing.weight for routing, _ in parts])
    return Routing(*reference.sort_slots(expert, token, weight, num_experts, num_tokens), num_tokens)


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


def load_balancing_loss(
    logits: Tensor, top_k: int, form: Literal["deepspeed", "transformers"] = "deepspeed"
) -> Tensor:
    """The loss that keeps token choice balanced: E · Σ_e (share of tokens that chose e) · (mean p of e).

    Choices are counted before any drop, and only the mean p has a gradient. "transformers" counts all top_k
    choices, so that perfect balance gives top_k. "deepspeed" gives 1 there: up to top_k = 2 it counts first
    choices alone (`top1gating`, `top2gating`), above that all of them, divided by top_k (`topkgating`).

    Switch Transformers (arXiv 2101.03961).

    Args:
        logits: [T, E] of the tokens that count; of several layers, concatenated, for transformers' joint
            loss.
        top_k: experts a token chooses, 1 to E.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 where there are no tokens.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, top_k outside 1 to E, an unknown form, or logits as in `token_choice`.
    """
    check_logits(logits)
    check_top_k(top_k, logits)
    if form not in ("deepspeed", "transformers"):
        raise ValueError(f'form={form!r} is unknown; expected "deepspeed" or "transformers"')
    num_tokens, num_experts = max(len(logits), 1), logits.shape[1]
    counted = 1 if form == "deepspeed" and top_k <= 2 else top_k
    prob = reference.router_probabilities(logits)
    chosen = torch.bincount(reference.top_choices(prob, counted).flatten(), minlength=num_experts)
    loss = num_experts * (prob.sum(0) * chosen).sum() / num_tokens**2
    return loss / counted if form == "deepspeed" else loss


def importance_loss(logits: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' importance, Σ_t p[t, e]: 0 where all weigh the same.

    Outrageously Large Neural Networks (arXiv 1701.06538), with the variance over E experts, not E − 1.

    Args:
        logits: [T, E].

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 where there are no tokens.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, or logits as in `token_choice`.
    """
    check_logits(logits)
    share = reference.router_probabilities(logits).sum(0) / max(len(logits), 1)
    return (share * logits.shape[1]).var(correction=0)


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)²: keeps the router's logits small.

    ST-MoE (arXiv 2202.08906).

    Args:
        logits: [T, E].

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 where there are no tokens.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, or logits as in `token_choice`.
    """
    check_logits(logits)
    z = logits.to(reference.accumulation_dtype(logits.dtype)).logsumexp(-1)
    return z.square().sum() / max(len(logits), 1)


def balance_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The next `bias` of `token_choice`, in place of a loss: up for experts below the mean load, else down.

    bias_e + rate · sign(mean(counts) − counts_e). Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664).

    Args:
        bias: [E].
        counts: [E], the tokens that each expert got.
        rate: the step; the paper uses 0.001.

    Raises:
        ValueError: bias and counts are not both [E].
    """
    if bias.dim() != 1 or bias.shape != counts.shape:
        raise ValueError(
            f"bias and counts must both be [experts], got {list(bias.shape)} and {list(counts.shape)}"
        )
    counts = counts.to(bias.dtype)
    return bias + rate * (counts.mean() - counts).sign()

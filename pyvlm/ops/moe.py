"""Mixture of experts: routers that decide which expert sees which token.

Shape legend
    T tokens · E experts · S slots (token, expert) · G groups of consecutive tokens

Every sparse router returns the same `Routing`, so one `expert_mlp` serves them all. Gradients reach the
router's logits through `Routing.weight`; the choice itself has none. Nothing here is random.

Values (NaN logits, an index out of range) are checked on CPU tensors only: on another device reading them
would stall it. The native kernels see them anyway and check them themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyvlm import _native
from pyvlm.ops._backends import refuse_second_derivative, resolve
from pyvlm.ops._moe_checks import (
    check_capacities,
    check_expert_vector,
    check_group_offsets,
    check_kind_of_logits,
    check_positive_int,
    check_rows,
    check_top_k,
    check_values_of_expert_vector,
    check_values_of_groups,
    check_values_of_logits,
    check_values_of_rows,
)
from pyvlm.reference import moe as reference


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
        device = self.token.device
        for name in ("token", "expert_offsets", "token_offsets", "slot", "weight"):
            tensor = getattr(self, name)
            if name == "weight":
                if tensor.dtype not in (torch.float32, torch.float64):
                    raise TypeError(f"Routing.weight must be float32 or float64, got {tensor.dtype}")
            elif tensor.dtype != torch.int32:
                raise TypeError(f"Routing.{name} must be int32, got {tensor.dtype}; convert it with .int()")
            if tensor.dim() != 1 or tensor.device != device:
                raise ValueError(
                    f"Routing.{name} must be one-dimensional and on {device} as token is, "
                    f"got shape {list(tensor.shape)} on {tensor.device}"
                )
        slots = self.token.shape[0]
        if self.weight.shape[0] != slots or self.slot.shape[0] != slots:
            raise ValueError(
                f"Routing needs one weight and one slot entry a token entry: got {slots} tokens, "
                f"{len(self.weight)} weights and {len(self.slot)} slots"
            )
        if self.token_offsets.shape[0] != self.num_tokens + 1:
            raise ValueError(
                f"Routing.token_offsets must hold num_tokens + 1 = {self.num_tokens + 1} entries, "
                f"got {len(self.token_offsets)}"
            )
        if self.expert_offsets.shape[0] < 2:
            raise ValueError(
                "Routing.expert_offsets must hold num_experts + 1 entries, at least 2, "
                f"got {len(self.expert_offsets)}"
            )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.expert_offsets.shape[0] - 1

    @property
    def expert(self) -> Tensor:
        """The expert of each slot, int64 [S]."""
        experts = torch.arange(self.num_experts, device=self.token.device)
        return experts.repeat_interleave(self.expert_offsets.diff(), output_size=self.token.shape[0])

    def to(self, device: torch.device | str) -> "Routing":
        """The same routing on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_tokens"}


def expert_choice(
    logits: Tensor,
    capacity: int | Tensor,
    group_offsets: Tensor | None = None,
    backend: str = "auto",
    num_slots: int | None = None,
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
        backend: "auto", "reference" or "native".
        num_slots: how many slots that makes, E times the sum of min(capacity, tokens) over the groups, for
            who knows it: a GPU is then not waited for. With an int for all tokens it is known anyway.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, a capacity below 1, offsets that do not rise from 0 to T, a wrong num_slots
            (on a GPU a trap of the device), NaN or +inf in a row of the logits, or nothing but -inf.
    """
    check_kind_of_logits(logits)
    num_tokens, num_experts = logits.shape
    native = resolve("expert_choice", backend, logits.device) == "native"
    if native and group_offsets is None and not isinstance(capacity, Tensor):
        check_positive_int("capacity", capacity)
        known = num_experts * min(capacity, num_tokens)
        _expect_slots(known, num_slots)
        return _native_routing(torch.ops.pyvlm.expert_choice(logits, None, None, known), num_tokens)
    if group_offsets is None:
        group_offsets = torch.tensor([0, num_tokens], device=logits.device)
    else:
        check_group_offsets(group_offsets, logits)
    groups = group_offsets.shape[0] - 1
    if isinstance(capacity, Tensor):
        check_capacities(capacity, groups, logits)
    else:
        check_positive_int("capacity", capacity)
        capacity = group_offsets.new_full((groups,), capacity)
    if native:
        counted = num_slots
        if logits.device.type == "cuda":  # whose kernels leave it to the host how much memory they need
            capacity, group_offsets = capacity.long().contiguous(), group_offsets.long().contiguous()
            if counted is None:
                counted = num_experts * int(capacity.minimum(group_offsets.diff()).sum())
        tensors = torch.ops.pyvlm.expert_choice(logits, capacity, group_offsets, counted)
        return _native_routing(tensors, num_tokens)
    check_values_of_logits(logits)
    check_values_of_groups(capacity, group_offsets, logits)
    routing = Routing(*reference.expert_choice(logits, capacity, group_offsets), num_tokens)
    _expect_slots(routing.token.shape[0], num_slots)
    return routing


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
        bias: [E], added to p, in p's dtype, for the choice only, not to the weights (loss-free balancing,
            arXiv 2408.15664).
        backend: "auto", "reference" or "native".

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, top_k outside 1 to E, a capacity below 1, an unknown `drop`, NaN or +inf in
            a row of the logits, or nothing but -inf.
    """
    check_kind_of_logits(logits)
    check_top_k(top_k, logits)
    if capacity is not None:
        check_positive_int("capacity", capacity)
    if drop not in ("position", "priority"):
        raise ValueError(f'drop={drop!r} is unknown; expected "position" or "priority"')
    if bias is not None:
        check_expert_vector("bias", bias, logits)
    arguments = (logits, top_k, capacity, normalize, drop, bias)
    op = "token_choice" if capacity is None else "token_choice with a capacity"
    if resolve(op, backend, logits.device) == "native":
        return _native_routing(torch.ops.pyvlm.token_choice(*arguments), logits.shape[0])
    check_values_of_logits(logits)
    if bias is not None:
        check_values_of_expert_vector("bias", bias)
    return Routing(*reference.token_choice(*arguments), logits.shape[0])


def threshold_choice(logits: Tensor, thresholds: Tensor, backend: str = "auto") -> Routing:
    """Each expert takes every token whose probability reaches the expert's threshold.

    p = softmax of the logits over experts; the slots are those with p[t, e] >= thresholds[e], and their
    weight is p. With thresholds known in advance (a running quantile of earlier batches) no token depends on
    another: the causal counterpart of expert choice.

    Args:
        logits: [T, E], any floating dtype.
        thresholds: [E], floating.
        backend: "auto", "reference" or "native".

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, NaN or +inf in a row of the logits, or nothing but -inf.
    """
    check_kind_of_logits(logits)
    check_expert_vector("thresholds", thresholds, logits)
    if resolve("threshold_choice", backend, logits.device) == "native":
        return _native_routing(torch.ops.pyvlm.threshold_choice(logits, thresholds), logits.shape[0])
    check_values_of_logits(logits)
    check_values_of_expert_vector("thresholds", thresholds)
    return Routing(*reference.threshold_choice(logits, thresholds), logits.shape[0])


def merge_routings(parts: Sequence[tuple[Routing, Tensor]], num_tokens: int) -> Routing:
    """One routing of `num_tokens` tokens out of routings of some of them, so that the experts run once.

    Args:
        parts: pairs of a routing and the rows, integer [its num_tokens], that its tokens have in the whole.
            No row may occur twice; rows that occur nowhere are routed nowhere.
        num_tokens: T of the whole.

    Raises:
        TypeError: rows of a wrong dtype.
        ValueError: no parts, different numbers of experts, or rows that do not match their routing or lie
            outside the whole. A GPU's values are not looked at: there such a row stops the process's work on
            the GPU, as one out of a tensor's bounds does.
    """
    if not parts:
        raise ValueError("merge_routings needs at least one routing, got none")
    num_experts = parts[0][0].num_experts
    for routing, rows in parts:
        if routing.num_experts != num_experts:
            raise ValueError(
                f"all routings must be to the same experts, got {num_experts} and {routing.num_experts}"
            )
        check_rows(rows, routing)
    weight = torch.cat([routing.weight for routing, _ in parts])
    if resolve("merge_routings", "auto", weight.device) == "native":
        order, *rest = torch.ops.pyvlm.merge_routings(
            [routing.token for routing, _ in parts],
            [routing.expert_offsets for routing, _ in parts],
            [rows for _, rows in parts],
            num_tokens,
        )
        return _native_routing((weight.index_select(0, order), *rest), num_tokens)
    for _, rows in parts:
        check_values_of_rows(rows, num_tokens)
    expert = torch.cat([routing.expert for routing, _ in parts])
    token = torch.cat([rows[routing.token] for routing, rows in parts])
    return Routing(*reference.sort_slots(expert, token, weight, num_experts, num_tokens), num_tokens)


def _expect_slots(found: int, num_slots: int | None) -> None:
    if num_slots is not None and found != num_slots:
        raise ValueError(f"num_slots is {num_slots}, but the capacities and the groups give {found} slots")


def _native_routing(tensors: tuple[Tensor, ...], num_tokens: int) -> Routing:
    weight, token, expert_offsets, token_offsets, slot = tensors
    return Routing(token, weight, expert_offsets, token_offsets, slot, num_tokens)


def _slots(logits: Tensor, slots: Any, num_tokens: Any) -> tuple[Tensor, ...]:
    def ints(size: Any) -> Tensor:
        return logits.new_empty(size, dtype=torch.int32)

    weight = logits.new_empty(slots, dtype=reference.accumulation_dtype(logits.dtype))
    return weight, ints(slots), ints(logits.shape[1] + 1), ints(num_tokens + 1), ints(slots)


def _fake_expert_choice(
    logits: Tensor, capacity: Tensor | None, group_offsets: Tensor | None, slots: Any = None
) -> tuple[Tensor, ...]:
    if slots is None:
        slots = torch.library.get_ctx().new_dynamic_size()
    return _slots(logits, slots, logits.shape[0])


def _fake_token_choice(
    logits: Tensor, top_k: int, capacity: int | None, normalize: bool, drop: str, bias: Tensor | None
) -> tuple[Tensor, ...]:
    slots = logits.shape[0] * top_k if capacity is None else torch.library.get_ctx().new_dynamic_size()
    return _slots(logits, slots, logits.shape[0])


def _fake_threshold_choice(logits: Tensor, thresholds: Tensor) -> tuple[Tensor, ...]:
    return _slots(logits, torch.library.get_ctx().new_dynamic_size(), logits.shape[0])


def _fake_backward(
    grad_weight: Tensor,
    logits: Tensor,
    token: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    normalize: bool,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_merge(
    token: list[Tensor], expert_offsets: list[Tensor], rows: list[Tensor], num_tokens: int
) -> tuple[Tensor, ...]:
    slots = sum(t.shape[0] for t in token)
    order = token[0].new_empty(slots, dtype=torch.int64)
    tokens, token_offsets = token[0].new_empty(slots), token[0].new_empty(num_tokens + 1)
    return order, tokens, torch.empty_like(expert_offsets[0]), token_offsets, torch.empty_like(tokens)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, token, expert_offsets, _, _ = output
    ctx.normalize = False
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], token, weight, expert_offsets)


def _setup_token_choice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup_context(ctx, inputs, output)
    ctx.normalize = inputs[3]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_weight = grads[0]
    if grad_weight is None:
        return (None,) * ctx.num_inputs
    logits, token, weight, expert_offsets = ctx.saved_tensors
    grad_logits = torch.ops.pyvlm.routing_backward(
        grad_weight, logits, token, weight, expert_offsets, ctx.normalize
    )
    return grad_logits, *(None,) * (ctx.num_inputs - 1)


if _native.C is not None:  # it defines the schemas
    torch.library.register_fake("pyvlm::expert_choice", _fake_expert_choice)
    torch.library.register_fake("pyvlm::token_choice", _fake_token_choice)
    torch.library.register_fake("pyvlm::threshold_choice", _fake_threshold_choice)
    torch.library.register_fake("pyvlm::routing_backward", _fake_backward)
    torch.library.register_fake("pyvlm::merge_routings", _fake_merge)
    torch.library.register_autograd("pyvlm::expert_choice", _backward, setup_context=_setup_context)
    torch.library.register_autograd("pyvlm::token_choice", _backward, setup_context=_setup_token_choice)
    torch.library.register_autograd("pyvlm::threshold_choice", _backward, setup_context=_setup_context)
    refuse_second_derivative("routing")

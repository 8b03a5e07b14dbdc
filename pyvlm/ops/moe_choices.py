"""Mixture of experts: a routing out of choices that were made elsewhere.

Shape legend
    T tokens · K choices a token · E experts · S slots (token, expert)
"""

from typing import Any

import torch
from torch import Tensor

from pyvlm import _native
from pyvlm.ops._backends import resolve
from pyvlm.ops._moe_checks import check_choices, check_values_of_choices
from pyvlm.ops.moe import Routing
from pyvlm.reference import moe as reference


def routing_from_choices(
    index: Tensor, weight: Tensor, num_experts: int, drop_out_of_range: bool = False, backend: str = "auto"
) -> Routing:
    """The routing in which expert index[t, k] works on token t with weight[t, k].

    Whatever made the choices, `expert_mlp` runs them: these are the `top_k_index` and `top_k_weights` that
    every router of transformers 5 hands to its experts. An expert that a token names twice works twice.

    Args:
        index: int32 or int64 [T, K], K at least 1.
        weight: [T, K], any floating dtype; differentiable.
        num_experts: E.
        drop_out_of_range: whether an index of E or more is no choice, as under expert parallelism, where it
            is some other device's expert. How many slots there are then depends on the values, for which a
            GPU is waited for; otherwise it is T·K.
        backend: "auto", "reference" or "native".

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, several devices, num_experts below 1, or an index below 0 or, unless such
            are dropped, of num_experts or more. A GPU's values are not looked at: there such an index stops
            the process's work on the GPU, as one out of a tensor's bounds does.
    """
    check_choices(index, weight, num_experts)
    num_tokens = index.shape[0]
    op = "routing_from_choices of which some are dropped" if drop_out_of_range else "routing_from_choices"
    if resolve(op, backend, index.device) == "native":
        order, *lists = torch.ops.pyvlm.routing_from_choices(index, num_experts, drop_out_of_range)
        by_choice = weight.flatten().to(reference.accumulation_dtype(weight.dtype))
        token, expert_offsets, token_offsets, slot = lists
        weights = by_choice.index_select(0, order)
        return Routing(token, weights, expert_offsets, token_offsets, slot, num_tokens)
    check_values_of_choices(index, num_experts, drop_out_of_range)
    tensors = reference.routing_from_choices(index, weight, num_experts, drop_out_of_range)
    return Routing(*tensors, num_tokens)


def _fake(index: Tensor, num_experts: int, drop_out_of_range: bool) -> tuple[Tensor, ...]:
    slots: Any = torch.library.get_ctx().new_dynamic_size() if drop_out_of_range else index.numel()

    def ints(size: Any) -> Tensor:
        return index.new_empty(size, dtype=torch.int32)

    order = index.new_empty(slots, dtype=torch.int64)
    return order, ints(slots), ints(num_experts + 1), ints(index.shape[0] + 1), ints(slots)


if _native.C is not None:  # it defines the schema
    torch.library.register_fake("pyvlm::routing_from_choices", _fake)

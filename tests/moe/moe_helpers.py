"""What several tests of the MoE family share."""

import torch
from torch import Tensor

from pyvlm.ops import Routing


def dense_weights(routing: Routing) -> Tensor:
    """The weights as a dense matrix [T, E], zero where there is no slot; differentiable."""
    empty = routing.weight.new_zeros(routing.num_tokens, routing.num_experts)
    return empty.index_put((routing.token.long(), routing.expert), routing.weight)


def chosen(routing: Routing) -> Tensor:
    """Bool [T, E]: is there a slot of the token and the expert."""
    mask = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool)
    mask[routing.token.long(), routing.expert] = True
    return mask


def check_lists(routing: Routing) -> None:
    """The invariants of every routing, whatever router made it."""
    slots, tokens, experts = len(routing.token), routing.num_tokens, routing.num_experts
    for index in (routing.token, routing.expert_offsets, routing.token_offsets, routing.slot):
        assert index.dtype == torch.int32
    assert routing.weight.shape == (slots,)
    assert ((routing.token >= 0) & (routing.token < tokens)).all()
    for offsets, size in ((routing.expert_offsets, experts), (routing.token_offsets, tokens)):
        assert offsets.shape == (size + 1,)
        assert (offsets[0], offsets[-1]) == (0, slots)
        assert (offsets.diff() >= 0).all()
    # Sorted by expert, then by token, and no pair twice.
    assert ((routing.expert * tokens + routing.token).diff() > 0).all()
    # `slot` is a permutation that sorts the slots by token, and then by expert.
    assert routing.slot.long().sort().values.equal(torch.arange(slots))
    by_token = routing.token[routing.slot.long()]
    assert by_token.equal(torch.repeat_interleave(torch.arange(tokens), routing.token_offsets.diff()).int())
    assert ((by_token.long() * experts + routing.expert[routing.slot.long()]).diff() > 0).all()


def random_layer(
    experts: int,
    hidden: int,
    intermediate: int,
    gated: bool = True,
    biases: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Random expert weights, as keyword arguments of `expert_mlp`."""
    rows = 2 * intermediate if gated else intermediate
    shapes = {"gate_up": (experts, rows, hidden), "down": (experts, hidden, intermediate)}
    if biases:
        shapes |= {"gate_up_bias": (experts, rows), "down_bias": (experts, hidden)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}

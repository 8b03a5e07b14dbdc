"""What the MoE ops refuse, each with one message that says what was given and what to do."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_helpers import random_layer
from torch import Tensor

from pyvlm.nn.moe import MoE
from pyvlm.ops import (
    Routing,
    balance_bias,
    expert_choice,
    expert_mlp,
    importance_loss,
    load_balancing_loss,
    merge_routings,
    router_z_loss,
    soft_moe,
    threshold_choice,
    token_choice,
)

T, E, H, I = 6, 3, 8, 5  # noqa: E741
READERS_OF_LOGITS: dict[str, Callable[[Tensor], Any]] = {
    "expert_choice": lambda x: expert_choice(x, 2, backend="native"),
    "expert_choice by the reference": lambda x: expert_choice(x, 2, backend="reference"),
    "token_choice": lambda x: token_choice(x, 2, backend="native"),
    "token_choice by the reference": lambda x: token_choice(x, 2, backend="reference"),
    "threshold_choice": lambda x: threshold_choice(x, torch.zeros(E), "native"),
    "threshold_choice by the reference": lambda x: threshold_choice(x, torch.zeros(E), "reference"),
    "load_balancing_loss": lambda x: load_balancing_loss(x, 2),
    "importance_loss": importance_loss,
    "router_z_loss": router_z_loss,
}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(T, E)


@pytest.fixture
def routing(logits: Tensor) -> Routing:
    return token_choice(logits, 2)


@pytest.mark.parametrize("reader", READERS_OF_LOGITS)
@pytest.mark.parametrize("row", [[0.0, torch.nan, 0.0], [torch.inf, 0.0, 0.0], [-torch.inf] * 3])
def test_logits_that_have_no_softmax(logits: Tensor, reader: str, row: list[float]) -> None:
    logits[4] = torch.tensor(row)
    with pytest.raises(
        ValueError, match=r"1 of 6 rows of the logits .* row 4 first \(\[.*\]\): the training"
    ):
        READERS_OF_LOGITS[reader](logits)


def test_one_broken_row_among_many(backend: str) -> None:
    logits = torch.randn(40_000, E)
    logits[39_999, 1] = torch.nan
    for offsets in (None, torch.tensor([0, 20_000, 40_000]), torch.arange(0, 40_001, 100)):
        with pytest.raises(ValueError, match=r"1 of 40000 rows of the logits .* row 39999 first"):
            expert_choice(logits, 2, offsets, backend)


@pytest.mark.parametrize("reader", READERS_OF_LOGITS)
def test_logits_of_a_wrong_kind(reader: str) -> None:
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        READERS_OF_LOGITS[reader](torch.zeros(T, E, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating-point tensor, got list"):
        READERS_OF_LOGITS[reader]([[0.0]])
    for shape in ([T], [2, T, E], [T, 0]):
        with pytest.raises(ValueError, match=r"must be \[tokens, experts\]"):
            READERS_OF_LOGITS[reader](torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"capacity": 2.0}, TypeError, "capacity must be an int, got 2.0"),
        ({"capacity": True}, TypeError, "capacity must be an int, got True"),
        ({"capacity": torch.tensor([1.0])}, TypeError, "int32 or int64, got torch.float32"),
        ({"capacity": torch.tensor([1, 1])}, ValueError, r"one a group, \[1\] on cpu, got \[2\]"),
        ({"capacity": torch.tensor([0])}, ValueError, "at least 1 in every group, got 0"),
        ({"group_offsets": torch.tensor([0.0, 6.0])}, TypeError, "int32 or int64, got torch.float32"),
        ({"group_offsets": torch.tensor([[0, 6]])}, ValueError, r"\[groups \+ 1\] on cpu, got \[1, 2\]"),
        ({"group_offsets": torch.tensor([0, 5])}, ValueError, "rise from 0 to 6.* ending in 5"),
        ({"group_offsets": torch.tensor([1, 6])}, ValueError, r"rise from 0 to 6.* got \[1, 6\]"),
        ({"group_offsets": torch.tensor([0, 4, 2, 6])}, ValueError, "rise from 0 to 6"),
        ({"num_slots": 7}, ValueError, "num_slots is 7, but the capacities and the groups give 6 slots"),
        (
            {"num_slots": 6, "group_offsets": torch.tensor([0, 2, 6])},
            ValueError,
            "num_slots is 6, but the capacities and the groups give 12 slots",
        ),
        ({"backend": "triton"}, RuntimeError, "expert_choice has no triton implementation"),
        ({"backend": "fast"}, ValueError, "backend='fast' is unknown"),
    ],
)
def test_expert_choice(
    logits: Tensor, backend: str, arguments: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        expert_choice(logits, **{"capacity": 2, "backend": backend, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 4}, ValueError, "top_k=4 is more than the 3 experts"),
        ({"top_k": "2"}, TypeError, "top_k must be an int, got '2'"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1"),
        ({"drop": "random"}, ValueError, "drop='random' is unknown"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \[3\], one an expert.* got \[2\]"),
        ({"bias": torch.zeros(3, dtype=torch.int64)}, TypeError, "bias must be floating-point"),
        ({"bias": torch.tensor([0.0, torch.nan, 0.0])}, ValueError, "bias holds NaN for expert 1"),
        ({"backend": "triton"}, RuntimeError, "token_choice has no triton implementation"),
    ],
)
def test_token_choice(
    logits: Tensor, backend: str, arguments: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        token_choice(logits, **{"top_k": 2, "backend": backend, **arguments})


def test_threshold_choice(logits: Tensor, backend: str) -> None:
    with pytest.raises(ValueError, match=r"thresholds must be \[3\], one an expert"):
        threshold_choice(logits, torch.zeros(4), backend)
    with pytest.raises(ValueError, match="thresholds holds NaN for expert 2"):
        threshold_choice(logits, torch.tensor([0.0, 0.0, torch.nan]), backend)
    with pytest.raises(RuntimeError, match="threshold_choice has no triton implementation"):
        threshold_choice(logits, torch.zeros(3), backend="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token": torch.zeros(12, dtype=torch.int64)}, TypeError, r"token must be int32, got torch\.int64"),
        ({"weight": torch.zeros(12).bfloat16()}, TypeError, "weight must be float32 or float64"),
        ({"weight": torch.zeros(11)}, ValueError, "12 tokens, 11 weights and 12 slots"),
        ({"slot": int32(0)}, ValueError, "12 tokens, 12 weights and 1 slots"),
        ({"slot": int32(0)[None]}, ValueError, "slot must be one-dimensional"),
        ({"num_tokens": 7}, ValueError, "num_tokens \\+ 1 = 8 entries, got 7"),
        ({"expert_offsets": int32(0)}, ValueError, "at least 2, got 1"),
    ],
)
def test_routings_that_do_not_fit_together(
    routing: Routing, change: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(routing, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": int32(*[6] * 12)}, "token holds indices from 6 to 6, outside 0 to 5"),
        ({"token": int32(-1, *[0] * 11)}, "token holds indices from -1 to 0, outside 0 to 5"),
        ({"slot": int32(*[12] * 12)}, "slot holds indices from 12 to 12, outside 0 to 11"),
        ({"expert_offsets": int32(0, 5, 3, 12)}, "expert_offsets must rise from 0 to 12"),
        ({"expert_offsets": int32(0, 5, 6, 11)}, "expert_offsets must rise from 0 to 12"),
        ({"token_offsets": int32(0, 2, 4, 6, 8, 10, 13)}, "token_offsets must rise from 0 to 12"),
    ],
)
def test_indices_out_of_range(
    routing: Routing, change: dict[str, Tensor], message: str, backend: str
) -> None:
    layer = random_layer(E, H, I, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        expert_mlp(torch.randn(T, H), replace(routing, **change), **layer, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, H)}, ValueError, r"must be \[tokens, hidden\], got \[2, 3, 8\]"),
        ({"x": torch.zeros(5, H)}, ValueError, "routing is of 6 tokens and x has 5"),
        ({"x": torch.zeros(T, H).double()}, TypeError, r"gate_up is torch\.float32 and x is torch\.float64"),
        ({"gate_up": torch.zeros(E, 2 * I, 7)}, ValueError, r"hidden 8\], got \[3, 10, 7\]"),
        ({"gate_up": torch.zeros(E, 9, H)}, ValueError, r"2 \* intermediate, hidden 8\], got \[3, 9, 8\]"),
        ({"down": torch.zeros(E, I, H)}, ValueError, r"down must be \[3, 8, 5\] .* got \[3, 5, 8\]"),
        ({"gated": False}, ValueError, r"down must be \[3, 8, 10\]"),
        ({"gate_up_bias": torch.zeros(E, I)}, ValueError, r"gate_up_bias must be \[3, 10\]"),
        ({"down_bias": torch.zeros(H)}, ValueError, r"down_bias must be \[3, 8\]"),
        ({"activation": "swish"}, ValueError, "activation='swish' is unknown; expected one of 'silu'"),
        ({"backend": "triton"}, RuntimeError, "Triton kernels run on CUDA tensors"),
    ],
)
def test_expert_mlp(routing: Routing, arguments: dict[str, Any], error: type, message: str) -> None:
    layer = random_layer(E, H, I, dtype=torch.float32)
    with pytest.raises(error, match=message):
        expert_mlp(**{"x": torch.zeros(T, H), "routing": routing, **layer, **arguments})


def test_a_routing_to_another_number_of_experts(routing: Routing) -> None:
    layer = random_layer(E + 1, H, I, dtype=torch.float32)
    with pytest.raises(ValueError, match="routing is to 3 experts and gate_up holds 4"):
        expert_mlp(torch.zeros(T, H), routing, **layer)


def test_soft_moe() -> None:
    layer = random_layer(E, H, I, gated=False, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"must be \[groups, tokens, hidden\], got \[6, 8\]"):
        soft_moe(torch.zeros(T, H), torch.zeros(H, E, 2), **layer)
    with pytest.raises(ValueError, match=r"\[hidden 8, experts 3, slots\], got \[8, 2, 2\]"):
        soft_moe(torch.zeros(1, T, H), torch.zeros(H, 2, 2), **layer)
    with pytest.raises(RuntimeError, match="soft_moe has no native implementation"):
        soft_moe(torch.zeros(1, T, H), torch.zeros(H, E, 2), **layer, backend="native")


def test_merge_routings(routing: Routing) -> None:
    rows = torch.arange(T)
    with pytest.raises(ValueError, match="at least one routing, got none"):
        merge_routings([], 4)
    with pytest.raises(ValueError, match="the same experts, got 3 and 5"):
        merge_routings([(routing, rows), (token_choice(torch.randn(T, 5), 1), rows)], 12)
    with pytest.raises(TypeError, match=r"rows must be int32 or int64, got torch\.bool"):
        merge_routings([(routing, torch.ones(T, dtype=torch.bool))], 12)
    with pytest.raises(ValueError, match=r"one row a token of its routing, \[6\], got \[5\]"):
        merge_routings([(routing, rows[:5])], 12)
    with pytest.raises(ValueError, match="rows lie from 1 to 6, outside the 6"):
        merge_routings([(routing, rows + 1)], 6)


def test_losses(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="form='switch' is unknown"):
        load_balancing_loss(logits, 2, form="switch")
    with pytest.raises(ValueError, match="top_k=4 is more than the 3 experts"):
        load_balancing_loss(logits, 4)
    with pytest.raises(ValueError, match=r"must both be \[experts\], got \[3\] and \[4\]"):
        balance_bias(torch.zeros(3), torch.zeros(4), 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"top_k": 5}, "top_k must be 1 to num_experts=4, got 5"),
        ({"capacity_factor": 0.0}, "capacity_factor must be above 0, got 0.0"),
        ({"capacity_factor": float("nan")}, "capacity_factor must be above 0, got nan"),
        ({"activation": "tanh"}, "activation='tanh' is unknown"),
        ({"image_router": "soft"}, "image_router='soft' is unknown"),
        ({"text_router": "expert_choice"}, "a token would depend on later ones"),
    ],
)
def test_layer_arguments(arguments: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": H, "intermediate_size": I, "num_experts": 4}
    with pytest.raises(ValueError, match=message):
        MoE(**{**sizes, **arguments})

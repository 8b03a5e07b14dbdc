"""Routings out of choices that were made elsewhere, against loops and against the experts run one by one."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from moe_helpers import check_lists, dense_weights, random_layer
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.ops import Routing, expert_mlp, routing_from_choices


@st.composite
def choices(draw: st.DrawFn, beyond: int = 0) -> tuple[Tensor, int]:
    """index [T, K] without twins in a row, T from 0 on, and E; experts up to `beyond` more than there are."""
    experts = draw(st.integers(1, 6))
    everyone = list(range(experts + beyond))
    top_k = draw(st.integers(1, len(everyone)))
    rows = draw(st.lists(st.permutations(everyone), max_size=11))
    return torch.tensor([row[:top_k] for row in rows], dtype=torch.int64).reshape(-1, top_k), experts


def slots_by_loops(index: Tensor, num_experts: int) -> list[tuple[int, int, int]]:
    """(expert, token, choice) of every slot, in order."""
    return sorted(
        (expert, token, k)
        for token, row in enumerate(index.tolist())
        for k, expert in enumerate(row)
        if expert < num_experts
    )


def assert_is(routing: Routing, index: Tensor, weight: Tensor, num_experts: int) -> None:
    expected = slots_by_loops(index, num_experts)
    assert routing.num_tokens == len(index)
    assert routing.num_experts == num_experts
    assert routing.expert.tolist() == [expert for expert, _, _ in expected]
    assert routing.token.tolist() == [token for _, token, _ in expected]
    assert routing.weight.tolist() == [weight[token, k].item() for _, token, k in expected]


@given(chosen=choices())
@example(chosen=(torch.zeros(0, 2).int(), 3))  # no tokens
@example(chosen=(torch.zeros(5, 1).int(), 3))  # experts without tokens
def test_every_choice_is_a_slot(backend: str, chosen: tuple[Tensor, int]) -> None:
    index, experts = chosen
    weight = torch.randn(index.shape)
    routing = routing_from_choices(index, weight, experts, backend=backend)
    check_lists(routing)
    assert_is(routing, index, weight, experts)
    assert len(routing.token) == index.numel()


@given(chosen=choices(beyond=2))
@example(chosen=(torch.full((4, 2), 3), 3))  # nothing is left
def test_choices_out_of_range_are_dropped(backend: str, chosen: tuple[Tensor, int]) -> None:
    index, experts = chosen
    weight = torch.randn(index.shape)
    routing = routing_from_choices(index, weight, experts, drop_out_of_range=True, backend=backend)
    check_lists(routing)
    assert_is(routing, index, weight, experts)


def test_many_tokens_on_any_number_of_threads(backend: str) -> None:
    # 80,000 slots: sorting them by token is worth several threads.
    index, weight = torch.randn(20_000, 70).topk(4).indices, torch.randn(20_000, 4)
    index[::7, 1] = 70
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            routing = routing_from_choices(index, weight, 70, drop_out_of_range=True, backend=backend)
            check_lists(routing)
            assert_is(routing, index, weight, 70)
    finally:
        torch.set_num_threads(threads)


def test_an_expert_named_twice_works_twice(backend: str) -> None:
    index = torch.tensor([[1, 1], [0, 1]])
    weight = torch.tensor([[0.5, 0.25], [2.0, 4.0]], dtype=torch.float64)
    routing = routing_from_choices(index, weight, 2, backend=backend)
    assert_is(routing, index, weight, 2)
    layer, x = random_layer(2, 3, 5), torch.randn(2, 3, dtype=torch.float64)
    once = routing_from_choices(
        torch.tensor([[0, 1]] * 2), torch.tensor([[0.0, 0.75], [2.0, 4.0]]).double(), 2, backend=backend
    )
    assert_conforms(expert_mlp(x, routing, **layer), expert_mlp(x, once, **layer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_float32_or_more_and_their_gradient_of_their_own_type(
    backend: str, dtype: torch.dtype
) -> None:
    index = torch.randn(9, 5).topk(3).indices.int()
    index[4, 1] = 5
    weight = torch.randn(9, 3).to(dtype).requires_grad_()
    routing = routing_from_choices(index, weight, 5, drop_out_of_range=True, backend=backend)
    assert routing.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    cotangent = torch.randn(9, 5)
    (dense_weights(routing) * cotangent).sum().backward()
    kept = index < 5
    expected = cotangent.gather(1, index.long().clamp(max=4)).to(dtype) * kept
    assert weight.grad.dtype == dtype
    assert weight.grad.equal(expected)


@pytest.mark.parametrize("drop", [False, True])
def test_gradcheck_through_the_experts(backend: str, drop: bool) -> None:
    index = torch.tensor([[3, 0], [1, 3], [0, 1], [1, 0]])
    layer, x = random_layer(3 if drop else 4, 3, 2), torch.randn(4, 3, dtype=torch.float64)

    def output(weight: Tensor) -> Tensor:
        routing = routing_from_choices(index, weight, len(layer["down"]), drop, backend)
        return expert_mlp(x, routing, **layer, backend=backend)

    assert torch.autograd.gradcheck(output, torch.randn(4, 2, dtype=torch.float64, requires_grad=True))


def test_choices_may_have_any_strides(backend: str) -> None:
    index, weight = torch.stack([torch.randperm(4)[:3] for _ in range(7)], 1).T, torch.randn(3, 7).T
    routing = routing_from_choices(index, weight, 4, backend=backend)
    assert_is(routing, index, weight, 4)


def test_a_device_is_waited_for_only_where_choices_are_dropped() -> None:
    """Shown on the meta device, which has no values to wait for."""
    index, weight = torch.zeros(3, 2, dtype=torch.int64, device="meta"), torch.ones(3, 2, device="meta")
    routing = routing_from_choices(index, weight, 4)
    assert [len(t) for t in (routing.token, routing.weight, routing.slot)] == [6, 6, 6]
    assert (len(routing.expert_offsets), len(routing.token_offsets)) == (5, 4)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        routing_from_choices(index, weight, 4, drop_out_of_range=True)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_opcheck(dtype: torch.dtype, drop: bool) -> None:
    index = torch.randn(9, 5).topk(3).indices.to(dtype)
    for given_index in (index, index.T.contiguous().T):
        torch.library.opcheck(torch.ops.pyvlm.routing_from_choices.default, (given_index, 5, drop))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("drop", [False, True])
def test_choices_compile_in_one_graph(drop: bool) -> None:
    layer = random_layer(4, 3, 2, dtype=torch.float32)
    x, index = torch.randn(9, 3), torch.randn(9, 4).topk(2).indices

    def output(weight: Tensor) -> Tensor:
        return expert_mlp(x, routing_from_choices(index, weight, 4, drop), **layer)

    weights = [torch.randn(9, 2).requires_grad_()]
    weights.append(weights[0].detach().clone().requires_grad_())
    compiled = torch.compile(output, fullgraph=True, backend="aot_eager")
    for run, weight in zip((compiled, output), weights, strict=True):
        run(weight).square().sum().backward()
    assert weights[0].grad.equal(weights[1].grad)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"index": torch.zeros(3, 2)}, TypeError, r"index must be int32 or int64, got torch\.float32"),
        ({"index": torch.zeros(3).int()}, ValueError, r"must be \[tokens, choices\] .* got \[3\]"),
        ({"index": torch.zeros(3, 0).int()}, ValueError, r"with a choice or more, got \[3, 0\]"),
        ({"weight": torch.ones(3, 2).int()}, TypeError, r"weight must be floating-point, got torch\.int32"),
        ({"weight": torch.ones(2, 3)}, ValueError, r"weight must be \[3, 2\] on cpu, .* got \[2, 3\] on cpu"),
        ({"weight": torch.ones(3, 2, device="meta")}, ValueError, "got .* on meta"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"num_experts": 2.0}, TypeError, r"num_experts must be an int, got 2\.0"),
        ({"index": torch.tensor([[0, 4]] * 3)}, ValueError, "experts from 0 to 4, outside 0 to 3"),
        ({"index": torch.tensor([[0, -1]] * 3)}, ValueError, "experts from -1 to 0, outside 0 to 3"),
        (
            {"index": torch.tensor([[4, -1]] * 3), "drop_out_of_range": True},
            ValueError,
            "experts from -1 to 4, outside 0 to 3",
        ),
        ({"backend": "triton"}, RuntimeError, "routing_from_choices has no triton implementation"),
    ],
)
def test_errors(backend: str, arguments: dict[str, Any], error: type, message: str) -> None:
    usual = {"index": torch.zeros(3, 2).int(), "weight": torch.ones(3, 2), "num_experts": 4}
    with pytest.raises(error, match=message):
        routing_from_choices(**{**usual, "backend": backend, **arguments})

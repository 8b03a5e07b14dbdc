"""The routers' losses, on inputs whose answer is known."""

import math

import pytest
import torch
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.ops import balance_bias, importance_loss, load_balancing_loss, router_z_loss, token_choice

LOSSES = {
    "deepspeed": lambda logits: load_balancing_loss(logits, 2),
    "deepspeed top 3": lambda logits: load_balancing_loss(logits, 3),
    "transformers": lambda logits: load_balancing_loss(logits, 2, form="transformers"),
    "importance": importance_loss,
    "z": router_z_loss,
}


def balanced(experts: int) -> Tensor:
    """Token t prefers expert t, then t + 1, …: every expert is chosen as often as any other at every rank."""
    scores = torch.arange(experts, 0, -1, dtype=torch.float64)
    return torch.stack([scores.roll(t) for t in range(experts)])


@pytest.mark.parametrize("experts", [2, 5])
def test_perfect_balance(experts: int) -> None:
    logits = balanced(experts)
    one = torch.ones((), dtype=torch.float64)
    for top_k in range(1, experts + 1):
        assert_conforms(load_balancing_loss(logits, top_k), one)
        assert_conforms(load_balancing_loss(logits, top_k, form="transformers"), one * top_k)
    assert_conforms(importance_loss(logits), one * 0)


def test_collapse_costs_as_much_as_there_are_experts() -> None:
    logits = torch.zeros(7, 4, dtype=torch.float64)
    logits[:, 2] = 1000.0
    four = torch.tensor(4.0, dtype=torch.float64)
    assert_conforms(load_balancing_loss(logits, 1), four)
    assert_conforms(load_balancing_loss(logits, 1, form="transformers"), four)
    # All weight on one of E experts: mean 1/E, variance (E − 1)/E².
    assert_conforms(importance_loss(logits), four - 1)


def test_z_loss_is_the_mean_square_of_logsumexp() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), -torch.inf]], dtype=torch.float64)
    expected = torch.tensor((math.log(2) ** 2 + math.log(3) ** 2) / 2, dtype=torch.float64)
    assert_conforms(router_z_loss(logits), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss: str) -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[loss], logits)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tokens_cost_nothing_and_still_differentiate(loss: str) -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    value = LOSSES[loss](logits)
    value.backward()
    assert value == 0
    assert logits.grad.shape == (0, 4)


@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_logits_are_computed_in_float32(loss: str) -> None:
    logits = torch.randn(50, 4).bfloat16()
    value = LOSSES[loss](logits)
    assert value.dtype == torch.float32
    assert value.equal(LOSSES[loss](logits.float()))


def test_descending_the_loss_balances_the_load() -> None:
    logits = (torch.randn(64, 4) + torch.tensor([2.0, 0.0, 0.0, 0.0])).requires_grad_()
    before = load_balancing_loss(logits, 1)
    (grad,) = torch.autograd.grad(before, logits)
    assert load_balancing_loss(logits - 50 * grad, 1) < before


def test_the_bias_balances_without_a_loss() -> None:
    logits = torch.randn(200, 4) + torch.tensor([1.5, 0.0, 0.0, -1.0])
    bias = torch.zeros(4)

    def counts() -> Tensor:
        return token_choice(logits, 1, bias=bias).expert_offsets.diff()

    start = counts()
    assert balance_bias(bias, start, 0.01).sign().tolist() == (50.0 - start).sign().tolist()
    for _ in range(200):
        bias = balance_bias(bias, counts(), 0.005)
    spread = counts().max() - counts().min()
    assert spread < 0.2 * (start.max() - start.min())

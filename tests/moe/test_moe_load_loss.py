"""V-MoE's load loss, against its definition token by token."""

import math

import pytest
import torch
from tolerance import assert_conforms

from pyvlm.ops import load_loss


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_definition(top_k: int) -> None:
    """Var / mean² of the chance of each expert that fresh noise on its logit keeps it among the chosen."""
    std = 0.3
    logits = torch.randn(7, 5, dtype=torch.float64)
    noisy = logits + std * torch.randn(7, 5, dtype=torch.float64)
    load = [0.0] * 5
    for clean, drawn in zip(logits.tolist(), noisy.tolist(), strict=True):
        needed = sorted(drawn)[-top_k]
        for e in range(5):
            load[e] += (1 - 0.5 * (1 + math.erf((needed - clean[e]) / std / math.sqrt(2)))) / 7
    mean = sum(load) / 5
    expected = sum((x - mean) ** 2 for x in load) / 5 / mean**2
    assert_conforms(load_loss(logits, noisy, top_k, std), torch.tensor(expected, dtype=torch.float64))


def test_the_chance_is_that_of_fresh_noise() -> None:
    """One token: the load of an expert is how often its noise, drawn again, would win against the others."""
    logits, std, draws = torch.tensor([[0.1, 0.0, -0.2]], dtype=torch.float64), 0.25, 200_000
    noisy = logits + std * torch.randn(1, 3, dtype=torch.float64)
    needed = noisy.topk(2).values[0, 1]
    chance = (logits + std * torch.randn(draws, 3, dtype=torch.float64) >= needed).double().mean(0)
    expected = chance.var(correction=0) / chance.mean() ** 2
    assert (load_loss(logits, noisy, 2, std) - expected).abs() < 0.01


def test_balance_costs_nothing_and_collapse_as_much_as_there_are_experts() -> None:
    balanced = torch.eye(4, dtype=torch.float64) * 9
    assert load_loss(balanced, balanced, 1, 0.1) < 1e-20
    collapsed = torch.tensor([[9.0, 0, 0, 0]] * 6, dtype=torch.float64)
    assert_conforms(load_loss(collapsed, collapsed, 1, 0.1), torch.tensor(3.0, dtype=torch.float64))


def test_gradients() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    noise = 0.25 * torch.randn(6, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: load_loss(x, x + noise, 2, 0.25), logits)


def test_no_tokens_cost_nothing_and_still_differentiate() -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    value = load_loss(logits, logits, 2, 0.25)
    value.backward()
    assert value == 0
    assert logits.grad.shape == (0, 4)


def test_bf16_logits_are_computed_in_float32() -> None:
    logits = torch.randn(50, 4).bfloat16()
    noisy = logits + torch.randn(50, 4).bfloat16() / 4
    value = load_loss(logits, noisy, 2, 0.25)
    assert value.dtype == torch.float32
    assert value.equal(load_loss(logits.float(), noisy.float(), 2, 0.25))


def test_what_it_refuses() -> None:
    logits = torch.randn(6, 3)
    with pytest.raises(ValueError, match=r"noisy_logits must be \[6, 3\] as the logits are, got \[5, 3\]"):
        load_loss(logits, logits[:5], 2, 0.1)
    with pytest.raises(ValueError, match="noise_std must be above 0, got 0"):
        load_loss(logits, logits, 2, 0)
    with pytest.raises(ValueError, match="top_k=4 is more than the 3 experts"):
        load_loss(logits, logits, 4, 0.1)
    with pytest.raises(ValueError, match="1 of 6 rows of the logits"):
        load_loss(logits, logits.index_fill(0, torch.tensor(2), torch.nan), 2, 0.1)

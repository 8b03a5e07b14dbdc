"""`expert_mlp` and `soft_moe` against a loop over tokens, and their derivatives."""

import pytest
import torch
import torch.nn.functional as F
from moe_helpers import dense_weights, random_layer
from tolerance import assert_close, assert_conforms
from torch import Tensor

from pyvlm.ops import Routing, expert_choice, expert_mlp, soft_moe, token_choice

ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": lambda x: x.clamp(min=0),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}

# tokens, experts, top_k, hidden, intermediate
SHAPES = {
    "ordinary": (24, 4, 2, 16, 12),
    "primes": (13, 3, 2, 7, 5),
    "one token": (1, 4, 2, 8, 4),
    "one expert": (5, 1, 1, 3, 2),
    "experts without tokens": (2, 8, 1, 5, 3),
    "no tokens": (0, 4, 2, 8, 4),
    "width one": (6, 2, 1, 1, 1),
}


def mlp(x: Tensor, e: int, layer: dict[str, Tensor], activation: str, gated: bool) -> Tensor:
    hidden = layer["gate_up"][e] @ x
    if "gate_up_bias" in layer:
        hidden = hidden + layer["gate_up_bias"][e]
    act = ACTIVATIONS[activation]
    half = len(hidden) // 2
    hidden = act(hidden[:half]) * hidden[half:] if gated else act(hidden)
    out = layer["down"][e] @ hidden
    return out + layer["down_bias"][e] if "down_bias" in layer else out


def by_loops(
    x: Tensor, routing: Routing, layer: dict[str, Tensor], activation: str = "silu", gated: bool = True
) -> Tensor:
    weights = dense_weights(routing)
    rows = [torch.zeros_like(row) for row in x]
    for t, e in weights.nonzero().tolist():
        rows[t] = rows[t] + weights[t, e] * mlp(x[t], e, layer, activation, gated)
    return torch.stack(rows) if rows else torch.zeros_like(x)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, backend: str) -> None:
    tokens, experts, top_k, hidden, intermediate = SHAPES[shape]
    layer = random_layer(experts, hidden, intermediate)
    x = torch.randn(tokens, hidden, dtype=torch.float64)
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    for routing in (
        token_choice(logits, top_k),
        token_choice(logits, top_k, capacity=1),
        expert_choice(logits, 2),
    ):
        assert_conforms(expert_mlp(x, routing, **layer, backend=backend), by_loops(x, routing, layer))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_kind_of_expert(activation: str, gated: bool, biases: bool, backend: str) -> None:
    layer = random_layer(3, 7, 5, gated, biases)
    x = torch.randn(11, 7, dtype=torch.float64)
    routing = token_choice(torch.randn(11, 3, dtype=torch.float64), 2)
    y = expert_mlp(x, routing, activation=activation, gated=gated, **layer, backend=backend)
    assert_conforms(y, by_loops(x, routing, layer, activation, gated))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_dtype(dtype: torch.dtype, backend: str) -> None:
    layer = {name: weight.to(dtype) for name, weight in random_layer(4, 16, 12).items()}
    x = torch.randn(33, 16).to(dtype)
    routing = token_choice(torch.randn(33, 4), 2)
    wide = {name: weight.double() for name, weight in layer.items()}
    y = expert_mlp(x, routing, **layer, backend=backend)
    assert y.dtype == dtype
    assert_close(y, by_loops(x.double(), routing, wide), plain=by_loops(x, routing, layer).to(dtype))


def test_rows_without_an_expert_are_zero(backend: str) -> None:
    layer = random_layer(2, 4, 3, biases=True)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    routing = expert_choice(torch.randn(6, 2, dtype=torch.float64), 1)
    untouched = routing.token_offsets.diff() == 0
    assert untouched.sum() >= 4
    y = expert_mlp(x, routing, **layer, backend=backend)
    y.sum().backward()
    assert (y[untouched] == 0).all()
    assert (x.grad[untouched] == 0).all()


def test_any_strides(backend: str) -> None:
    layer = random_layer(3, 6, 4)
    strided = {name: weight.transpose(1, 2).contiguous().transpose(1, 2) for name, weight in layer.items()}
    x = torch.randn(6, 10, dtype=torch.float64).T
    routing = token_choice(torch.randn(10, 3, dtype=torch.float64), 2)
    assert_conforms(
        expert_mlp(x, routing, **strided, backend=backend),
        expert_mlp(x.contiguous(), routing, **layer, backend=backend),
    )


def test_the_order_of_the_experts_weights_is_the_routings(backend: str) -> None:
    layer = random_layer(4, 6, 5)
    x, logits = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    permuted = {name: weight[order] for name, weight in layer.items()}
    y = expert_mlp(x, token_choice(logits, 2), **layer, backend=backend)
    assert_conforms(expert_mlp(x, token_choice(logits[:, order], 2), **permuted, backend=backend), y)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients(gated: bool, backend: str) -> None:
    layer = random_layer(3, 4, 3, gated, biases=True)
    names = list(layer)
    leaves = [tensor.requires_grad_() for tensor in layer.values()]
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, logits: Tensor, *weights: Tensor) -> Tensor:
        routing = token_choice(logits, 2, capacity=4, backend="reference")  # has a second derivative
        layer = dict(zip(names, weights, strict=True))
        return expert_mlp(x, routing, gated=gated, **layer, backend=backend)

    assert torch.autograd.gradcheck(run, (x, logits, *leaves))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, (x, logits, *leaves))


def test_experts_without_tokens_have_a_zero_gradient(backend: str) -> None:
    layer = {name: weight.requires_grad_() for name, weight in random_layer(3, 4, 2).items()}
    logits = torch.tensor([[5.0, 0.0, 0.0]] * 4, dtype=torch.float64)
    expert_mlp(
        torch.randn(4, 4, dtype=torch.float64), token_choice(logits, 1), **layer, backend=backend
    ).sum().backward()
    for weight in layer.values():
        assert weight.grad[0].abs().sum() > 0
        assert (weight.grad[1:] == 0).all()


def test_same_bits_every_time(backend: str) -> None:
    layer = {
        name: weight.requires_grad_() for name, weight in random_layer(4, 32, 16, dtype=torch.float32).items()
    }
    x, logits = torch.randn(128, 32, requires_grad=True), torch.randn(128, 4, requires_grad=True)
    leaves = [x, logits, *layer.values()]

    def run() -> list[Tensor]:
        y = expert_mlp(x, token_choice(logits, 3), **layer, backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    first = run()
    for _ in range(3):
        for again, result in zip(run(), first, strict=True):
            assert again.equal(result)


def test_autocast_computes_in_bf16_and_keeps_float32_leaves(backend: str) -> None:
    layer = {
        name: weight.requires_grad_() for name, weight in random_layer(4, 16, 8, dtype=torch.float32).items()
    }
    x, routing = torch.randn(20, 16), token_choice(torch.randn(20, 4), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = expert_mlp(x, routing, **layer, backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    halved = {name: weight.detach().bfloat16() for name, weight in layer.items()}
    assert y.equal(expert_mlp(x.bfloat16(), routing, **halved, backend=backend))
    assert all(weight.grad.dtype == torch.float32 for weight in layer.values())


def soft_moe_by_loops(x: Tensor, phi: Tensor, layer: dict[str, Tensor], scale: float) -> Tensor:
    y = torch.zeros_like(x)
    hidden, experts, slots = phi.shape
    for g, group in enumerate(x):
        logits = scale * torch.einsum(
            "nh,hs->ns",
            group / (group.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
            (phi / (phi.square().sum(0) + 1e-6).sqrt()).reshape(hidden, experts * slots),
        )
        inputs = logits.softmax(0).T @ group
        outputs = torch.stack([mlp(s, i // slots, layer, "gelu", gated=False) for i, s in enumerate(inputs)])
        y[g] = logits.softmax(1) @ outputs
    return y


@pytest.mark.parametrize(
    ("groups", "tokens", "experts", "slots"),
    [(2, 5, 3, 2), (1, 1, 1, 1), (3, 7, 2, 1), (0, 4, 2, 2)],
    ids=["ordinary", "all ones", "one slot", "no groups"],
)
def test_soft_moe(groups: int, tokens: int, experts: int, slots: int) -> None:
    layer = random_layer(experts, 6, 5, gated=False, biases=True)
    x = torch.randn(groups, tokens, 6, dtype=torch.float64)
    phi = torch.randn(6, experts, slots, dtype=torch.float64)
    assert_conforms(soft_moe(x, phi, scale=3.0, **layer), soft_moe_by_loops(x, phi, layer, 3.0))


def test_soft_moe_gradients() -> None:
    layer = random_layer(2, 3, 2, gated=True, biases=True)
    names = list(layer)
    leaves = [tensor.requires_grad_() for tensor in layer.values()]
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    phi = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, phi: Tensor, scale: Tensor, *weights: Tensor) -> Tensor:
        experts = dict(zip(names, weights, strict=True))
        return soft_moe(x, phi, scale=scale, activation="silu", gated=True, **experts)

    assert torch.autograd.gradcheck(run, (x, phi, scale, *leaves))


def test_soft_moe_of_a_zero_token_is_finite() -> None:
    layer = random_layer(2, 4, 3, gated=False)
    x = torch.zeros(1, 3, 4, dtype=torch.float64, requires_grad=True)
    phi = torch.randn(4, 2, 2, dtype=torch.float64)
    soft_moe(x, phi, **layer).sum().backward()
    assert x.grad.isfinite().all()


def test_soft_moe_in_bf16() -> None:
    layer = {name: weight.bfloat16() for name, weight in random_layer(2, 8, 6, gated=False).items()}
    x, phi = torch.randn(2, 9, 8).bfloat16(), torch.randn(8, 2, 3).bfloat16()
    wide = {name: weight.double() for name, weight in layer.items()}
    y = soft_moe(x, phi, **layer)
    plain = soft_moe_by_loops(x, phi, layer, 1.0)
    assert y.dtype == torch.bfloat16
    assert_close(y, soft_moe_by_loops(x.double(), phi.double(), wide, 1.0), plain=plain)

"""The native experts: sizes that cross their tiles, few tokens and many, bit by bit, and as torch ops."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe.cases import SMALL_CASES, ExpertCase
from moe_helpers import random_layer
from tolerance import assert_close
from torch import Tensor

from pyvlm.ops import Routing, expert_choice, expert_mlp, token_choice

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Layer = dict[str, Tensor]


def make_layer(
    experts: int, hidden: int, intermediate: int, gated: bool, biases: bool, dtype: torch.dtype
) -> Layer:
    layer = random_layer(experts, hidden, intermediate, gated, biases)
    fan_in = {"gate_up": hidden, "down": intermediate}
    return {name: (weight * fan_in.get(name, 1) ** -0.5).to(dtype) for name, weight in layer.items()}


def results(
    x: Tensor,
    routing: Routing,
    layer: Layer,
    grad_y: Tensor,
    backend: str,
    dtype: torch.dtype,
    **options: object,
) -> dict[str, Tensor]:
    """The output and every gradient."""
    weight_dtype = torch.promote_types(dtype, torch.float32)
    leaves = {"x": x.to(dtype), "weight": routing.weight.to(weight_dtype)}
    leaves |= {name: weight.to(dtype) for name, weight in layer.items()}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    routed = replace(routing, weight=leaves["weight"])
    y = expert_mlp(leaves["x"], routed, **{name: leaves[name] for name in layer}, backend=backend, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y.to(dtype))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def assert_right(x: Tensor, routing: Routing, layer: Layer, **options: object) -> None:
    grad_y = torch.randn(x.shape).to(x.dtype)
    actual = results(x, routing, layer, grad_y, "native", x.dtype, **options)
    plain = results(x, routing, layer, grad_y, "reference", x.dtype, **options)
    expected = results(x, routing, layer, grad_y, "reference", torch.float64, **options)
    for name, tensor in actual.items():
        assert_close(tensor, expected[name], plain=plain[name], name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_sizes(case: ExpertCase, dtype: torch.dtype) -> None:
    layer = make_layer(case.experts, case.hidden, case.intermediate, True, True, dtype)
    assert_right(torch.randn(case.tokens, case.hidden).to(dtype), case.route(case.logits()), layer)


def test_more_depth_than_stays_in_a_cache() -> None:
    layer = make_layer(1, 1300, 700, True, False, torch.float32)
    assert_right(torch.randn(300, 1300), token_choice(torch.randn(300, 1), 1), layer)


def test_experts_in_several_batches() -> None:
    # 32 MB of packed operands are made at a time: 2 of the 4 experts forward, and one backward.
    layer = make_layer(4, 1000, 200, True, True, torch.float32)
    assert_right(torch.randn(1500, 1000), token_choice(torch.randn(1500, 4), 4), layer)


@pytest.mark.parametrize("tokens", [5, 40], ids=["few tokens", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kinds_of_experts(
    activation: str, gated: bool, biases: bool, dtype: torch.dtype, tokens: int
) -> None:
    layer = make_layer(2, 40, 36, gated, biases, dtype)
    x = 2 * torch.randn(tokens, 40)
    assert_right(
        x.to(dtype), token_choice(torch.randn(tokens, 2), 1), layer, activation=activation, gated=gated
    )


@settings(max_examples=60)
@given(data=st.data())
def test_any_routing(data: st.DataObject) -> None:
    data.draw(st.random_module())
    tokens, experts = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 6))
    hidden, intermediate = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    dtype = data.draw(st.sampled_from(DTYPES))
    logits = torch.randn(tokens, experts)
    top_k = data.draw(st.integers(1, experts))
    routing = data.draw(
        st.sampled_from(
            [
                token_choice(logits, top_k),
                token_choice(logits, top_k, capacity=3),
                expert_choice(logits, 1 + tokens // 3),
            ]
        )
    )
    layer = make_layer(
        experts, hidden, intermediate, data.draw(st.booleans()), data.draw(st.booleans()), dtype
    )
    gated = layer["gate_up"].shape[1] != intermediate
    assert_right(torch.randn(tokens, hidden).to(dtype), routing, layer, gated=gated)


@pytest.mark.parametrize("value", [-200.0, 200.0, -1e9, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pre_activations_of_any_size(activation: str, dtype: torch.dtype, value: float) -> None:
    # Where x is zero the bias is the whole pre-activation.
    layer = make_layer(1, 8, 8, False, False, dtype) | {"gate_up_bias": torch.full((1, 8), value).to(dtype)}
    for tokens in (3, 40):
        x = torch.zeros(tokens, 8, dtype=dtype)
        assert_right(x, token_choice(torch.zeros(tokens, 1), 1), layer, activation=activation, gated=False)


@pytest.mark.parametrize("tokens", [6, 300], ids=["few tokens", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, tokens: int) -> None:
    layer = make_layer(3, 96, 72, True, True, dtype)
    x, grad_y = torch.randn(tokens, 96).to(dtype), torch.randn(tokens, 96)
    routing = token_choice(torch.randn(tokens, 3), 2)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            runs.append(results(x, routing, layer, grad_y, "native", dtype))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(run[name].equal(runs[0][name]) for name in run)


@pytest.mark.parametrize("tokens", [6, 100], ids=["few tokens", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_token_breaks_no_other(dtype: torch.dtype, tokens: int) -> None:
    layer = make_layer(2, 40, 24, True, True, dtype)
    x, routing = torch.randn(tokens, 40).to(dtype), token_choice(torch.randn(tokens, 2), 1)
    y = expert_mlp(x, routing, **layer, backend="native")
    x[3] = torch.nan
    broken = expert_mlp(x, routing, **layer, backend="native")
    others = torch.arange(tokens) != 3
    assert broken[3].isnan().all()
    assert broken[others].equal(y[others])


@pytest.mark.parametrize("frozen", ["x", "weight", "gate_up", "down", "gate_up_bias", "down_bias"])
def test_what_is_frozen_changes_no_other_gradient(frozen: str) -> None:
    layer = make_layer(3, 40, 24, True, True, torch.float32)
    x, routing, grad_y = torch.randn(50, 40), token_choice(torch.randn(50, 3), 2), torch.randn(50, 40)
    expected = results(x, routing, layer, grad_y, "native", torch.float32)
    leaves = {"x": x, "weight": routing.weight, **layer}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    y = expert_mlp(x, replace(routing, weight=leaves["weight"]), **layer, backend="native")
    y.backward(grad_y)
    assert leaves[frozen].grad is None
    assert all(leaf.grad.equal(expected[name]) for name, leaf in leaves.items() if name != frozen)


def test_only_x_and_the_pre_activation_are_saved() -> None:
    layer = {
        name: weight.requires_grad_()
        for name, weight in make_layer(3, 40, 24, True, True, torch.float32).items()
    }
    x, routing = torch.randn(50, 40, requires_grad=True), token_choice(torch.randn(50, 3), 2)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        expert_mlp(x, routing, **layer, backend="native")
    given = [routing.token, routing.weight, routing.expert_offsets, routing.token_offsets, routing.slot]
    pre_activation = len(routing.token) * layer["gate_up"].shape[1] * 4
    assert sum(saved.values()) == sum(t.nbytes for t in (x, *layer.values(), *given)) + pre_activation


def test_nothing_is_kept_without_a_gradient() -> None:
    layer = make_layer(3, 40, 24, True, False, torch.float32)
    x, routing = torch.randn(50, 40), token_choice(torch.randn(50, 3), 2)
    arguments = (x, *tensors_of(routing), *layer.values(), "silu", True, None, None)
    assert torch.ops.pyvlm.expert_mlp(*arguments, False)[1].numel() == 0
    assert torch.ops.pyvlm.expert_mlp(*arguments, True)[1].shape == (100, 48)


def tensors_of(routing: Routing) -> tuple[Tensor, ...]:
    return routing.token, routing.weight, routing.expert_offsets, routing.token_offsets, routing.slot


@pytest.mark.parametrize("tokens", [6, 40], ids=["few tokens", "tiles"])
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, biases: bool, tokens: int) -> None:
    layer = make_layer(3, 16, 12, True, biases, dtype)
    routing = token_choice(torch.randn(tokens, 3), 2)
    x, grad_y = torch.randn(tokens, 16).to(dtype), torch.randn(tokens, 16).to(dtype)
    weights = (
        layer["gate_up"],
        layer["down"],
        "silu",
        True,
        layer.get("gate_up_bias"),
        layer.get("down_bias"),
    )
    _, hidden = torch.ops.pyvlm.expert_mlp(x, *tensors_of(routing), *weights, True)
    for needs in ([True] * 6, [False, True, True, False, True, False]):
        needs = [need and (biases or i < 4) for i, need in enumerate(needs)]
        torch.library.opcheck(
            torch.ops.pyvlm.expert_mlp_backward.default,
            (grad_y, x, hidden, *tensors_of(routing), *weights, needs),
        )
    for tensor in (x, routing.weight, *layer.values()):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.pyvlm.expert_mlp.default, (x, *tensors_of(routing), *weights, True))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(compiler: str) -> None:
    layer = make_layer(3, 16, 12, True, True, torch.float32)
    routing, grad_y = token_choice(torch.randn(40, 3), 2), torch.randn(40, 16)

    def out_and_grads(call: object) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (torch.ones(40, 16), *layer.values())]
        y = call(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]

    def experts(x: Tensor, *weights: Tensor) -> Tensor:
        return expert_mlp(x, routing, **dict(zip(layer, weights, strict=True)), backend="native") * 2

    compiled = torch.compile(experts, fullgraph=True, backend=compiler)
    for actual, expected in zip(out_and_grads(compiled), out_and_grads(experts), strict=True):
        assert actual.equal(expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("capacity", [None, 9], ids=["", "slots that depend on the data"])
def test_router_and_experts_compile_in_one_graph(capacity: int | None) -> None:
    layer = make_layer(3, 16, 12, True, False, torch.float32)

    def run(x: Tensor, logits: Tensor) -> Tensor:
        return expert_mlp(x, token_choice(logits, 2, capacity, backend="native"), **layer, backend="native")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (20, 33):
        x, logits = torch.randn(tokens, 16), torch.randn(tokens, 3)
        assert compiled(x, logits).equal(run(x, logits))


def test_a_second_derivative_is_refused() -> None:
    layer = {
        name: weight.requires_grad_()
        for name, weight in make_layer(2, 8, 8, True, False, torch.float64).items()
    }
    x = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    y = expert_mlp(x, token_choice(torch.randn(20, 2), 1), **layer, backend="native")
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative .* use backend="reference"'):
        grad.sum().backward()

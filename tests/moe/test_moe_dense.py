"""Layers made of dense MLPs, which begin as what they were made of; and soft MoE as a layer."""

from typing import Any

import pytest
import torch
from moe_layers import layout_of
from tolerance import assert_close, assert_conforms
from torch import nn

from pyvlm.models.language import SwiGLU
from pyvlm.nn import MoE, SoftMoE
from pyvlm.nn.experts import Experts
from pyvlm.ops import soft_moe

H, I = 8, 12  # noqa: E741


class Plain(nn.Module):
    def __init__(self, up: str, down: str, activation: Any, bias: bool) -> None:
        super().__init__()
        self.up, self.down, self.activation_fn = up, down, activation
        self.add_module(up, nn.Linear(H, I, bias=bias))
        self.add_module(down, nn.Linear(I, H, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.down)(self.activation_fn(getattr(self, self.up)(x)))


class Gated(nn.Module):
    def __init__(self, activation: Any, bias: bool) -> None:
        super().__init__()
        self.act_fn = activation
        self.gate_proj, self.up_proj = (nn.Linear(H, I, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(I, H, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.llama.modeling_llama import LlamaMLP

    return LlamaMLP(
        transformers.LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=2, mlp_bias=True)
    )


def clip() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.clip.modeling_clip import CLIPMLP

    return CLIPMLP(
        transformers.CLIPVisionConfig(
            hidden_size=H, intermediate_size=I, num_attention_heads=2, hidden_act="gelu"
        )
    )


MLPS = {
    "the language model's": lambda: SwiGLU(H, I),
    "a vision tower's": lambda: nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)),
    "gated, GELU by tanh, biases": lambda: Gated(nn.GELU(approximate="tanh"), bias=True),
    "gated, SiLU": lambda: Gated(nn.SiLU(), bias=False),
    "plain, ReLU squared": lambda: Plain("up_proj", "down_proj", lambda x: x.relu().square(), bias=False),
    "plain, ReLU, biases": lambda: Plain("fc1", "fc2", nn.ReLU(), bias=True),
    "transformers' Llama": llama,
    "transformers' CLIP": clip,
}
ROUTERS: list[dict[str, Any]] = [
    {"image_router": "token_choice"},
    {"image_router": "token_choice", "image_experts": 2},
    {"image_router": "token_choice", "top_k": 3, "bias_rate": 0.1},
]


@pytest.mark.parametrize("options", ROUTERS, ids=str)
@pytest.mark.parametrize("name", MLPS)
def test_a_layer_begins_as_the_mlp_that_it_was_made_of(name: str, options: dict[str, Any]) -> None:
    mlp = MLPS[name]().double()
    layer = MoE.from_dense(mlp, 5, **options)
    x = torch.randn(2, 9, H, dtype=torch.float64)
    y, stats = layer(x, layout_of(["tt0000ttt", "t11ttttt0"]))
    assert_conforms(y.detach(), mlp(x).detach())
    assert (stats.dispatched.sum(0) > 0).sum() > 1  # several experts, and yet the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision_too(dtype: torch.dtype) -> None:
    mlp = SwiGLU(H, I).to(dtype)
    layer = MoE.from_dense(mlp, 4)
    x = torch.randn(1, 50, H, dtype=dtype)
    y, _ = layer(x, layout_of(["t" * 50]))
    assert_close(y.detach(), mlp.double()(x.double()).detach(), mlp.to(dtype)(x).detach())


def test_copies_are_exact_and_each_learns_for_itself() -> None:
    mlp = SwiGLU(H, I).eval()
    layer = MoE.from_dense(mlp, 3)
    assert not layer.training
    for e in range(3):
        assert layer.gate_up_proj[e].equal(mlp.gate_up_proj.weight)
        assert layer.down_proj[e].equal(mlp.down_proj.weight)
    with torch.no_grad():
        layer.gate_up_proj[0].zero_()
    assert layer.gate_up_proj[1].equal(mlp.gate_up_proj.weight)
    assert mlp.gate_up_proj.weight.abs().sum() > 0
    assert all(p.requires_grad for p in layer.parameters())


def test_of_an_mlp_without_memory_nothing_is_drawn() -> None:
    with torch.device("meta"):
        mlp = SwiGLU(H, I)
    state = torch.get_rng_state()
    layer = MoE.from_dense(mlp, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert layer.gate_up_proj.shape == (4, 2 * I, H)


def test_the_activation_can_be_named() -> None:
    layer = MoE.from_dense(Gated(nn.Hardswish(), bias=False), 2, activation="silu")
    assert layer.activation == "silu"


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (
            Gated(nn.Hardswish(), bias=False),
            "Hardswish.* of Gated is none that experts have; expected one of",
        ),
        (nn.Linear(H, I), "Linear with the linears none is no MLP"),
        (nn.Sequential(nn.Linear(H, I), nn.GELU()), r"Sequential with the linears \['0'\] is no MLP"),
    ],
    ids=str,
)
def test_modules_that_are_no_mlp(mlp: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoE.from_dense(mlp, 2)


def test_one_of_two_biases_is_no_mlp_that_experts_can_copy() -> None:
    mlp = Gated(nn.SiLU(), bias=True)
    mlp.gate_proj.bias = None
    with pytest.raises(ValueError, match=r"Gated with the linears .*gate_proj.* is no MLP"):
        MoE.from_dense(mlp, 2)


@pytest.mark.parametrize("options", [{}, {"gated": True, "activation": "silu", "bias": False}])
def test_soft_moe(options: dict[str, Any]) -> None:
    layer = SoftMoE(H, I, 3, slots_per_expert=4, **options).double()
    x = torch.randn(2, 10, H, dtype=torch.float64)
    weights = layer.gate_up_proj, layer.down_proj
    rest = {"gate_up_bias": layer.gate_up_bias, "down_bias": layer.down_bias, "scale": layer.scale}
    rest |= {"activation": layer.activation, "gated": layer.gated}
    y = layer(x)
    assert_conforms(y.detach(), soft_moe(x, layer.phi, *weights, **rest).detach())
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("kind", [MoE, SoftMoE])
def test_biases_start_at_zero_and_weights_do_not(kind: type[Experts]) -> None:
    layer = kind(H, I, 3, bias=True)
    assert not layer.gate_up_bias.any()
    assert not layer.down_bias.any()
    assert all(p.isfinite().all() and p.any() for n, p in layer.named_parameters() if "bias" not in n)


def test_biases_reach_the_output() -> None:
    layer = MoE(H, I, 2, bias=True)
    with torch.no_grad():
        layer.down_bias.fill_(3.0)
        layer.down_proj.zero_()
    y, _ = layer(torch.randn(1, 4, H), layout_of(["tttP"]))
    assert_conforms(y.detach(), torch.tensor([3.0, 3.0, 3.0, 0.0])[None, :, None].expand_as(y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots_per_expert": 0}, "slots_per_expert must be at least 1, got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"activation": "tanh"}, "activation='tanh' is unknown"),
    ],
)
def test_soft_moe_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftMoE(**{"hidden_size": H, "intermediate_size": I, "num_experts": 2, **options})

"""Experts modules of transformers on `pyvlm.ops.expert_mlp`: equal to their own eager forward, or refused.

They are judged by the tolerance policy: the truth is the eager forward in float64, plain PyTorch is the eager
forward in the dtype at hand.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experts_calls import count_calls
from tolerance import assert_close
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from pyvlm.integrations.transformers.experts import NAME, apply, register

register()

T, K, E, H, I = 13, 2, 5, 24, 18  # noqa: E741


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_calls(monkeypatch)


def config_of(implementation: str, **settings: Any) -> SimpleNamespace:
    return SimpleNamespace(_experts_implementation=implementation, **settings)


def biased(has_gate: bool) -> Callable[[Any], nn.Module]:
    """Experts with biases, which no served model of transformers has; eager is its batched_mm."""

    @use_experts_implementation(has_bias=True, has_gate=has_gate)
    class BiasedExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            up, rows = ("gate_up_proj", 2 * I) if has_gate else ("up_proj", I)
            self.num_experts = E
            self.register_parameter(up, nn.Parameter(torch.empty(E, rows, H)))
            self.register_parameter(f"{up}_bias", nn.Parameter(torch.empty(E, rows)))
            self.down_proj = nn.Parameter(torch.empty(E, H, I))
            self.down_proj_bias = nn.Parameter(torch.empty(E, H))
            self.act_fn = ACT2FN[config.hidden_act]

        def forward(self, *args: Tensor) -> Tensor:
            return batched_mm_experts_forward(self, *args)

    return BiasedExperts


def mixtral(act: str, num_experts: int = E) -> nn.Module:
    sizes = {"num_local_experts": num_experts, "hidden_size": H, "intermediate_size": I}
    return MixtralExperts(config_of(NAME, hidden_act=act, **sizes))


def nemotron(act: str) -> nn.Module:
    sizes = {"n_routed_experts": E, "hidden_size": H, "moe_intermediate_size": I, "moe_latent_size": None}
    return NemotronHExperts(config_of(NAME, mlp_hidden_act=act, **sizes))


def deepseek(act: str) -> nn.Module:
    sizes = {"n_routed_experts": E, "num_local_experts": E, "hidden_size": H, "moe_intermediate_size": I}
    return DeepseekV3Experts(config_of(NAME, hidden_act=act, **sizes))


MODULES: dict[str, Callable[[], nn.Module]] = {
    **{f"mixtral, {act}": lambda act=act: mixtral(act) for act in ("silu", "gelu", "gelu_new", "relu")},
    "deepseek, gelu_pytorch_tanh": lambda: deepseek("gelu_pytorch_tanh"),
    "nemotron, relu2": lambda: nemotron("relu2"),
    "biased": lambda: biased(True)(config_of(NAME, hidden_act="silu")),
    "biased, no gate": lambda: biased(False)(config_of(NAME, hidden_act="gelu")),
}


def randomised(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module.to(dtype)


def choices(tokens: int = T, num_experts: int = E) -> tuple[Tensor, Tensor]:
    """top_k_index and top_k_weights; the last expert is nobody's choice."""
    scores = torch.randn(tokens, num_experts)
    scores[:, -1] = -torch.inf
    weights, index = scores.softmax(-1).topk(K)
    return index, weights


def run(
    module: nn.Module, implementation: str, x: Tensor, index: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Output and gradients of a module under an implementation."""
    module.config._experts_implementation = implementation
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = module(x, index, weights)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    inputs = {"x": x, "top_k_weights": weights, **dict(module.named_parameters())}
    grads = torch.autograd.grad(y, list(inputs.values()), cotangent.to(y.dtype), allow_unused=True)
    found = {name: g for name, g in zip(inputs, grads, strict=True) if g is not None}
    return {"y": y.detach()} | {f"gradient of {name}": g for name, g in found.items()}


def assert_equals_eager(
    module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, autocast: bool = False
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, eager = (run(module, name, x, index, weights) for name in (NAME, "eager"))
    exact = run(copy.deepcopy(module).double(), "eager", x.double(), index, weights.double())
    assert ours.keys() == eager.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype
        # Under autocast float32 holds numbers that were rounded to bfloat16.
        dtype = torch.bfloat16 if autocast else value.dtype
        assert_close(value.to(dtype), exact[name], eager[name].to(dtype), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODULES)
def test_experts_equal_eager(kind: str, dtype: torch.dtype, calls: list[int]) -> None:
    module = randomised(MODULES[kind](), dtype)
    index, weights = choices()
    assert_equals_eager(module, torch.randn(T, H).to(dtype), index, weights.to(dtype))
    assert calls == [T]


def test_float32_weights_of_bfloat16_experts() -> None:
    module = randomised(mixtral("silu"), torch.bfloat16)
    index, weights = choices()
    assert_equals_eager(module, torch.randn(T, H).bfloat16(), index, weights)


@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_any_number_of_tokens(tokens: int) -> None:
    assert_equals_eager(randomised(mixtral("silu")), torch.randn(tokens, H), *choices(tokens))


def test_no_tokens() -> None:
    module = randomised(mixtral("silu"))
    found = run(module, NAME, torch.randn(0, H), *choices(0))
    assert found["y"].shape == (0, H)
    assert not found["gradient of gate_up_proj"].any()


def test_autocast() -> None:
    assert_equals_eager(randomised(mixtral("silu")), torch.randn(T, H), *choices(), autocast=True)


def test_experts_of_other_devices_are_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = randomised(mixtral("silu")), torch.randn(T, H)
    index, weights = choices()
    index[::2, 0] = E
    with pytest.raises(ValueError, match="experts from 0 to 5, outside 0 to 4"):
        run(module, NAME, x, index, weights)
    if hasattr(module, "_is_expert_parallel"):
        module._is_expert_parallel = True
        assert_equals_eager(copy.deepcopy(module), x, index, weights)
    else:  # older transformers' own experts refuse them; that there are several processes tells
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not run(module, NAME, x, index, weights)["gradient of top_k_weights"][::2, 0].any()


@pytest.mark.usefixtures("fresh_compiler")
def test_experts_compile_in_one_graph() -> None:
    module, x = randomised(mixtral("silu")), torch.randn(T, H)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outputs = []
    for call in (module, compiled):
        torch.manual_seed(1)
        y = call(x, *choices())
        outputs.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    assert all(map(torch.equal, *outputs))


class OwnGate(MixtralExperts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate.clamp(max=7) * up


def test_experts_that_are_refused_say_why() -> None:
    settings = {"num_local_experts": E, "hidden_size": H, "intermediate_size": I, "hidden_act": "silu"}
    own_gate = OwnGate(config_of(NAME, **settings))
    normed, transposed, rows, act = (mixtral("silu") for _ in range(4))
    normed.has_post_expert_norm = True
    transposed.is_transposed = True
    rows.is_concatenated = False
    act.act_fn = ACT2FN["mish"]
    for module, reason in (
        (own_gate, "OwnGate cannot .*its gate is one of its own"),
        (normed, "MixtralExperts cannot .*normalises each expert's output"),
        (transposed, r"MixtralExperts cannot .*\[experts, in, out\].* copied at every step"),
        (rows, "MixtralExperts cannot .*gate and up projections take turns"),
        (act, "MixtralExperts cannot .*activation MishActivation is none of silu, gelu"),
    ):
        with pytest.raises(ValueError, match=reason):
            randomised(module)(torch.randn(T, H), *choices())


def test_experts_outside_a_model_cannot_be_set() -> None:
    alone = nn.ModuleList([mixtral("silu")])
    alone[0].config._experts_implementation = "eager"
    (change,) = apply(alone)
    assert change.kernel is None
    assert "no part of the model lets SimpleNamespace be set" in change.reason

"""Against outputs and gradients of the original authors' code: vmoe, flaxformer, DeepSpeed, transformers."""

import conformance
import pytest
import torch
from conformance import Case
from moe.moe_helpers import chosen, dense_weights
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.ops import (
    expert_choice,
    expert_mlp,
    load_balancing_loss,
    router_z_loss,
    soft_moe,
    token_choice,
)

ACTIVATION = {"swish": "silu", "gelu": "gelu_tanh"}  # flaxformer's names


class Inputs:
    """A case's inputs and parameters as leaves in one dtype, and the check of their gradients."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.dtype = case, dtype
        self.suffix = "64" if dtype == torch.float64 else ""
        self.leaves = {
            name.split(".", 1)[1]: tensor.to(dtype).requires_grad_()
            for name, tensor in case.tensors.items()
            if name.startswith(("input.", "param."))
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.leaves[name]

    def __contains__(self, name: str) -> bool:
        return name in self.leaves

    def linear(self, name: str) -> Tensor:
        """Weights stored as [E, in, out], in the order of `expert_mlp`."""
        return self[name].transpose(1, 2)

    def check(self, name: str, actual: Tensor) -> None:
        expected = self.case[f"output{self.suffix}.{name}"]
        assert_conforms(actual.detach().reshape(expected.shape), expected, name)

    def check_gradients(self, outputs: dict[str, Tensor], names: tuple[str, ...] | None = None) -> None:
        loss = sum((self.case[f"cotangent.{name}"].to(self.dtype) * y).sum() for name, y in outputs.items())
        prefix = f"grad{self.suffix}."
        names = names or tuple(n.removeprefix(prefix) for n in self.case.tensors if n.startswith(prefix))
        grads = torch.autograd.grad(loss, [self[name] for name in names])
        for name, grad in zip(names, grads, strict=True):
            assert_conforms(grad, self.case[prefix + name], f"gradient of {name}", gradient=True)


def dtypes_of(case: Case) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if "output64.y" in case else [torch.float32]


@pytest.mark.parametrize("case", conformance.cases("moe/expert_choice"))
def test_expert_choice(case: Case) -> None:
    settings = case.settings
    groups, size, experts = settings["groups"], settings["group_size"], settings["num_experts"]
    for dtype in dtypes_of(case):
        inputs = Inputs(case, dtype)
        x = inputs["x"].flatten(0, 1)
        logits = x @ inputs["router"]
        inputs.check("router_logits", logits)
        routing = expert_choice(logits, settings["capacity"], torch.arange(groups + 1) * size)

        index = case["output.token_index"].transpose(1, 2)  # [G, C, E]
        expected = torch.zeros(groups, size, experts, dtype=torch.bool).scatter_(1, index, True)
        assert_conforms(chosen(routing).view_as(expected), expected, "chosen tokens")
        combine = case[f"output{inputs.suffix}.combine"].sum(-1)
        assert_conforms(dense_weights(routing).detach().view_as(combine), combine, "gates")

        if "w_in" in inputs:
            weights = inputs.linear("w_in"), inputs.linear("w_out"), "gelu", False
            y = expert_mlp(x, routing, *weights, inputs["b_in"], inputs["b_out"])
        else:
            gate_up = torch.cat([inputs.linear("w_gate"), inputs.linear("w_up")], dim=1)
            activation = ACTIVATION[settings.get("activation", "swish")]
            y = expert_mlp(x, routing, gate_up, inputs.linear("w_down"), activation)
        inputs.check("y", y)
        if "output.router_z_loss" in case:
            inputs.check("router_z_loss", router_z_loss(logits))
        inputs.check_gradients({"y": y.view_as(inputs["x"])})


@pytest.mark.parametrize("case", conformance.cases("moe/deepspeed_top2"))
def test_deepspeed_gates(case: Case) -> None:
    """The gating alone: kept routes, weights, auxiliary loss, and their gradients to the logits."""
    settings, inputs = case.settings, Inputs(case)
    top_k, capacity = settings["k"], settings["capacity"]
    drop = {"position": "position", "probs": "priority"}[settings["drop_policy"]]
    routing = token_choice(inputs["logits"], top_k, capacity, drop=drop)
    assert_conforms(chosen(routing), case["output.dispatch_mask"].any(-1), "kept routes")
    assert len(routing.token) == top_k * settings["tokens"] - settings["dropped_routes"]
    gates = dense_weights(routing)
    assert_conforms(gates.detach(), case["output.combine_weights"].sum(-1), "gates")
    l_aux = load_balancing_loss(inputs["logits"], top_k, form="deepspeed")
    inputs.check("l_aux", l_aux)
    # A gate stands in one slot of the original's [tokens, experts, slots]: the cotangent there is its own.
    cotangent = (case["cotangent.combine_weights"] * case["output.dispatch_mask"]).sum(-1)
    loss = (cotangent * gates).sum() + case["cotangent.l_aux"] * l_aux
    (grad,) = torch.autograd.grad(loss, inputs["logits"])
    assert_conforms(grad, case["grad.logits"], "gradient of the logits", gradient=True)


@pytest.mark.parametrize("case", conformance.cases("moe/deepspeed_top2"))
def test_deepspeed_layer(case: Case) -> None:
    settings, inputs = case.settings, Inputs(case)
    top_k = settings["k"]
    drop = {"position": "position", "probs": "priority"}[settings["drop_policy"]]
    x = inputs["x"].flatten(0, 1)
    logits = x @ inputs["router"].T
    routing = token_choice(logits, top_k, settings["capacity"], drop=drop)
    gate_up = torch.cat([inputs.linear("w_gate"), inputs.linear("w_up")], dim=1)
    y = expert_mlp(x, routing, gate_up, inputs.linear("w_down")).view_as(inputs["x"])
    inputs.check("y", y)
    l_aux = load_balancing_loss(logits, top_k, form="deepspeed")
    names = ("x", "router", "w_gate", "w_up", "w_down")
    inputs.check_gradients({"y": y, "l_aux": l_aux}, names)


@pytest.mark.parametrize("case", conformance.cases("moe/transformers_experts"))
def test_transformers_experts(case: Case) -> None:
    settings, inputs = case.settings, Inputs(case)
    top_k = settings["top_k"]
    x = inputs["x"].flatten(0, 1)
    logits = x @ inputs["router"].T
    inputs.check("router_logits", logits)
    routing = token_choice(logits, top_k, normalize=settings["norm_topk_prob"])
    expected = torch.zeros_like(logits).scatter(1, case["output.topk_index"], case["output.topk_weight"])
    assert_conforms(dense_weights(routing).detach(), expected, "gates")
    y = expert_mlp(x, routing, inputs["gate_up"], inputs["down"]).view_as(inputs["x"])
    inputs.check("y", y)
    layers = [logits] + [t for name, t in inputs.leaves.items() if name.startswith("extra_router_logits")]
    loss = load_balancing_loss(torch.cat(layers), top_k, form="transformers")
    inputs.check("load_balancing_loss", loss)
    inputs.check_gradients({"y": y, "load_balancing_loss": loss})


@pytest.mark.parametrize("case", conformance.cases("moe/soft_moe"))
def test_soft_moe(case: Case) -> None:
    for dtype in dtypes_of(case):
        inputs = Inputs(case, dtype)
        y = soft_moe(
            inputs["x"],
            inputs["mu"],
            inputs.linear("w_in"),
            inputs.linear("w_out"),
            scale=inputs["scale"],
            gate_up_bias=inputs["b_in"],
            down_bias=inputs["b_out"],
        )
        inputs.check("y", y)
        inputs.check_gradients({"y": y})

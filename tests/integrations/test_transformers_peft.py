"""LoRA (peft) on models that run on pyvlm: attention projections and experts."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
pytest.importorskip("peft", reason="peft, an optional package, is not installed")
import peft
from integrations.transformers_models import FAMILIES
from torch import Tensor

from pyvlm.integrations.transformers import accelerate, restore

EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llava", {"target_modules": ["q_proj", "v_proj"]}),
        ("gemma3", {"target_modules": ["q_proj", "k_proj", "o_proj"]}),
        ("mixtral", {"target_modules": ["q_proj"], **EXPERTS}),
    ],
)
def test_adapters_get_the_gradients_that_transformers_gives(name: str, target: dict[str, list[str]]) -> None:
    family = FAMILIES[name]
    plain = family.model(attn_implementation="eager", experts_implementation="eager")
    batch = family.batch(plain)
    # A row's first token is told by padding, which sees nothing here and a mean of everything in eager.
    told = batch["attention_mask"].cumsum(1) > 1
    labels = torch.where(told, batch["input_ids"], -100)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **target))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected_loss, expected = step()
    report = accelerate(model)
    kernels = {change.kernel for change in report.changes}
    assert {"pyvlm.ops.span_attention", "pyvlm.ops.linear_cross_entropy"} <= kernels
    assert ("pyvlm.ops.expert_mlp" in kernels) == (name == "mixtral")
    loss, gradients = step()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    assert all("lora_" in key for key in gradients)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-5)
    restore(model)
    torch.testing.assert_close(step()[0], expected_loss, rtol=0, atol=0)

"""Models of transformers on a GPU, on pyvlm's kernels against their own attention, experts and layers.

On the CPU one of them runs: the integrations' own tests have them all.
"""

from typing import Any

import pytest
import torch
from gpu.devices import on
from tolerance import assert_close
from torch import Tensor

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
from integrations.test_transformers_models import ROWS, as_float64, gradients, logits
from integrations.transformers_models import FAMILIES

from pyvlm.integrations.transformers import accelerate, restore

# By name, what is served beside attention, norms and the loss. They bring a vision tower's features in the
# text; images that see themselves; soft caps; chunks; packed windows of images; levels added to the text,
# and experts; experts in every layer.
ON_THE_GPU = {
    "llava": {"mlp"},
    "gemma3": {"mlp"},
    "gemma2": {"mlp"},
    "llama4": {"mlp"},
    "qwen2_5_vl": {"mlp"},
    "qwen3_vl_moe": {"mlp", "experts"},
    "mixtral": {"experts"},
}
WITH_A_ROUTER = ("llama4", "qwen3_vl_moe", "mixtral")

each_model = pytest.mark.parametrize(
    ("device", "name"),
    [on("cpu", "llava", name="-llava"), *(on("cuda", n, name=f"-{n}") for n in ON_THE_GPU)],
)


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items()}


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_and_gradients_are_those_of_their_own(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    if name in WITH_A_ROUTER and dtype == torch.bfloat16:
        pytest.skip("a near tie between experts falls as the layers before it round")
    family = FAMILIES[name]
    model = family.model(dtype, attn_implementation="eager")
    batch = family.batch(model, ROWS.get(name))
    wide, wide_batch = as_float64(model, family, batch)
    expected, expected_gradients = logits(wide, wide_batch), gradients(wide, wide_batch)
    model, batch = model.to(device), moved(batch, device)
    plain, plain_gradients = logits(model, batch), gradients(model, batch)
    report = accelerate(model)
    served = {change.part for change in report.changes if change.kernel}
    assert served >= {"attention", "norm", "loss"} | ON_THE_GPU[name]
    assert_close(logits(model, batch).cpu(), expected, plain.cpu(), "logits")
    ours = gradients(model, batch)
    assert ours.keys() == expected_gradients.keys()
    # A bias of keys has no gradient but rounding: all are measured against the largest of the model.
    largest = max(g.abs().max().item() for g in expected_gradients.values())
    for parameter, gradient in ours.items():
        near = expected_gradients[parameter], plain_gradients[parameter].cpu()
        assert_close(gradient.cpu(), *near, parameter, terms=largest)


@each_model
def test_generates_the_same_tokens(device: torch.device, name: str) -> None:
    family = FAMILIES[name]
    model = family.model(attn_implementation="eager")
    batch = moved(family.batch(model), device)
    model = model.to(device)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**batch, **options)
    accelerate(model)
    assert model.generate(**batch, **options).tolist() == expected.tolist()
    restore(model)
    assert model.generate(**batch, **options).tolist() == expected.tolist()


@each_model
def test_a_loss_is_that_of_the_model(device: torch.device, name: str) -> None:
    family = FAMILIES[name]
    model = family.model(attn_implementation="eager")
    batch = moved(family.batch(model), device)
    model = model.to(device)
    real = batch["attention_mask"].bool()
    real &= real.roll(1, 1)  # what padding foretells is nobody's matter; a row's first token has no label
    labels = batch["input_ids"].where(real, -100)
    expected = model(**batch, labels=labels).loss
    accelerate(model)
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected, rtol=1e-4, atol=1e-5)

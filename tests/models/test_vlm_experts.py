"""A whole model with experts of every kind: causal in training and in generation, saved with its state."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from models.tiny_experts import EXPERTS, assert_no_logit_depends_on_what_comes_later, model_of
from models.tiny_vlm import IMAGE_ID, batch, pictures, tiny_config, tiny_vlm, tokens
from tolerance import assert_conforms

from pyvlm.models import VLM
from pyvlm.models.config import MoEConfig
from pyvlm.models.inputs import default_layout
from pyvlm.models.language import slice_layout
from pyvlm.nn import MoE, RouterOptions


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("experts", "rule"), [*((name, "mmca") for name in EXPERTS), ("split", "causal"), ("split", "mmca_image")]
)
def test_no_logit_depends_on_later_tokens_or_images(experts: str, rule: str, training: bool) -> None:
    model = model_of(EXPERTS[experts], attention_rule=rule).train(training)
    assert_no_logit_depends_on_what_comes_later(model, torch.device("cpu"))


@pytest.mark.parametrize("experts", EXPERTS)
def test_generation_token_by_token_equals_one_pass(experts: str) -> None:
    model = model_of(EXPERTS[experts]).eval()
    input_ids, real = batch(tokens(2, "image", 3, "image", 4), tokens(1, "image", 5), tokens(7))
    images = pictures(3)
    layout = default_layout(model.config, input_ids, real)
    full = model(input_ids, images, real).logits
    seen = layout.kind != 0
    # Prompts up to the last image; then one token at a time. The rows are padded on the left.
    start = int((input_ids == IMAGE_ID).any(0).nonzero().max()) + 1
    cache = model.new_cache(layout.length)
    pieces = [model(input_ids[:, :start], images, layout=slice_layout(layout, 0, start), cache=cache).logits]
    for i in range(start, layout.length):
        new = model(input_ids[:, i : i + 1], layout=slice_layout(layout, 0, i + 1), cache=cache)
        assert new.moe_stats == []
        pieces.append(new.logits)
    assert len(pieces) == 5
    assert_conforms(torch.cat(pieces, dim=1)[seen], full[seen])


@pytest.mark.parametrize("noise", [None, "gaussian", "gumbel"])
@pytest.mark.parametrize("text_router", ["token_choice", "threshold_choice"])
def test_gradient_checkpointing_changes_nothing(text_router: str, noise: str | None) -> None:
    """Neither the state nor the noise of a router differs when backward computes a layer again."""
    options = {"text_router": text_router, "image_router": "token_choice", "noise": noise}
    model = model_of(options)
    input_ids, real = batch(tokens(2, "image", 9), tokens(1, "image", 6))
    images, labels = pictures(2), input_ids.masked_fill((input_ids == IMAGE_ID) | (real == 0), -100)
    gradients, states = [], []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model.language.gradient_checkpointing = checkpointing
        model.zero_grad()
        output = model(input_ids, images, real, labels)
        output.loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        states.append([stats.dispatched for stats in output.moe_stats])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_conforms(checkpointed, plain)
    assert all(a.equal(b) for a, b in zip(*states, strict=True))


def test_the_routers_state_is_saved_with_the_model(tmp_path: Any) -> None:
    model = model_of({"text_router": "threshold_choice", "image_router": "token_choice", "bias_rate": 0.1})
    model.save_pretrained(tmp_path / "model")
    again = VLM.from_pretrained(tmp_path / "model")
    ours, theirs = model.state_dict(), again.state_dict()
    names = {f"language.layers.{i}.mlp.{name}" for i in (0, 2) for name in ("thresholds", "balance_bias")}
    assert names <= theirs.keys()
    assert all(theirs[name].equal(tensor) for name, tensor in ours.items())
    assert not theirs["language.layers.0.mlp.thresholds"][0].equal(torch.full((4,), 0.25).double())


def test_a_model_without_experts_takes_no_statistics() -> None:
    model = tiny_vlm(moe=None)
    model.update_router(model(torch.tensor([tokens(3)])).moe_stats)


def test_the_config_offers_every_option_with_the_layers_defaults() -> None:
    config = MoEConfig(layers=[0], num_experts=4, intermediate_size=8)
    options = RouterOptions(num_experts=4)
    for field in fields(RouterOptions):
        assert getattr(config, field.name) == getattr(options, field.name)
    extra = MoEConfig.model_fields.keys() - {field.name for field in fields(RouterOptions)}
    assert extra == {"layers", "intermediate_size", "activation", "gated", "bias"}


def test_the_config_reaches_the_layer() -> None:
    options = {"image_router": "token_choice", "top_k": 1, "token_capacity_factor": 1.5, "noise": "gaussian"}
    options |= {"load_loss_coef": 0.1, "normalize": "before_drop"}
    experts = {"activation": "gelu", "gated": False, "bias": True}
    layer = model_of(options | experts).language.layers[2].mlp
    assert isinstance(layer, MoE)
    assert layer.options == RouterOptions(num_experts=4, **options)
    assert (layer.activation, layer.gated) == ("gelu", False)
    assert layer.gate_up_bias.shape == (4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 4}, "top_k must be 1 to num_experts=3, got 4"),
        ({"image_experts": 3}, "image_experts must leave experts for both modalities, 1 to 2, got 3"),
        ({"text_router": "expert_choice"}, "text_router"),
        ({"noise": "gumbel", "top_k": 1}, "second of two choices"),
        ({"load_loss_coef": 1.0}, 'expected noise="gaussian", got None'),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(moe={"layers": [1], "num_experts": 3, "intermediate_size": 8} | options)

"""A dense model becomes one with experts: the same at first, and a model like any other afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_vlm_forward import labelled
from tiny_vlm import batch, pictures, tiny_config, tiny_vlm, tokens
from tolerance import assert_close, assert_conforms
from torch import Tensor

from pyvlm.models import VLM, LoRAConfig, MoEConfig, PartialLoRAConfig, upcycle, with_adapters
from pyvlm.nn import MoE

STAGE_3 = {"layers": "every_second", "num_experts": 4, "image_router": "token_choice", "top_k": 2}


def experts(**options: Any) -> MoEConfig:
    return MoEConfig.model_validate(STAGE_3 | options)


def dense(dtype: torch.dtype = torch.float64) -> VLM:
    return tiny_vlm(dtype, moe=None)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    input_ids, real = batch(tokens(2, "image", 3, "image", 2), tokens(1, "image", 2))
    return input_ids, pictures(3, dtype), real


def logits_of(model: VLM, input_ids: Tensor, images: Tensor, real: Tensor) -> Tensor:
    """Of all tokens but padding, which experts leave alone and an MLP does not."""
    return model(input_ids, images, real).logits[real == 1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("capacity", [None, 4.0])
@pytest.mark.parametrize("normalize", ["after_drop", "before_drop"])
def test_identical_experts_compute_what_the_mlp_did(
    normalize: str, capacity: float | None, training: bool
) -> None:
    """A capacity of 4 · 2/4 of the tokens drops nothing."""
    model = dense().train(training)
    options = {"normalize": normalize, "token_capacity_factor": capacity}
    options["eval_token_capacity_factor"] = capacity
    new = upcycle(model, experts(**options))
    assert [type(layer.mlp) is MoE for layer in new.language.layers] == [True, False, True]
    arguments = inputs()
    assert_conforms(logits_of(new, *arguments), logits_of(model, *arguments))


def test_equal_in_float32_too() -> None:
    arguments = inputs()
    single = arguments[0], arguments[1].float(), arguments[2]
    model = dense(torch.float32)
    sparse = logits_of(upcycle(model, experts()), *single)
    assert_close(sparse, expected=logits_of(dense(), *arguments), plain=logits_of(model, *single))


def test_weights_that_do_not_add_up_to_one_are_another_model() -> None:
    model, arguments = dense(), inputs()
    logits = logits_of(upcycle(model, experts(normalize="none")), *arguments)
    assert not torch.isclose(logits, logits_of(model, *arguments)).any()


def test_all_but_the_experts_is_the_very_tensors() -> None:
    model = dense()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    old_ids = {i for i, _ in before.values()}
    new = upcycle(model, experts())
    same = {name for name, p in new.named_parameters() if id(p) in old_ids}
    replaced = {
        f"language.layers.{i}.mlp.{linear}_proj.weight" for i in (0, 2) for linear in ("gate_up", "down")
    }
    assert same == before.keys() - replaced
    assert all(id(dict(new.named_parameters())[name]) == before[name][0] for name in same)
    # The dense model is as it was, and remains a dense model.
    assert {name: id(p) for name, p in model.named_parameters()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert model.config.language.moe is model.language.config.moe is None
    assert not model.parts()["moe"]
    for expert in new.language.layers[2].mlp.gate_up_proj:
        assert torch.equal(expert, model.language.layers[2].mlp.gate_up_proj.weight)
    assert len(new.parts()["moe"]) == 2 * 3


def test_routers_are_drawn_from_the_seed_alone() -> None:
    model = dense()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    routers = [upcycle(model, experts(), seed).language.layers[0].mlp.gate.weight for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(routers[0], routers[1])
    assert not torch.isclose(routers[0], routers[2]).any()
    layers = upcycle(model, experts()).language.layers
    assert not torch.isclose(layers[0].mlp.gate.weight, layers[2].mlp.gate.weight).any()
    assert 0.01 < routers[0].std() < 0.03


def test_the_config_says_what_the_model_is(tmp_path: Path) -> None:
    new = upcycle(dense(), experts(token_capacity_factor=1.5))
    moe = new.config.language.moe
    assert new.language.config.moe == moe
    assert new.config.language.moe_layers == [0, 2]
    assert (moe.intermediate_size, moe.activation, moe.gated, moe.bias) == (20, "silu", True, False)
    assert moe.token_capacity_factor == new.language.layers[0].mlp.options.token_capacity_factor == 1.5
    new.save_pretrained(tmp_path / "model")
    again = VLM.from_pretrained(tmp_path / "model")
    assert again.config == new.config
    ours, theirs = new.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    arguments = inputs()
    assert_conforms(again(*arguments).logits, new(*arguments).logits)


def test_it_trains() -> None:
    """Copies part from each other: each expert works on tokens of its own."""
    new = upcycle(dense(), experts()).train()
    input_ids, images, real = inputs()
    optimizer = torch.optim.SGD(new.parts()["moe"], lr=0.1)
    output = new(input_ids, images, real, labelled(input_ids, real))
    output.loss.backward()
    optimizer.step()
    assert output.aux_loss > 0
    layer = new.language.layers[0].mlp
    assert layer.gate.weight.grad.abs().sum() > 0
    assert not torch.equal(layer.gate_up_proj[0], layer.gate_up_proj[1])


def test_generation_goes_on() -> None:
    model = dense()
    new, arguments = upcycle(model, experts()), inputs()
    expected = model.generate(*arguments, max_new_tokens=4)
    assert torch.equal(new.generate(*arguments, max_new_tokens=4), expected)


@pytest.mark.parametrize("options", [{"intermediate_size": 8}, {"activation": "gelu"}, {"bias": True}])
def test_experts_that_are_no_copies_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"upcycling copies MLPs of {name} .*, got {name} .*: leave it out"):
        upcycle(dense(), experts(**options))


def test_what_cannot_be_upcycled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has experts already, in the layers \[1\]"):
        upcycle(tiny_vlm(), experts())
    with pytest.raises(ValueError, match="merge_lora it first"):
        upcycle(with_adapters(dense(), lora=LoRAConfig(rank=2)), experts())
    with pytest.raises(ValueError, match=r"the MLPs have language.partial_lora"):
        upcycle(with_adapters(dense(), partial_lora=PartialLoRAConfig(rank=2)), experts())
    with pytest.raises(ValueError, match=r"moe.layers \[3\] do not exist"):
        upcycle(dense(), experts(layers=[3]))


def test_partial_lora_in_the_attention_stays() -> None:
    config = PartialLoRAConfig(rank=2, modules=["attention"])
    model = with_adapters(dense(), partial_lora=config)
    torch.nn.init.normal_(model.language.layers[0].attention.o_proj.lora_b.weight)
    new, arguments = upcycle(model, experts()), inputs()
    assert_conforms(logits_of(new, *arguments), logits_of(model, *arguments))
    assert new.config.language.partial_lora == config


def test_every_second_layer_in_a_configuration() -> None:
    language = tiny_config(moe=STAGE_3).language
    assert language.moe.layers == language.moe_layers == [0, 2]
    assert language.moe.intermediate_size == 20
    with pytest.raises(ValidationError, match="every_second"):
        tiny_config(moe=STAGE_3 | {"layers": "every_third"})

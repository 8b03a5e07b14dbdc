"""Models of transformers whose experts run on `pyvlm.ops.expert_mlp`: equal to eager, or refused by name.

They are tiny and random, each of a family that routes in its own way. The tolerance policy judges them: the
truth is the eager model in float64, plain PyTorch is the eager model in float32.
"""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from experts_calls import count_calls
from tolerance import assert_close
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3VLMoeForConditionalGeneration

from pyvlm.integrations.transformers.experts import KERNEL, NAME, apply, register

register()

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 39,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 20, "output_router_logits": True},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 3},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt_oss": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        r"GptOssExperts .*its gate is one of its own",
    ),
    "aria_text": (
        {"moe_num_experts": 4, "moe_topk": 2},
        r"AriaExperts .*\[experts, in, out\].* copied at every step",
    ),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_calls(monkeypatch)


def make(model_type: str, **settings: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **settings}))
    model.set_experts_implementation("eager")
    return model.eval()


def make_qwen3_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    tokens = {"image": 35, "video": 36, "vision_start": 37, "vision_end": 38}
    config = AutoConfig.for_model(
        "qwen3_vl_moe",
        text_config={**SIZES, **EXPERTS, "head_dim": 8, "rope_parameters": rope},
        vision_config=vision,
        **{f"{name}_token_id": token for name, token in tokens.items()},
    )
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.set_experts_implementation("eager")
    return model.eval()


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 34, (2, 9), generator=generator)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "qwen3_vl_moe":
        ids[:, 1:7] = torch.tensor([37, 35, 35, 35, 35, 38])
        inputs["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        inputs["mm_token_type_ids"] = (ids == 35).int()
    else:
        inputs["attention_mask"][0, :3] = 0  # left padding
    return inputs


def step(model: PreTrainedModel) -> dict[str, Tensor]:
    """Logits, losses and gradients of a training step."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs_of(model).items()}
    output = model(**inputs)
    output.loss.backward()
    found = {"logits": output.logits, "loss": output.loss}
    if getattr(output, "aux_loss", None) is not None:
        found["aux_loss"] = output.aux_loss
    grads = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach().clone() for name, t in (found | grads).items()}


def assert_step_equals_eager(model: PreTrainedModel, names: list[str], calls: list[int]) -> None:
    eager, exact = step(model), step(copy.deepcopy(model).double())
    changes = apply(model)
    assert [(c.module, c.part, c.kernel, c.reason) for c in changes] == [
        (name, "experts", KERNEL, "") for name in names
    ]
    assert not calls
    ours = step(model)
    assert calls == [18] * len(names)
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        assert_close(value, exact[name].double(), eager[name], name)


@pytest.mark.parametrize("model_type", MODELS)
def test_models_equal_eager(model_type: str, calls: list[int]) -> None:
    model = make(model_type, **MODELS[model_type])
    layers = [1] if model_type == "deepseek_v3" else [0, 1]  # its first layer is dense
    assert_step_equals_eager(model, [f"model.layers.{i}.mlp.experts" for i in layers], calls)


def test_a_vlm_equals_eager_and_only_its_language_model_changes(calls: list[int]) -> None:
    model = make_qwen3_vl()
    names = [f"model.language_model.layers.{i}.mlp.experts" for i in range(2)]
    assert_step_equals_eager(model, names, calls)
    assert model.get_experts_implementation() == {"": "eager", "vision_config": "eager", "text_config": NAME}


@pytest.mark.parametrize("model_type", [*MODELS, "qwen3_vl_moe"])
def test_generation_token_for_token(model_type: str, calls: list[int]) -> None:
    model = make_qwen3_vl() if model_type == "qwen3_vl_moe" else make(model_type, **MODELS[model_type])
    model.config.output_router_logits = (
        False  # in transformers itself it cannot be with left padding and a cache
    )
    inputs = inputs_of(model)
    inputs.pop("labels")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    apply(model)
    assert model.generate(**inputs, max_new_tokens=12, do_sample=False).equal(expected)
    assert set(calls) == {18, 2}  # the prompts, and then a token of each


@pytest.mark.parametrize("before", ["eager", "grouped_mm", "batched_mm"])
def test_undo_puts_back_what_was_there(before: str) -> None:
    model = make_qwen3_vl()
    model.set_experts_implementation({"": "eager", "text_config": before})
    implementations = model.get_experts_implementation()
    config = model.config.to_json_string(use_diff=False)
    parameters = {name: id(p) for name, p in model.state_dict(keep_vars=True).items()}
    changes = apply(model)
    assert model.config.to_json_string(use_diff=False) == config
    assert {name: id(p) for name, p in model.state_dict(keep_vars=True).items()} == parameters
    for change in changes:
        change.undo()
        assert model.get_experts_implementation() == implementations


def test_what_is_on_pyvlm_stays_so() -> None:
    model = make("olmoe", **MODELS["olmoe"])
    apply(model)
    assert [(c.kernel, c.undo) for c in apply(model)] == [(KERNEL, None)] * 2


def test_loading_by_name(tmp_path: Path, calls: list[int]) -> None:
    make("olmoe", **MODELS["olmoe"]).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", experts_implementation=NAME)
    model(**inputs_of(model))
    assert calls == [18, 18]
    model.save_pretrained(tmp_path / "again")
    plain, again = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("plain", "again"))
    assert plain == again


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_are_refused_stay_as_they_were(model_type: str, calls: list[int]) -> None:
    settings, reason = REFUSED[model_type]
    model = make(model_type, **settings)
    if not model._can_set_experts_implementation():
        pytest.skip(f"this transformers has the experts of {model_type} outside of its interface")
    before = step(model)
    model.set_experts_implementation(NAME)
    with pytest.raises(ValueError, match=reason):
        model(**inputs_of(model))
    model.set_experts_implementation("eager")
    changes = apply(model)
    assert [(c.module, c.kernel, c.undo) for c in changes] == [
        (f"model.layers.{i}.mlp.experts", None, None) for i in range(2)
    ]
    for change in changes:
        assert "stays on 'eager'" in change.reason
    assert all(map(torch.equal, step(model).values(), before.values()))
    assert not calls


def test_llama4_is_refused() -> None:
    """Its router's scores multiply the experts' inputs, and every expert sees every token."""
    model = make("llama4_text", intermediate_size_mlp=20, num_local_experts=2, head_dim=8)
    changes = apply(model)
    assert [c.module for c in changes] == [f"model.layers.{i}.feed_forward.experts" for i in range(2)]
    for change in changes:
        assert (change.kernel, change.undo) == (None, None)
        assert "Llama4TextExperts does not dispatch through transformers' experts interface" in change.reason


def test_all_experts_of_a_config_change_or_none() -> None:
    model = make("olmoe", **MODELS["olmoe"])
    model.model.layers[1].mlp.experts.act_fn = nn.Tanh()
    first, second = apply(model)
    reason = "its activation Tanh is none of silu, gelu, gelu_tanh, quick_gelu, relu, relu2"
    assert second.reason == f"OlmoeExperts stays on 'eager': {reason}"
    assert first.reason == (
        "OlmoeExperts stays on 'eager': "
        f"it has its setting in common with model.layers.1.mlp.experts: {reason}"
    )
    assert (first.kernel, second.kernel) == (None, None)
    assert model.config._experts_implementation == "eager"


def test_weights_that_no_kernel_takes() -> None:
    model = make("olmoe", **MODELS["olmoe"])
    for layer in model.model.layers:
        down = layer.mlp.experts.down_proj
        layer.mlp.experts.down_proj = nn.Parameter(down.to(torch.float8_e4m3fn), requires_grad=False)
    assert all("its weights are torch.float8_e4m3fn" in change.reason for change in apply(model))
    (first, *_) = apply(make("olmoe", **MODELS["olmoe"]).to("meta"))
    assert "there is no kernel for torch.float32 on meta" in first.reason


def test_gradient_checkpointing() -> None:
    model = make("qwen3_moe", **MODELS["qwen3_moe"]).train()
    apply(model)
    plain = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # the name that 5.17 has too
    checkpointed = step(model)
    assert plain.keys() == checkpointed.keys()
    assert all(map(torch.equal, plain.values(), checkpointed.values()))


def test_lora_of_the_experts_equals_eager(calls: list[int]) -> None:
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(make("qwen3_moe", **MODELS["qwen3_moe"]), config)
    eager, exact = step(model), step(copy.deepcopy(model).double())
    assert sum("experts" in name and "lora" in name for name in eager) == 8
    changes = apply(model)
    assert len(changes) == 2
    assert {c.kernel for c in changes} == {KERNEL}
    ours = step(model)
    assert calls == [18, 18]
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        assert_close(value, exact[name].double(), eager[name], name)

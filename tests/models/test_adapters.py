"""Partial LoRA and LoRA in whole models: what they change, whom they reach, and how they are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from test_vlm_forward import labelled
from tiny_vlm import IMAGE_ID, batch, pictures, tiny_config, tiny_vlm, tokens
from tolerance import assert_close, assert_conforms
from torch import nn

from pyvlm.models import VLM, LoRAConfig, PartialLoRAConfig, merge_lora, with_adapters
from pyvlm.models.inputs import default_layout
from pyvlm.models.language import LanguageModel, slice_layout
from pyvlm.nn import PartialLoRALinear

RULES = ["causal", "mmca", "bidirectional_image"]
KINDS: dict[str, dict[str, Any]] = {
    "partial_lora": {"partial_lora": {"rank": 2, "alpha": 6.0, "dropout": 0.0}},
    "lora": {"lora": {"rank": 2, "alpha": 6.0, "dropout": 0.0}},
}


def moved(model: VLM) -> VLM:
    """The updates are no longer nothing."""
    torch.manual_seed(3)
    for kind in ("partial_lora", "lora"):
        for parameter in model.parts().get(kind, []):
            nn.init.normal_(parameter, std=0.5)
    return model


def model_of(kind: str, dtype: torch.dtype = torch.float64, **language: Any) -> VLM:
    return moved(tiny_vlm(dtype, **KINDS[kind], **language))


def two_rows() -> tuple[torch.Tensor, torch.Tensor]:
    return batch(tokens(2, "image", 3, "image", 2), tokens(1, "image", 4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_has_updates_that_are_nothing_yet(kind: str) -> None:
    plain = tiny_vlm()
    torch.manual_seed(7)
    updated = VLM(tiny_config(**KINDS[kind])).double().eval()
    assert all(p.requires_grad for p in updated.parameters())
    base = {n.replace(".base_layer", ""): p for n, p in updated.named_parameters()}
    assert plain.state_dict().keys() <= base.keys()
    updates = updated.parts()[kind]
    zero = [not parameter.any() for parameter in updates]
    assert zero == [False, True] * (len(updates) // 2)
    # Attention of three layers, and the MLPs of the two that are not experts.
    assert len(updates) == 2 * (3 * 2 + 2 * 2)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            base[name].copy_(parameter)
    input_ids, real = two_rows()
    images = pictures(3)
    assert_conforms(updated(input_ids, images, real).logits, plain(input_ids, images, real).logits)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_update(kind: str, rule: str) -> None:
    model = model_of(kind, attention_rule=rule).train()
    input_ids, real = two_rows()
    model(input_ids, pictures(3), real, labelled(input_ids, real)).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_text_alone_has_gradients_of_zero_and_the_plain_models_logits() -> None:
    """Processes that train together wait for the gradient of each parameter."""
    model, plain = model_of("partial_lora").train(), tiny_vlm().train()
    input_ids, real = batch(tokens(5), tokens(7))
    labels = labelled(input_ids, real)
    output = model(input_ids, None, real, labels)
    assert_conforms(output.loss, plain(input_ids, None, real, labels).loss)
    output.loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parts()["partial_lora"])


def test_partial_lora_reaches_image_tokens_alone() -> None:
    """With updates of the MLP in the last layer only: the other rows are those of the plain model."""
    config = {"rank": 2, "dropout": 0.0, "modules": ["mlp"]}
    model, plain = tiny_vlm(partial_lora=config), tiny_vlm()
    nn.init.normal_(model.language.layers[2].mlp.down_proj.lora_b.weight)
    assert type(model.language.layers[2].attention.qkv_proj) is nn.Linear
    input_ids, real = two_rows()
    images = pictures(3)
    ours, theirs = model(input_ids, images, real).logits, plain(input_ids, images, real).logits
    is_image = input_ids == IMAGE_ID
    assert_conforms(ours[~is_image], theirs[~is_image])
    assert not torch.isclose(ours[is_image], theirs[is_image]).any()


def test_partial_lora_is_the_sum_that_the_paper_writes() -> None:
    model = model_of("partial_lora")
    linear = model.language.layers[0].attention.qkv_proj
    assert isinstance(linear, PartialLoRALinear)
    assert (linear.scaling, linear.dropout.p) == (3.0, 0.0)
    input_ids, real = two_rows()
    images, inputs, outputs = pictures(3), [], []
    linear.register_forward_hook(lambda _, args, out: inputs.append(args[0]) or outputs.append(out))
    model(input_ids, images, real)
    update = 3 * inputs[0] @ linear.lora_a.weight.T @ linear.lora_b.weight.T
    is_image = (input_ids == IMAGE_ID)[..., None]
    assert_conforms(outputs[0], F.linear(inputs[0], linear.weight) + update * is_image)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_the_full_pass(kind: str, rule: str) -> None:
    model = model_of(kind, attention_rule=rule)
    input_ids, real = batch(tokens(2, "image", 3, "image", 2), tokens(1, "image"), tokens(3))
    images = pictures(3)
    answer = model.generate(input_ids, images, real, max_new_tokens=4)
    assert len(answer.unique()) > 2
    whole = torch.cat([input_ids, answer], dim=1)
    layout = default_layout(model.config, whole, torch.cat([real, torch.ones_like(answer)], dim=1))
    full = model(whole, images, layout=layout).logits
    start, pieces, cache = 0, [], model.new_cache(whole.shape[1])
    for stop in range(input_ids.shape[1], whole.shape[1] + 1):
        so_far = slice_layout(layout, 0, stop)
        new = model(whole[:, start:stop], None if start else images, layout=so_far, cache=cache)
        pieces.append(new.logits)
        start = stop
    seen = layout.kind > 0
    assert_conforms(torch.cat(pieces, dim=1)[seen], full[seen])


def test_words_of_generation_cost_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt alone has image tokens, and their number is known without a look at the tensor."""
    model, given = model_of("partial_lora"), []
    forward = LanguageModel.forward

    def spy(self: LanguageModel, *args: Any) -> Any:
        given.append(args[-1])
        return forward(self, *args)

    monkeypatch.setattr(LanguageModel, "forward", spy)
    updates = []
    model.language.layers[0].mlp.down_proj.lora_a.register_forward_hook(lambda *_: updates.append(1))
    model.generate(*two_rows()[:1], pictures(3), two_rows()[1], max_new_tokens=3)
    assert given == [12, 0, 0]
    assert len(updates) == 1


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny_vlm(partial_lora={"rank": 2, "dropout": 0.5}).train()
    moved(model)
    input_ids, real = two_rows()
    images, labels, gradients = pictures(3), labelled(input_ids, real), []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        model.language.gradient_checkpointing = checkpointing
        model.zero_grad()
        model(input_ids, images, real, labels).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_conforms(checkpointed, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    model = model_of(kind, torch.float32).train()
    input_ids, real = two_rows()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids, pictures(3, torch.float32), real, labelled(input_ids, real)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.dtype == torch.float32 for p in model.parts()[kind])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_reloaded(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind, dtype)
    model.save_pretrained(tmp_path / "model")
    again = VLM.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert list(again.parts()) == list(model.parts())
    if dtype == torch.float64:
        input_ids, real = two_rows()
        images = pictures(3)
        assert_conforms(again(input_ids, images, real).logits, model(input_ids, images, real).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_for_a_model_that_had_none(tmp_path: Path, kind: str) -> None:
    tiny_vlm(torch.bfloat16).save_pretrained(tmp_path / "plain")
    plain = VLM.from_pretrained(tmp_path / "plain").double()
    names = [name for name, _ in plain.named_parameters()]
    ids = {id(p) for p in plain.parameters()}
    config = {"partial_lora": PartialLoRAConfig, "lora": LoRAConfig}[kind](**KINDS[kind][kind])
    model = with_adapters(plain, **{kind: config})
    assert getattr(model.config.language, kind) == getattr(model.language.config, kind) == config
    assert model.config.model_copy(update={"language": plain.config.language}) == plain.config
    assert {id(p) for p in model.parameters()} - {id(p) for p in model.parts()[kind]} == ids
    assert all(p.dtype == torch.float64 and p.requires_grad for p in model.parameters())
    input_ids, real = two_rows()
    images = pictures(3)
    expected = plain(input_ids, images, real).logits
    assert_conforms(model(input_ids, images, real).logits, expected)
    # Nothing was put into the plain model, even though it is made of the same tensors.
    moved(model)
    assert [name for name, _ in plain.named_parameters()] == names
    assert plain.config.language.lora is plain.config.language.partial_lora is None
    assert_conforms(plain(input_ids, images, real).logits, expected)
    assert not torch.isclose(model(input_ids, images, real).logits[0], expected[0])[2:6].all(1).any()
    model.save_pretrained(tmp_path / "model")
    assert VLM.from_pretrained(tmp_path / "model").config == model.config


def test_merged_lora_is_a_plain_model_of_equal_logits(tmp_path: Path) -> None:
    model = model_of("lora")
    merged = merge_lora(model)
    assert merged.config == tiny_vlm().config
    assert list(merged.state_dict()) == list(tiny_vlm().state_dict())
    assert list(merged.parts()) == list(tiny_vlm().parts())
    input_ids, real = two_rows()
    images = pictures(3)
    expected = model(input_ids, images, real).logits
    assert_conforms(merged(input_ids, images, real).logits, expected)
    assert not torch.isclose(tiny_vlm()(input_ids, images, real).logits, expected).all()
    # The other model still has its updates, beside weights that are as they were.
    assert_conforms(model(input_ids, images, real).logits, expected)
    assert len(model.parts()["lora"]) == 20
    merged.save_pretrained(tmp_path / "model")
    again = VLM.from_pretrained(tmp_path / "model")
    assert_conforms(again(input_ids, images, real).logits, expected)

    single = model_of("lora", torch.float32)
    merged_single = merge_lora(single)(input_ids, images.float(), real).logits
    assert_close(merged_single, expected=expected, plain=single(input_ids, images.float(), real).logits)


def test_the_numbers_reach_peft() -> None:
    model = tiny_vlm(lora={"rank": 3, "alpha": 6.0, "dropout": 0.25, "target_modules": ["o_proj"]})
    assert len(model.parts()["lora"]) == 3 * 2
    layer = model.language.layers[1].attention.o_proj
    assert layer.scaling == {"default": 2.0}
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.lora_A["default"].weight.shape == (3, 24)


def test_what_cannot_be_is_refused() -> None:
    both = KINDS["lora"] | KINDS["partial_lora"]
    with pytest.raises(ValidationError, match="lora and partial_lora are both given"):
        tiny_config(**both)
    with pytest.raises(ValidationError, match="modules"):
        tiny_config(partial_lora={"modules": ["head"]})
    with pytest.raises(ValueError, match=r"\['q_proj'\] are no linears of the decoder; it has .*qkv_proj"):
        VLM(tiny_config(lora={"target_modules": ["q_proj", "o_proj"]}))
    with pytest.raises(ValueError, match="needs one of partial_lora and lora"):
        with_adapters(tiny_vlm())
    with pytest.raises(ValueError, match="has updates already"):
        with_adapters(model_of("lora"), partial_lora=PartialLoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"has no language.lora to merge"):
        merge_lora(model_of("partial_lora"))


def test_without_peft_lora_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "pyvlm\[lora\]"'):
        VLM(tiny_config(**KINDS["lora"]))

"""Attention rules on transformers' models: the mask, whatever the cache, and who reaches whom."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
from integrations.transformers_models import FAMILIES, IMAGE
from transformers import DynamicCache, PreTrainedModel

from pyvlm import AttentionSpans, TokenLayout
from pyvlm.integrations.transformers import accelerate, attention, restore

SERVED = (
    "llava",
    "llava_next",
    "llava_onevision",
    "vipllava",
    "internvl",
    "idefics3",
    "qwen2_vl",
    "qwen3_vl",
    "gemma3",
)
RULES = ("mmca", "mmca_released", "mmca_image", "bidirectional_image", "all_images", "causal")


def made(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model = FAMILIES[name].model()
    return model, FAMILIES[name].batch(model)


def masks_of(
    model: PreTrainedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> list[AttentionSpans]:
    """The spans that the language model's layers get."""
    found = []
    kernel = attention.span_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, spans: AttentionSpans, **options: object) -> Tensor:
        found.append(spans)
        return kernel(q, k, v, spans, **options)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "span_attention", watch)
        model(**batch)
    layers = model.config.get_text_config().num_hidden_layers
    return found[-layers:]


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("rule", RULES)
def test_every_layer_gets_the_mask_of_the_rule(name: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made(name)
    report = accelerate(model, attention_rule=rule)
    assert any(rule in change.reason for change in report.changes)
    layout = TokenLayout.from_input_ids(batch["input_ids"], IMAGE, batch["attention_mask"])
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for spans, layer in zip(masks_of(model, batch, monkeypatch), layers, strict=True):
        window = config.sliding_window if layer == "sliding_attention" else None
        expected = layout.spans(rule, window)
        assert torch.equal(spans.bounds, expected.bounds)
        assert torch.equal(spans.key_class, expected.key_class)
        assert (spans.range_classes, spans.separate) == (expected.range_classes, expected.separate)


@pytest.mark.parametrize("linear", [False, True])
def test_a_model_that_is_gone_leaves_no_weights(linear: bool) -> None:
    model, batch = made("llava")
    accelerate(model, attention_rule="mmca", linear=linear)
    model.generate(**batch, max_new_tokens=2, do_sample=False, eos_token_id=None)
    weights = [weakref.ref(weight) for weight in model.parameters()]
    del model
    gc.collect()
    assert {weight() is None for weight in weights} == {True}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_cache_gives_the_rows_of_one_pass(name: str, rule: str) -> None:
    model, batch = made(name)
    accelerate(model, attention_rule=rule)
    generated = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    static = model.generate(
        **batch, max_new_tokens=6, do_sample=False, eos_token_id=None, cache_implementation="static"
    )
    assert static.tolist() == generated.tolist()
    # greedy tokens of one pass over the whole text are those that were generated one by one
    whole = dict(batch)
    for key, value in (("input_ids", generated), ("attention_mask", None), ("mm_token_type_ids", None)):
        if key in batch:
            grown = value if value is not None else batch[key]
            fill = 1 if key == "attention_mask" else 0
            missing = generated.shape[1] - grown.shape[1]
            whole[key] = torch.cat([grown, torch.full((len(grown), missing), fill)], 1)
    start = batch["input_ids"].shape[1]
    position = whole["attention_mask"].cumsum(1) - 1
    if name == "llava":  # Qwen computes its own from the mask
        whole["position_ids"] = position.clamp(min=0)
    greedy = model(**whole).logits.argmax(-1)
    assert greedy[:, start - 1 : -1].tolist() == generated[:, start:].tolist()


def test_text_reaches_images_only_through_their_own_softmax_and_images_see_themselves_alone() -> None:
    model, _ = made("llava")
    batch = FAMILIES["llava"].batch(model, ((3, "image", 4),))
    accelerate(model, attention_rule="mmca")
    is_image = batch["input_ids"][0] == IMAGE
    before = model(**batch).logits[0]
    edited = dict(batch, input_ids=batch["input_ids"].clone())
    edited["input_ids"][0, 0] += 1
    after = model(**edited).logits[0]
    same = (before == after).all(-1)
    assert same[is_image].all()  # text before an image does not reach it
    assert not same[~is_image].any()


def test_restore_takes_the_rule_away() -> None:
    model, batch = made("llava")
    before = model(**batch).logits
    accelerate(model, attention_rule="mmca")
    assert not torch.equal(model(**batch).logits, before)
    restore(model)
    assert torch.equal(model(**batch).logits, before)
    assert not model._forward_pre_hooks
    assert not model.model.language_model._forward_hooks


def test_gradients_flow_and_checkpointing_agrees() -> None:
    model, batch = made("llava")
    accelerate(model, attention_rule="mmca")

    def gradient() -> Tensor:
        model.zero_grad()
        model(**batch).logits[batch["attention_mask"].bool()].square().mean().backward()
        return model.model.multi_modal_projector.linear_1.weight.grad.clone()

    expected = gradient()
    assert expected.abs().max() > 0
    model.train().gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), expected)


def test_packed_samples_stay_apart() -> None:
    model, _ = made("llava")
    accelerate(model, attention_rule="mmca")
    family = FAMILIES["llava"]
    rows = ((3, "image", 4), (2, "image", 3))
    packed = family.batch(model, (rows[0] + rows[1],))
    del packed["attention_mask"]
    first = family.batch(model, rows[:1])["input_ids"].shape[1]
    total = packed["input_ids"].shape[1]
    packed["position_ids"] = torch.cat([torch.arange(first), torch.arange(total - first)])[None]
    packed["use_cache"] = False
    before = model(**packed).logits
    packed["input_ids"][0, 0] += 1
    after = model(**packed).logits
    assert torch.equal(before[:, first:], after[:, first:])
    assert not torch.equal(before[:, :first], after[:, :first])


def test_what_a_rule_cannot_do_is_refused() -> None:
    model, batch = made("llava")
    with pytest.raises(ValueError, match="expected one of causal, mmca"):
        accelerate(model, attention_rule="mmcca")
    with pytest.raises(ValueError, match="where its prefix ends"):
        accelerate(model, attention_rule="prefix")
    assert torch.equal(model(**batch).logits, model(**batch).logits)  # nothing was left behind
    with pytest.raises(ValueError, match="takes no input_ids and pixel_values"):
        accelerate(FAMILIES["llama"].model(), attention_rule="mmca")
    with pytest.raises(ValueError, match="has chunked_attention"):
        accelerate(FAMILIES["llama4"].model(), attention_rule="mmca")
    accelerate(model, attention_rule="mmca")
    ids = batch["input_ids"]
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="was called by itself"):
        model.model.language_model(input_ids=ids)
    with pytest.raises(ValueError, match="makes the mask itself"):
        model(**{**batch, "attention_mask": torch.zeros(3, 1, ids.shape[1], ids.shape[1])})
    restore(model)
    cache = DynamicCache()
    model(**batch, past_key_values=cache)
    accelerate(model, attention_rule="mmca")
    with pytest.raises(ValueError, match="never saw"):
        model(input_ids=ids[:, :1], past_key_values=cache)

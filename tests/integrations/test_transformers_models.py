"""Models of transformers on pyvlm's kernels against their own: what `accelerate` must not change.

Only logits of real tokens are compared: a padding query sees nothing here, and something in eager attention.
"""

import gc
import weakref
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
import torch
from tolerance import assert_close
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
import transformers
from integrations.transformers_models import ENCODERS, FAMILIES, IMAGE, SIZE, Family, noise
from transformers import PreTrainedModel
from transformers.masking_utils import create_chunked_causal_mask

import pyvlm
from pyvlm.integrations.transformers import accelerate, restore

NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not hasattr(transformers, family.architecture),
            reason=f"this transformers has no {family.architecture}",
        ),
    )
    for name, family in FAMILIES.items()
]
# SDPA has no soft cap, and eager attention, which rounds its softmax to float32, makes NaN of a row of
# padding in float64: these families are compared with eager attention on rows without padding.
SOFTCAPPED = {"gemma2": ((9,), (9,)), "paligemma2": ((3, "image", 4), (1, "image", 6))}
# Llama 4 gives a token one expert. On its longest batch a near tie falls either way in bf16, by how the
# layers before round: gradients are then those of another expert.
ROWS = SOFTCAPPED | {"llama4": ((2, "image", 5), (6,))}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Of the real tokens, [tokens, vocabulary]."""
    out = model(**batch).logits
    mask = batch.get("attention_mask")
    return out if mask is None else out[mask.bool()]


def as_float64(
    model: PreTrainedModel, family: Family, batch: dict[str, Tensor]
) -> tuple[PreTrainedModel, dict]:
    """The same weights and inputs in float64, by torch's own attention."""
    attention = "eager" if family.name in SOFTCAPPED else "sdpa"
    wide = family.model(torch.float64, attn_implementation=attention, experts_implementation="eager")
    wide.load_state_dict({k: v.to(torch.float64) for k, v in model.state_dict().items()})
    return wide, {k: v.to(torch.float64) if v.is_floating_point() else v for k, v in batch.items()}


def gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    logits(model, batch).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_logits_and_gradients_are_those_of_eager_attention(family: Family, dtype: torch.dtype) -> None:
    model = family.model(dtype, attn_implementation="eager")
    batch = family.batch(model, ROWS.get(family.name))
    wide, wide_batch = as_float64(model, family, batch)
    plain, expected = logits(model, batch), logits(wide, wide_batch)
    plain_gradients, expected_gradients = gradients(model, batch), gradients(wide, wide_batch)
    report = accelerate(model)
    assert {c.part for c in report.changes if c.kernel} >= {"attention"}
    assert [c.reason for c in report.changes if c.part == "attention" and c.kernel is None] == []
    assert_close(logits(model, batch), expected, plain, "logits")
    ours = gradients(model, batch)
    assert ours.keys() == expected_gradients.keys()
    # A bias of keys has no gradient but rounding: all are measured against the largest of the model.
    largest = max(g.abs().max().item() for g in expected_gradients.values())
    for name, gradient in ours.items():
        assert_close(gradient, expected_gradients[name], plain_gradients[name], name, terms=largest)


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_generates_the_same_tokens(family: Family, cache: str | None) -> None:
    if family.name == "paligemma2" and cache == "static":
        pytest.skip("transformers' PaliGemma 2 itself fails with a static cache")
    chunked = signature(create_chunked_causal_mask).parameters
    if family.name == "llama4" and cache == "static" and "block_sequence_ids" not in chunked:
        pytest.skip("the Llama 4 of this version of transformers itself fails with a static cache")
    model = family.model(attn_implementation="eager")
    batch = family.batch(model)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    expected = model.generate(**batch, **options)
    accelerate(model)
    assert model.generate(**batch, **options).tolist() == expected.tolist()
    assert expected.shape[1] == batch["input_ids"].shape[1] + 12


def test_loads_by_name_and_gives_the_same_bits_as_accelerate(family: Family, tmp_path: Path) -> None:
    model = family.model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="pyvlm", dtype=torch.float32).eval()
    batch = family.batch(model)
    accelerate(model)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    saved = [(folder / "config.json").read_text() for folder in (tmp_path, tmp_path / "again")]
    assert saved[0] == saved[1]
    assert "pyvlm" not in saved[0]


def test_restore_gives_back_what_was_there(family: Family) -> None:
    model = family.model(attn_implementation="eager" if family.name in SOFTCAPPED else "sdpa")
    batch = family.batch(model)
    before = logits(model, batch)
    implementations = [m.config._attn_implementation for m in submodels(model)]
    state = {name: p.data_ptr() for name, p in model.state_dict().items()}
    accelerate(model)
    assert [m.config._attn_implementation for m in submodels(model)] != implementations
    restore(model)
    assert [m.config._attn_implementation for m in submodels(model)] == implementations
    assert {name: p.data_ptr() for name, p in model.state_dict().items()} == state
    assert torch.equal(logits(model, batch), before)


def test_a_model_that_is_gone_leaves_no_weights(family: Family) -> None:
    """Neither by what is noted to restore it, nor by a report that somebody keeps."""
    model = family.model()
    batch = family.batch(model)
    report = accelerate(model)
    labels = batch["input_ids"]
    model(**batch, labels=labels).loss.backward()
    weights = [weakref.ref(weight) for weight in model.parameters()]
    del model
    gc.collect()
    assert any(change.undo is not None for change in report.changes)
    assert {weight() is None for weight in weights} == {True}


def submodels(model: nn.Module) -> list[PreTrainedModel]:
    return [m for m in model.modules() if isinstance(m, PreTrainedModel)]


def test_gradient_checkpointing_changes_nothing(family: Family) -> None:
    model = family.model()
    batch = family.batch(model)
    accelerate(model)
    expected = gradients(model.train(), batch)
    model.gradient_checkpointing_enable()
    ours = gradients(model, batch)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_compiled_models_agree(family: Family) -> None:
    """The graph breaks only where the model's own code breaks it; the eager backend shows what is traced."""
    if family.pictures is None and family.name not in ("mixtral", "qwen3_moe"):
        pytest.skip("compiled as the language model of a vision-language model")
    model = family.model()
    batch = family.batch(model)
    accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.set_grad_enabled(family.name == "llava"):  # tracing the backward takes as long again
        expected = logits(model, batch)
        torch.testing.assert_close(logits(compiled, batch), expected, rtol=1e-4, atol=1e-4)
    if family.name == "llava":
        theirs = gradients(model, batch)
        ours = gradients(compiled, batch)
        assert {f"_orig_mod.{name}" for name in theirs} <= ours.keys()
        for name, gradient in ours.items():  # of layers that nothing reads there is 0 or nothing
            other = theirs.get(name.removeprefix("_orig_mod."), torch.zeros(()))
            torch.testing.assert_close(gradient, other.expand_as(gradient), rtol=1e-3, atol=1e-5)


# What transformers itself does not keep apart.
WITHOUT_PACKING = {
    "paligemma": "transformers' PaliGemma lets a prefix see the whole row",
    "paligemma2": "transformers' PaliGemma lets a prefix see the whole row",
    "molmo2": "transformers' Molmo 2 lets images see all images of the row",
}


def test_packed_samples_do_not_see_each_other(family: Family) -> None:
    if family.name in WITHOUT_PACKING:
        pytest.skip(WITHOUT_PACKING[family.name])
    model = family.model(attn_implementation="eager")
    rows = [row for row in family.rows if len(row) > 0]
    alone = [family.batch(model, (row,)) for row in rows]
    packed = family.batch(model, (tuple(piece for row in rows for piece in row),))
    lengths = [b["input_ids"].shape[1] for b in alone]
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    if "Qwen" in family.architecture and "VL" in family.architecture:
        # the first of four rows tells the documents, the others are the places of text, height and width
        position = position.expand(4, 1, -1)
    del packed["attention_mask"]
    packed["position_ids"] = position
    packed["use_cache"] = False
    expected = logits(model, packed)
    accelerate(model)
    ours = logits(model, packed)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    # and the mask is there: the last sample alone gives its rows
    first = {**packed, "input_ids": packed["input_ids"].clone()}
    at = (first["input_ids"][0, : lengths[0]] != IMAGE).nonzero()[0]
    first["input_ids"][0, at] = 3 + (first["input_ids"][0, at] + 1) % 50
    edited = logits(model, first)
    apart = (edited - ours).abs().amax(-1)[0]  # experts round by how many tokens they get
    assert apart[lengths[0] :].max() < 1e-5
    assert apart[: lengths[0]].max() > 1e-3


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_encoders_give_the_same_features(name: str, dtype: torch.dtype) -> None:
    architecture, config = ENCODERS[name]

    def make(dtype: torch.dtype) -> PreTrainedModel:
        torch.manual_seed(5)
        model = getattr(transformers, architecture)._from_config(config(), attn_implementation="eager").eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model.to(dtype)

    model, wide = make(dtype), make(torch.float64)
    wide.load_state_dict({k: v.to(torch.float64) for k, v in model.state_dict().items()})
    pixels = noise(3, 3, SIZE, SIZE).to(dtype)
    plain = model(pixels).last_hidden_state
    expected = wide(pixels.to(torch.float64)).last_hidden_state
    (change,) = [c for c in accelerate(model).changes if c.part == "attention"]
    assert change.kernel == "pyvlm.ops.span_attention"
    assert_close(model(pixels).last_hidden_state, expected, plain)


def test_windows_of_an_encoder_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvlm.integrations.transformers import attention

    def count(model: PreTrainedModel, run: Callable[[], object]) -> int:
        calls = []
        kernel = attention.span_attention

        def counted(*args: object, **kwargs: object) -> object:
            calls.append(1)
            return kernel(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(attention, "span_attention", counted)
            run()
        return len(calls)

    family = FAMILIES["qwen2_5_vl"]
    model = family.model()
    batch = family.batch(model)
    accelerate(model)
    layers = model.config.vision_config.depth + model.config.text_config.num_hidden_layers
    assert count(model, lambda: model(**batch)) == layers
    model.set_attn_implementation("pyvlm")  # by this name the encoder calls once a window
    assert count(model, lambda: model(**batch)) > layers


def test_gemma_keeps_its_bidirectional_images_where_flash_drops_them() -> None:
    """A later token of an image must reach an earlier one; transformers' flash masks never ask it."""
    from transformers.masking_utils import flash_attention_mask

    family = FAMILIES["gemma3"]
    model = family.model()
    batch = family.batch(model, ((3, "image", 2),))

    def row_of_first_image_token(nudge: float) -> Tensor:
        hook = model.model.multi_modal_projector.register_forward_hook(
            lambda module, args, out: out + nudge * torch.tensor([0, 0, 0, 1.0])[:, None]
        )
        first = (batch["input_ids"][0] == model.config.image_token_id).nonzero()[0, 0]
        try:
            return model(**batch).logits[0, first]
        finally:
            hook.remove()

    accelerate(model)
    assert not torch.equal(row_of_first_image_token(0.0), row_of_first_image_token(1.0))
    called = []
    flash_attention_mask(1, 4, 4, mask_function=lambda *a: called.append(a), attention_mask=None)
    assert called == []


def test_accelerate_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        pyvlm.accelerate("llava")


def test_a_dense_mask_may_be_written_to_between_two_calls() -> None:
    """A buffer that is filled anew each step must not be taken for what it was."""
    family = FAMILIES["llama"]
    model = family.model()
    ids = family.batch(model, ((6,),))["input_ids"]
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    accelerate(model)
    with torch.inference_mode():
        mask_of_inference = mask.clone()
    for given in (mask, mask_of_inference):
        with torch.inference_mode():
            model(ids, attention_mask=given)
            given[..., 3:, 0] = False
            ours = model(ids, attention_mask=given).logits
            restore(model)
            expected = model(ids, attention_mask=given).logits
            accelerate(model)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_model_is_changed_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvlm.integrations.transformers import connectors

    def interrupted(model: nn.Module) -> None:
        raise KeyboardInterrupt

    model = FAMILIES["llava"].model(attn_implementation="eager")
    monkeypatch.setattr(connectors, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, attention_rule="mmca")
    assert {m.config.get_text_config()._attn_implementation for m in submodels(model)} == {"eager"}
    assert type(model.lm_head) is nn.Linear
    assert not model.model._forward_pre_hooks

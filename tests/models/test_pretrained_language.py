"""Language models of transformers in ours: the same logits, gradients and continuations."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_languages import MODELS, VOCAB, make, save, scatter
from tiny_vlm import batch, tiny_config
from tolerance import assert_close, assert_close_overall
from torch import Tensor, nn

from pyvlm.layout import TokenLayout
from pyvlm.models import VLM, LanguageConfig, MoEConfig, VLMConfig, upcycle
from pyvlm.models.language import LanguageModel
from pyvlm.models.pretrained_language import build_language, export_language, load_language
from pyvlm.nn.norm import UnitOffsetRMSNorm

transformers = pytest.importorskip("transformers")

ROWS = ([5, 9, 3, 17, 8, 21, 11, 4, 6], [7, 2, 19, 13, 10])  # longer than the windows; the second is padded


def language(folder: Path, **options: Any) -> LanguageModel:
    config = LanguageConfig.model_validate({"pretrained": str(folder), "attention_rule": "causal"} | options)
    model = build_language(config, "auto")
    load_language(model, str(folder))
    return model.eval()


def ours(model: LanguageModel, rows: tuple[list[int], ...] = ROWS) -> Tensor:
    """Logits of the rows' tokens, from one batch, padded on the left."""
    input_ids, mask = batch(*rows)
    layout = TokenLayout.from_input_ids(input_ids, VOCAB + 100, mask)
    hidden, _ = model(model.embed_tokens(input_ids), layout)
    return model.logits(hidden)[mask.bool()]


def theirs(model: nn.Module, rows: tuple[list[int], ...] = ROWS) -> Tensor:
    """The same, row by row: in float64 transformers gives NaN where there is padding."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])


def weighted(logits: Tensor) -> Tensor:
    """A loss that weighs each logit otherwise."""
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    return (logits.double() * weights).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    plain = save(name, tmp_path, dtype)
    model = language(tmp_path)
    assert {p.dtype for p in model.parameters()} == {dtype}
    exact = copy.deepcopy(plain).double()
    logits, logits_plain, logits_exact = ours(model), theirs(plain), theirs(exact)
    assert_close(logits, logits_exact, logits_plain, "logits")

    for result in (logits, logits_plain, logits_exact):
        weighted(result).backward()
    found = export_language(
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        model.config,
        plain.config.model_type,
    )
    of_plain, of_exact = ({k: p.grad for k, p in m.named_parameters()} for m in (plain, exact))
    assert found.keys() == of_exact.keys()
    # One vector, each gradient by its own scale: the errors of eight values alone are a matter of luck.
    scales = {key: gradient.abs().max() for key, gradient in of_exact.items()}
    one = [torch.cat([(g[k] / scales[k]).flatten() for k in scales]) for g in (found, of_exact, of_plain)]
    check = assert_close if dtype == torch.float32 else assert_close_overall
    check(one[0].to(dtype), one[1], one[2], "gradients")


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    plain = save(name, tmp_path)
    model = vlm(tmp_path)
    input_ids, mask = batch(*ROWS)
    continued = plain.generate(
        input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert continued.unique().numel() > 4, "a model that repeats itself would show little"
    mine = model.generate(input_ids, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(mine, continued[:, input_ids.shape[1] :])


def vlm(folder: Path, **options: Any) -> VLM:
    """A VLM with one more token than the folder has, the image's."""
    given = tiny_config().model_dump(exclude={"language"})
    settings = {"pretrained": str(folder), "attention_rule": "causal", "vocab_size": VOCAB + 1}
    given |= {"image_token_id": VOCAB, "language": settings | options}
    return VLM(VLMConfig.model_validate(given)).eval()


def test_it_sees_images_in_half_precision_and_comes_back_alone(tmp_path: Path) -> None:
    save("qwen3", tmp_path / "lm", torch.bfloat16)
    model = vlm(tmp_path / "lm", attention_rule="mmca")
    assert model.language.embed_tokens.weight.dtype == torch.bfloat16
    assert next(model.vision_towers.parameters()).dtype == torch.float32
    assert model.config.language.pretrained is None
    assert model.language.config == model.config.language

    input_ids, mask = batch([3, *[VOCAB] * 4, 5, 6], [7, 8])
    images = torch.randn(1, 1, 8, 8)
    logits = model(input_ids, images, mask).logits
    assert not torch.equal(logits, model(input_ids, -images, mask).logits)
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.language.layers.parameters())

    model.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "lm").iterdir():
        file.unlink()
    loaded = VLM.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded(input_ids, images, mask).logits, logits)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    save("gemma3", tmp_path)
    model = language(tmp_path).train()
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        weighted(ours(model)).backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen2, windows"])  # the head's own, and tied
def test_shards_are_one_model(name: str, tmp_path: Path) -> None:
    whole = save(name, tmp_path / "single")
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    single, sharded = language(tmp_path / "single"), language(tmp_path / "sharded")
    assert same_weights(single.state_dict(), sharded.state_dict())


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_added_tokens_are_the_mean_of_the_others(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    plain, grown = language(tmp_path), language(tmp_path, vocab_size=VOCAB + 2)
    assert grown.config.vocab_size == VOCAB + 2
    for key in {"embed_tokens.weight", "lm_head.weight"} & plain.state_dict().keys():
        old, new = plain.state_dict()[key], grown.state_dict()[key]
        assert torch.equal(new[:VOCAB], old)
        torch.testing.assert_close(new[VOCAB:], old.mean(0).expand(2, -1))
    assert (grown.lm_head is None) == (name == "gemma")


def test_experts_start_anew_between_loaded_layers(tmp_path: Path) -> None:
    whole = save("llama", tmp_path, torch.bfloat16)
    experts = {"layers": [1], "num_experts": 3, "intermediate_size": 8}
    torch.manual_seed(1)
    model = vlm(tmp_path, moe=experts)
    loaded = model.language.layers[1]
    theirs_1 = whole.model.layers[1]
    assert torch.equal(loaded.attention.o_proj.weight, theirs_1.self_attn.o_proj.weight)
    assert torch.equal(loaded.mlp_norm.weight, theirs_1.post_attention_layernorm.weight)
    assert all(p.isfinite().all() and p.std() > 0 for p in loaded.mlp.parameters() if p.dim() > 1)
    assert torch.equal(
        model.language.layers[2].mlp.down_proj.weight, whole.model.layers[2].mlp.down_proj.weight
    )
    input_ids, mask = batch(*ROWS)
    output = model(input_ids, attention_mask=mask)
    assert output.logits.isfinite().all()
    assert output.aux_loss > 0
    assert {p.dtype for p in model.language.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])  # biases, and the norms of Gemma
def test_updates_start_as_nothing_over_the_loaded_weights(name: str, tmp_path: Path) -> None:
    save(name, tmp_path, torch.bfloat16)
    input_ids, mask = batch([3, *[VOCAB] * 4, 5, 6], [7, 8])
    images = torch.randn(1, 1, 8, 8)
    logits = []
    for options in ({}, {"partial_lora": {"rank": 2, "alpha": 2}}):
        torch.manual_seed(2)
        logits.append(vlm(tmp_path, **options)(input_ids, images, mask).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["llama, biases", "gemma2"])  # biases, and another activation
def test_experts_are_made_of_the_loaded_mlps(name: str, tmp_path: Path) -> None:
    plain = save(name, tmp_path)
    model = vlm(tmp_path)
    input_ids, mask = batch(*ROWS)
    new = upcycle(model, MoEConfig(layers="every_second", num_experts=4))
    real = mask.bool()  # experts leave padding alone
    logits = [m(input_ids, attention_mask=mask).logits[real][:, :VOCAB] for m in (new, model)]
    assert_close(logits[0], theirs(copy.deepcopy(plain).double()), logits[1])


def test_names_go_back_and_forth(tmp_path: Path) -> None:
    for name in MODELS:
        plain = save(name, tmp_path / name)
        model = language(tmp_path / name)
        exported = export_language(model.state_dict(), model.config, plain.config.model_type)
        assert same_weights(exported, load_file(tmp_path / name / "model.safetensors")), name
    with pytest.raises(ValueError, match="'bert' is unknown; expected one of llama"):
        export_language({}, model.config, "bert")
    with pytest.raises(ValueError, match=r"phi3 has no weights for layers.0.attention_out_norm.weight"):
        export_language(model.state_dict(), model.config, "phi3")


def llava(text: str, folder: Path) -> Any:
    """A LLaVA whose language model is the one of `MODELS`."""
    part = make(text).config
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = transformers.LlavaConfig(
        text_config=part, vision_config=vision, tie_word_embeddings=part.tie_word_embeddings
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    scatter(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("text", ["llama", "qwen2, windows"])
@pytest.mark.parametrize("names", ["language_model.model.", "model.language_model."])
def test_the_language_part_of_a_larger_model(text: str, names: str, tmp_path: Path) -> None:
    whole = llava(text, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    assert "language_model.model.norm.weight" in weights
    if names == "model.language_model.":  # newer checkpoints; their head is lm_head.weight
        renamed = {k.replace("language_model.model.", names): v for k, v in weights.items()}
        renamed = {k.replace("language_model.lm_head", "lm_head"): v for k, v in renamed.items()}
        save_file(renamed, file)
    model = language(tmp_path)
    assert_close(ours(model), theirs(copy.deepcopy(whole).double()), theirs(whole))


def test_the_head_of_a_larger_model_is_tied_as_that_model_says(tmp_path: Path) -> None:
    llava("qwen2, windows", tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["language_model.model.embed_tokens.weight"]
    change_weights(tmp_path, language_model__lm_head__weight=embedding.clone())
    assert language(tmp_path).lm_head is None
    change_weights(tmp_path, language_model__lm_head__weight=embedding + 1)
    with pytest.raises(ValueError, match=r"language_model.lm_head.weight is not the embedding"):
        language(tmp_path)


def test_norms_with_an_offset_keep_the_digits_of_their_weight() -> None:
    """In half precision 1 + 0.0036 is 1.0 or 1.008: only the result may be rounded."""
    norm = UnitOffsetRMSNorm(64, eps=1e-6).bfloat16()
    nn.init.constant_(norm.weight, 0.0036)
    x = torch.randn(50, 64).bfloat16()
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + norm.weight.double())
    half_a_digit = 2.0**-8 * expected.abs() * 1.001
    assert ((norm(x).double() - expected).abs() <= half_a_digit).all()
    assert norm(x).dtype == torch.bfloat16


# ---- what is refused


def change_weights(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in weights.items() if value is not None}, path)


def test_all_weights_that_do_not_fit_are_named_at_once(tmp_path: Path) -> None:
    save("llama", tmp_path)
    norm = "model.layers.1.input_layernorm.weight"
    change_weights(
        tmp_path,
        model__layers__0__self_attn__k_proj__weight=None,
        model__layers__2__mlp__up_proj__weight=torch.zeros(19, 16),
        model__layers__1__input_layernorm__weight=torch.zeros(16, dtype=torch.int8),
        model__layers__3__input_layernorm__weight=torch.zeros(16),
    )
    with pytest.raises(ValueError, match="does not fit the language model") as caught:
        language(tmp_path)
    message = str(caught.value)
    assert "model.layers.0.self_attn.k_proj.weight is missing" in message
    assert "model.layers.2.mlp.up_proj.weight is [19, 16] and must be [20, 16]" in message
    assert f"{norm} is I8 and must be one of" in message
    assert "model.layers.3.input_layernorm.weight is foreign" in message


def test_tables_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    save("llama", tmp_path)
    before = language(tmp_path).state_dict()
    change_weights(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(3))
    assert same_weights(language(tmp_path).state_dict(), before)


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    save("gemma", tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(tmp_path, lm_head__weight=embedding.clone())
    assert language(tmp_path).lm_head is None
    change_weights(tmp_path, lm_head__weight=embedding + 1)
    with pytest.raises(
        ValueError, match=r"lm_head.weight is not the embedding, to which config.json ties it"
    ):
        language(tmp_path)


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model = language(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change_weights(tmp_path, model__norm__weight=None, model__embed_tokens__weight=torch.zeros(VOCAB, 16))
    with pytest.raises(ValueError, match=r"model.norm.weight is missing"):
        load_language(model, str(tmp_path))
    assert same_weights(model.state_dict(), before)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    whole = save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model.safetensors there.*other formats are not read"):
        language(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged, truncated or not there"):
        language(tmp_path)
    whole.save_pretrained(tmp_path, max_shard_size="4KB")
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=rf"{first.name}: damaged, truncated or not there"):
        language(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weights": {}}))
    with pytest.raises(ValueError, match="not an index of safetensors"):
        language(tmp_path)


def test_a_folder_without_the_tokens_embedding_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    change_weights(tmp_path, model__embed_tokens__weight=None)
    with pytest.raises(ValueError, match=r"expected one embed_tokens.weight among its weights, found 0"):
        language(tmp_path)

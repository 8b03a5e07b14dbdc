"""Models of pyvlm as checkpoints of transformers: the same tokens, pixels, logits and answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_folders import PINPOINTS, QUESTION, SIDE, VISION, picture, save_llava, transformers
from models.chat_folders import FAMILIES, write_folder
from models.tiny_languages import MODELS, SIZES, scatter
from torch import Tensor

from pyvlm.integrations.transformers.export import export
from pyvlm.integrations.transformers.language_config import text_config
from pyvlm.models import VLM, ImageConfig, LanguageConfig, Processor, ProcessorConfig, VLMConfig
from pyvlm.models.language_families import language_entries
from pyvlm.models.processor import word_level_tokenizer
from pyvlm.models.tiling import TilingConfig

NEW_TOKENS = 8
WORDS = ["image 1: 2: what is in the other image? it is a cat."]
LANGUAGE = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 20,
    "attention_rule": "causal",
}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]


def vlm(processor: Processor, encoder: str = "clip_vision_model", **changes: Any) -> VLM:
    """A model for a processor, every parameter away from its start."""
    torch.manual_seed(0)
    tower = {"type": "transformers", "name": "tower", "encoder": VISION | {"model_type": encoder}}
    tower |= {"levels": [-2]} | changes.pop("tower", {})
    image = processor.config.image.model_dump()
    given = {
        "image": image,
        "tiling": processor.config.tiling,
        "vision_towers": [tower],
        "fusion": {},
        "image_token_id": processor.image_token_id,
        "language": LANGUAGE | {"vocab_size": processor.vocab_size} | changes.pop("language", {}),
    }
    model = VLM(VLMConfig.model_validate(given | changes)).eval()
    scatter(model)
    return model


def words(image: ImageConfig | None = None, **options: Any) -> Processor:
    special = ["<pad>", "<unk>", "<image>", "<user>", "<assistant>", "<end>", "<im>", "</im>"]
    image = image or ImageConfig(size=SIDE)
    config = ProcessorConfig(image=image, tokens_per_image=(SIDE // 4) ** 2, **options)
    return Processor(word_level_tokenizer(WORDS, special), config)


def chat(folder: Path, family: str, **options: Any) -> Processor:
    write_folder(folder, FAMILIES[family])
    image = options.pop("image", ImageConfig(size=SIDE, resample="bicubic"))
    return Processor.from_transformers(folder, image, (SIDE // 4) ** 2, **options)


def dialogue(size: tuple[int, int]) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": picture(*size, seed)} for seed in range(2)]
    texts = [{"type": "text", "text": text} for text in ("image 1:", QUESTION)]
    return [
        {"role": "user", "content": [texts[0], images[0], texts[1]]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is a cat."}]},
        {"role": "user", "content": [images[1], {"type": "text", "text": "And in image 2?"}]},
    ]


def plain(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pixels in [0, 1]."""
    return pixels * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)


def assert_the_same(
    model: VLM, processor: Processor, folder: Path, size: tuple[int, int] = (SIDE, SIDE), pixels: float = 1e-6
) -> None:
    """What transformers makes of a dialogue is what pyvlm makes of it."""
    theirs, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values())
    their_processor = transformers.AutoProcessor.from_pretrained(folder)
    messages = dialogue(size)
    sample = processor.encode(messages, add_generation_prompt=True)
    inputs = their_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_ids"][0].tolist() == sample["input_ids"].tolist()
    (tower,), image = model.config.vision_towers, model.config.image
    given = plain(inputs["pixel_values"].flatten(0, -4), tower.mean, tower.std)
    torch.testing.assert_close(given, plain(sample["images"], image.mean, image.std), rtol=0, atol=pixels)
    batch = processor.collate([sample])
    batch.pop("labels")
    with torch.no_grad():
        ours, logits = model(**batch).logits, theirs(**inputs).logits
    assert logits.std() > 0.3
    torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-4 if pixels < 1e-3 else 0.5)
    if pixels < 1e-3:
        options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": processor.end_token_id}
        expected = model.generate(**batch, **options)
        generated = theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert generated[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


@pytest.mark.parametrize("connector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("encoder", ["clip_vision_model", "siglip_vision_model"])
def test_models_of_words(encoder: str, connector: str, tmp_path: Path) -> None:
    processor = words()
    model = vlm(processor, encoder, connector=connector)
    export(model, processor, tmp_path / "out")
    assert_the_same(model, processor, tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


@pytest.mark.parametrize("levels", [[-1], [1], [0], [1, -2]])
def test_levels(levels: list[int], tmp_path: Path) -> None:
    for encoder in ("clip_vision_model", "siglip_vision_model"):
        processor = words()
        tower = {"levels": levels, "merge": "concat"}
        model = vlm(processor, encoder, tower=tower)
        export(model, processor, tmp_path / encoder)
        assert_the_same(model, processor, tmp_path / encoder)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_chat_templates(family: str, tmp_path: Path) -> None:
    processor = chat(tmp_path / "words", family)
    model = vlm(processor, language={"tie_embeddings": False})
    export(model, processor, tmp_path / "out")
    assert_the_same(model, processor, tmp_path / "out", (31, 17))


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_pixels(fit: str, resample: str, tmp_path: Path) -> None:
    mean = CLIP_MEAN if fit == "pad" else [0.5]
    image = ImageConfig(size=SIDE, fit=fit, resample=resample, mean=mean, std=[0.3])
    processor = words(image)
    tower = {"mean": image.mean * (3 // len(mean)), "std": [0.3] * 3}
    model = vlm(processor, tower=tower)
    export(model, processor, tmp_path / "out")
    for size in ((31, 17), (16, 29)):
        assert_the_same(model, processor, tmp_path / "out", size)


def test_pixels_of_float_resizing_differ_by_rounding_alone(tmp_path: Path) -> None:
    processor = words()
    model = vlm(processor, tower={"mean": [0.5] * 3, "std": [0.5] * 3})
    export(model, processor, tmp_path / "out")
    assert_the_same(model, processor, tmp_path / "out", (31, 17), pixels=1.01 / 255)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_tiles_become_llava_next(resample: str, tmp_path: Path) -> None:
    tiling = TilingConfig(grid_pinpoints=PINPOINTS, resample=resample)
    processor = words(ImageConfig(size=SIDE, mean=CLIP_MEAN, std=[0.3]), tiling=tiling)
    model = vlm(processor, tower={"mean": CLIP_MEAN, "std": [0.3] * 3})
    export(model, processor, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava_next"
    for size in ((31, 17), (16, 60)):
        assert_the_same(model, processor, tmp_path / "out", size)


@pytest.mark.parametrize(
    "options",
    [
        {"image_words": "Image {n}: "},
        {"image_start": "<im>", "image_end": "</im>"},
        {"image_words": "Image {n}: ", "image_end": "</im>"},
    ],
)
@pytest.mark.parametrize("family", [None, "qwen-2", "vicuna", "parts"])
def test_what_stands_around_images(options: dict[str, str], family: str | None, tmp_path: Path) -> None:
    if family is None:
        processor = words(**options)
    elif family == "parts":
        template = (
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
            "{% for part in message['content'] %}"
            "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        processor = chat(tmp_path / "words", "qwen-2", chat_template=template, **options)
        assert processor.takes_parts
    else:
        processor = chat(tmp_path / "words", family, **options)
    model = vlm(processor)
    export(model, processor, tmp_path / "out")
    size = (SIDE, SIDE) if family is None else (31, 17)
    assert_the_same(model, processor, tmp_path / "out", size)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_of_language_models_is_found_again(name: str) -> None:
    config = transformers.AutoConfig.for_model(**(SIZES | MODELS[name]))
    given = {"vocab_size": config.vocab_size, "attention_rule": "causal", **language_entries(config)}
    found = text_config(LanguageConfig.model_validate(given), {"eos_token_id": 22})
    assert found.eos_token_id == 22
    # Phi 3 differs from Mistral in how its weights are laid out alone.
    assert found.model_type == {"phi3": "mistral"}.get(config.model_type, config.model_type)
    mine, theirs = language_entries(found), language_entries(config)
    for entry, value in mine.items():
        assert value == (pytest.approx(theirs[entry]) if isinstance(value, float) else theirs[entry]), entry


def test_a_decoder_that_no_family_has_is_refused_with_what_differs() -> None:
    config = LanguageConfig(
        **LANGUAGE, vocab_size=9, qk_norm="head", logit_softcap=3.0, norm_placement="post"
    )
    with pytest.raises(ValueError, match=r"no language model of transformers is like it; .* differs in "):
        text_config(config, {})


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"language": {"attention_rule": "mmca"}}, [r"attention_rule is \'mmca\'.*accelerate\(model, att"]),
        (
            {"language": {"attention_rule": "prefix"}},
            ["attention_rule is 'prefix' and would have to be \"caus"],
        ),
        ({"language": {"moe": {"layers": [1], "num_experts": 2}}}, ["the language model has experts"]),
        ({"language": {"partial_lora": {"rank": 2}}}, ["partial_lora, which cannot be merged"]),
        (
            {"language": {"qk_norm": "all", "qkv_bias": True}},
            ["no language model of transformers is like it"],
        ),
        ({"connector": {"type": "resampler", "queries": 4}}, ["connector is 'resampler'"]),
        (
            {"connector": "prismatic", "position_scheme": "share-all"},
            ["is 'prismatic'", "scheme is 'share-all'"],
        ),
        ({"fusion": {"hidden_size": 8}}, ["a fusion between vision tower and connector"]),
        ({"fusion": {"grid": 2}}, ["fusion.grid 2 resizes"]),
        ({"tower": {"last_norm": True}}, ["last_norm"]),
        ({"tower": {"levels": [0, 1]}}, ["merges its levels by 'layer_scale'"]),
        ({"tower": {"image_size": 16}}, [r"resizes them to \(16, 16\)"]),
        ({"encoder": "dinov2"}, ["model_type 'dinov2'"]),
    ],
)
def test_what_llava_is_not_is_refused_with_every_reason(
    changes: dict[str, Any], reasons: list[str], tmp_path: Path
) -> None:
    processor = words()
    model = vlm(processor, changes.pop("encoder", "clip_vision_model"), **changes)
    with pytest.raises(ValueError, match="none that LLaVA of transformers can be: ") as error:
        export(model, processor, tmp_path / "out")
    for reason in reasons:
        error.match(reason)
    assert not (tmp_path / "out").exists()


def test_several_reasons_stand_in_one_message(tmp_path: Path) -> None:
    processor = words()
    model = vlm(
        processor, connector="prismatic", language={"attention_rule": "mmca"}, fusion={"norm": "layernorm"}
    )
    with pytest.raises(ValueError, match=r"attention_rule .*; the connector .*; there is a fusion"):
        export(model, processor, tmp_path / "out")


def test_other_towers_and_grey_images_are_refused(tmp_path: Path) -> None:
    processor = words(ImageConfig(size=SIDE, channels=1))
    tower = {"type": "vit", "name": "own", "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    model = vlm(processor)
    config = model.config.model_dump() | {"vision_towers": [tower, tower | {"name": "other"}]}
    with pytest.raises(ValueError, match=r"1 channel .*2 vision towers.*'own' is of type 'vit'"):
        export(VLM(VLMConfig.model_validate(config)), processor, tmp_path / "out")


def test_padding_of_another_colour_is_refused(tmp_path: Path) -> None:
    processor = words(ImageConfig(size=SIDE, fit="pad"))
    with pytest.raises(ValueError, match=r"padded with \[0.5\].*model.image.mean"):
        export(vlm(processor), processor, tmp_path / "out")


def test_a_folder_that_holds_something_is_kept(tmp_path: Path) -> None:
    processor = words()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        export(vlm(processor), processor, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_lora_is_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    processor = words()
    model = vlm(processor, language={"lora": {"rank": 2}})
    export(model, processor, tmp_path / "out")
    assert_the_same(model, processor, tmp_path / "out")


def test_weights_can_be_written_in_half(tmp_path: Path) -> None:
    processor = words()
    export(vlm(processor), processor, tmp_path / "out", torch.bfloat16)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}


def test_a_template_that_writes_otherwise_there_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    processor = words()
    monkeypatch.setattr(
        "pyvlm.integrations.transformers.processor_files.chat_template",
        lambda p: (
            "{% for m in messages %}{% for c in m.content %}{{ c.text or '<image>' }}{% endfor %}{% endfor %}"
        ),
    )
    with pytest.raises(ValueError, match="the chat template cannot be exported"):
        export(vlm(processor), processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_with_another_encoder_is_refused(tmp_path: Path) -> None:
    save_llava(tmp_path / "base", "llama", "siglip_vision_model")
    processor = words()
    with pytest.raises(ValueError, match="another vision encoder"):
        export(vlm(processor), processor, tmp_path / "out", base=tmp_path / "base")

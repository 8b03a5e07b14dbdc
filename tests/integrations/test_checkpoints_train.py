"""LLaVA checkpoints taken apart and trained by recipes: they start as what they were, and go back as that."""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_folders import QUESTION, picture, save_llava, transformers
from safetensors.torch import load_file, save_file

from pyvlm.integrations.transformers.export import export
from pyvlm.models.pretrained_vlm import read_vlm
from pyvlm.models.vlm import VLM
from pyvlm.training.chat import Chat, load_model, load_speaker
from pyvlm.training.recipe import Recipe, load_recipe
from pyvlm.training.recipe_paths import fitting_recipe
from pyvlm.training.trainer import new_model, train

KINDS: dict[str, dict[str, Any]] = {
    "clip and llama": {"text": "llama", "vision": "clip_vision_model"},
    "siglip and qwen2": {"text": "qwen2", "vision": "siglip_vision_model", "vision_feature_layer": -1},
    "siglip and tied qwen3": {
        "text": "qwen3",
        "vision": "siglip_vision_model",
        "text_options": {"tie_word_embeddings": True},
    },
    "tiles": {"tiles": True},
    "padded": {"pixels": {"do_pad": True, "resample": 2}},
    "two levels": {"vision_feature_layer": [-3, -1]},
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder, **KINDS[request.param])
    return folder


def recipe_of(folder: Path, *settings: str, **options: Any) -> Recipe:
    name = options.pop("name", None) or fitting_recipe(str(folder))
    variant = options.pop("variant", "tiny")
    return load_recipe(name, variant, checkpoint=str(folder), settings=settings, **options)


def dialogue() -> list[dict[str, Any]]:
    image = {"type": "image", "image": picture(31, 17)}
    texts = [{"type": "text", "text": text} for text in ("image 1:", QUESTION)]
    return [{"role": "user", "content": [texts[0], image, texts[1]]}]


def test_it_starts_as_what_it_was(folder: Path) -> None:
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    their_processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = their_processor.apply_chat_template(
        dialogue(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    recipe = recipe_of(folder)
    model, processor = new_model(recipe).eval(), recipe.processor()
    sample = processor.encode(dialogue(), add_generation_prompt=True)
    assert sample["input_ids"].tolist() == inputs["input_ids"][0].tolist()
    torch.testing.assert_close(sample["images"], inputs["pixel_values"].flatten(0, -4), rtol=0, atol=1e-6)
    batch = processor.collate([sample])
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_it_goes_back_as_what_it_was(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder)
    new_model(recipe).save_pretrained(tmp_path / "model", recipe.processor())
    export(VLM.from_pretrained(tmp_path / "model"), recipe.processor(), tmp_path / "out", base=folder)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert config_of(folder) == config_of(tmp_path / "out")
    one, other = (
        json.loads((path / "processor_config.json").read_text()) for path in (folder, tmp_path / "out")
    )
    assert one == other
    assert template_of(folder) == template_of(tmp_path / "out")
    ids = [
        transformers.AutoTokenizer.from_pretrained(path)(QUESTION + "<image>")
        for path in (folder, tmp_path / "out")
    ]
    assert ids[0] == ids[1]


def config_of(folder: Path) -> dict[str, Any]:
    """What config.json holds, less where the dtype stands."""
    content = json.loads((folder / "config.json").read_text())
    for part in (content, content["text_config"], content["vision_config"]):
        part.pop("dtype", None)
    return content


def template_of(folder: Path) -> str:
    return (folder / "chat_template.jinja").read_text()


def test_without_its_base_only_unread_layers_differ(tmp_path: Path) -> None:
    save_llava(tmp_path / "llava")
    recipe = recipe_of(tmp_path / "llava")
    export(new_model(recipe), recipe.processor(), tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("llava", "out"))
    assert before.keys() == after.keys()
    differ = [name for name in before if not torch.equal(before[name], after[name])]
    assert differ
    assert all(re.match(r"vision_tower\.(encoder\.layers\.2\.|post_layernorm\.)", name) for name in differ)


@pytest.mark.parametrize("kind", ["siglip and qwen2", "tiles"])
def test_stages_train_it_and_it_chats(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "llava"
    save_llava(folder, **KINDS[kind])
    few = [
        f"stages.{stage}.{what}" for stage in ("align", "instruct") for what in ("steps=1", "batch_size=2")
    ]
    recipe = recipe_of(folder, *few, "trackers=[]", "profile_every=0")
    start = new_model(recipe).state_dict()
    trained = train(recipe, tmp_path / "run", progress=False).model.state_dict()
    changed = {name.partition(".")[0] for name in start if not torch.equal(start[name], trained[name])}
    assert {"connector", "language"} <= changed
    picture(31, 17).save(tmp_path / "one.png")
    for model in (tmp_path / "run", tmp_path / "out"):
        if model.name == "out":
            export(*load_model(tmp_path / "run"), model)
        chat = Chat(load_speaker(model), [tmp_path / "one.png"], lambda line: None)
        assert isinstance(chat.ask(QUESTION), str)


def test_the_attention_rule_is_the_recipes(tmp_path: Path) -> None:
    save_llava(tmp_path)
    recipe = recipe_of(tmp_path, "model.language.attention_rule=mmca")
    assert new_model(recipe).config.language.attention_rule == "mmca"


def test_the_recipe_follows_from_the_kind(tmp_path: Path) -> None:
    save_llava(tmp_path / "one")
    save_llava(tmp_path / "other", tiles=True)
    assert fitting_recipe(str(tmp_path / "one")) == "llava-1.5"
    assert fitting_recipe(str(tmp_path / "other")) == "llava-1.6"


@pytest.mark.parametrize(
    ("name", "tiles", "message"),
    [
        ("llava-1.6", False, "it has no tiles, and the recipe some"),
        ("llava-1.5", True, "it has tiles, and the recipe none"),
        ("demo", False, "one vision tower of transformers, and the recipe these: "),
        ("comm", False, "the recipe these: transformers, transformers; it has nothing between"),
        ("qwen-vl", False, "its connector is mlp2x_gelu, and the recipe's resampler"),
    ],
)
def test_another_architecture_than_the_recipes_is_told(
    name: str, tiles: bool, message: str, tmp_path: Path
) -> None:
    save_llava(tmp_path, tiles=tiles)
    with pytest.raises(ValueError, match=f"--from .* does not fit the recipe: .*{message}"):
        recipe_of(tmp_path, name=name, variant=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy='full' of clip_vision_model",
        ),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        (
            {"multimodal_projector_bias": False, "projector_hidden_act": "silu"},
            "'silu'; multimodal_projector_bias",
        ),
        ({"vision": "dinov2"}, "vision_config of model_type 'dinov2'"),
        ({"image_token_index": 100_000}, "image_token_index=100000"),
        ({"pixels": {"resample": 1}}, "resample=1 of its image processor"),
        ({"pixels": {"size": {"shortest_edge": 16}}}, "of its image processor for an encoder of 12"),
        ({"pixels": {"do_normalize": False}}, "do_normalize=False"),
    ],
)
def test_settings_that_ours_does_not_have_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_llava(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        read_vlm(str(tmp_path))


def test_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(
        ValueError, match="model_type 'llama' cannot be taken apart; expected llava or llava_next"
    ):
        fitting_recipe(str(tmp_path))


def test_an_empty_second_layer_is_the_linear_connector(tmp_path: Path) -> None:
    save_llava(tmp_path, projector_hidden_act="linear")
    change = ("model.connector=linear",)
    recipe_file = tmp_path / "linear.yaml"
    text = (resources.files("pyvlm.recipes") / "llava-1.5.yaml").read_text()
    recipe_file.write_text(text.replace("connector: mlp2x_gelu", "connector: linear"))
    recipe = recipe_of(tmp_path, *change, name=str(recipe_file))
    with pytest.raises(ValueError, match="linear_2 is not the identity"):
        new_model(recipe)
    weights = load_file(tmp_path / "model.safetensors")
    weights["multi_modal_projector.linear_2.weight"] = torch.eye(16)
    weights["multi_modal_projector.linear_2.bias"] = torch.zeros(16)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    connector = new_model(recipe).connector
    assert torch.equal(connector.weight, weights["multi_modal_projector.linear_1.weight"])


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    save_llava(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["multi_modal_projector.linear_1.bias"]
    weights["multi_modal_projector.linear_2.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"linear_1.bias is missing; .*linear_2.bias is \[5\] and must be \[16\]"
    ):
        new_model(recipe_of(tmp_path))


def test_older_names_of_weights_are_read(tmp_path: Path) -> None:
    save_llava(tmp_path)
    model = new_model(recipe_of(tmp_path)).state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    older = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): x for name, x in weights.items()}
    newer = {re.sub(r"^(vision_tower|multi_modal)", r"model.\1", name): x for name, x in weights.items()}
    newer = {name.replace("language_model.model.", "model.language_model."): x for name, x in newer.items()}
    newer = {name.replace("language_model.lm_head", "lm_head"): x for name, x in newer.items()}
    for renamed in (older, newer):
        assert renamed.keys() != weights.keys()
        save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
        again = new_model(recipe_of(tmp_path)).state_dict()
        assert all(torch.equal(model[name], again[name]) for name in model)


def test_older_places_of_the_chat_template_are_read(tmp_path: Path) -> None:
    save_llava(tmp_path)
    written = recipe_of(tmp_path).processor().encode(dialogue())["input_ids"]
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert torch.equal(recipe_of(tmp_path).processor().encode(dialogue())["input_ids"], written)


def test_the_chat_template_must_be_one_to_learn_from(tmp_path: Path) -> None:
    endless = (
        "{% for m in messages %}{% for c in m.content %}{{ c.text or '<image>' }}{% endfor %}{% endfor %}"
    )
    save_llava(tmp_path, template=endless)
    with pytest.raises(ValueError, match=r"does not end every answer.*vicuna"):
        recipe_of(tmp_path).processor()

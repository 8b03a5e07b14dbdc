"""Stages of captions and stages of larger images: trained, resumed, saved, reckoned with, and looked at."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pyvlm.cli import main
from pyvlm.models.processor import Processor
from pyvlm.models.vlm import VLM
from pyvlm.training.budget import make_budget
from pyvlm.training.heldout import HeldOut, Look
from pyvlm.training.recipe import load_recipe
from pyvlm.training.recipe_card import card
from pyvlm.training.trainer import open_sources, stage_processors, train

ONE_QUESTION = {"images": [1, 1], "rounds": [1, 1]}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def larger(small_recipe):
    """Stages at 8, 16 and 16 pixels; the first of captions, the last with the moments of the one before."""

    def make(**changes):
        stages = {
            "one": {"form": "plain", "steps": 3, "data": ONE_QUESTION},
            "two": {"image_size": 16, "steps": 3, "data": ONE_QUESTION},
            "three": {"steps": 2, "batch_size": 4, "lr": 1e-2, "keep_optimizer": True, "data": ONE_QUESTION},
        }
        options = {"evaluation": {"every": 0}, "trackers": [], "profile_every": 0, "checkpoint_every": 2}
        return small_recipe(stages=stages, **options, **changes)

    return make


def losses(folder: Path):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, larger):
    """What an uninterrupted run leaves, and its losses."""
    folder = tmp_path_factory.mktemp("whole")
    return train(larger(), folder, progress=False), losses(folder)


# Before, at and behind the border at which images grow, and within the stage after it.
@pytest.mark.parametrize("killed", [2, 3, 5, 7])
def test_larger_images_survive_resuming(tmp_path, larger, whole, killed: int) -> None:
    recipe, (whole, expected) = larger(), whole
    assert whole.model.config.image.size == 16
    assert whole.model.vision_towers["vit"].position.shape == (16, 16)
    assert whole.processor.config.image.size == 16
    assert whole.processor.config.form == "dialogue"

    def kill(done: int) -> None:
        if done == killed:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path / "cut", progress=False, after_step=kill)
    saved = json.loads((tmp_path / "cut" / "checkpoint" / "config.json").read_text())
    assert saved["image"]["size"] == (16 if killed > 3 else 8)
    again = train(recipe, tmp_path / "cut", progress=False).model
    assert losses(tmp_path / "cut") == expected
    reloaded = VLM.from_pretrained(tmp_path / "cut" / "model")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    assert reloaded.config == whole.model.config


def test_what_is_saved_on_the_way_has_the_size_in_force(tmp_path, larger, monkeypatch) -> None:
    sizes = []

    def look(held_out, model, processor):
        sizes.append((model.config.image.size, processor.config.image.size, processor.config.form))
        return Look("held_out_accuracy", len(sizes))

    monkeypatch.setattr(HeldOut, "look", look)
    recipe = larger(keep_stages=True)
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"every": 3})})
    train(recipe, tmp_path, progress=False)
    assert sizes == [(8, 8, "dialogue"), (16, 16, "dialogue")]
    for name, size in (("stages/one", 8), ("stages/two", 16), ("best", 16), ("model", 16)):
        processor = Processor.from_pretrained(tmp_path / name)
        assert processor.config.image.size == VLM.from_pretrained(tmp_path / name).config.image.size == size
        assert processor.config.form == "dialogue"


def test_held_out_files_are_seen_in_the_size_of_the_stage(tmp_path, larger) -> None:
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "one.png")
    content = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which"}]},
        {"role": "assistant", "content": "3"},
    ]
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "one.png", "messages": content}))
    data = {"source": "files", "path": str(tmp_path / "data.jsonl")}
    recipe = larger()
    recipe = type(recipe).model_validate(recipe.model_dump() | {"evaluation": {"data": data}})
    processors = stage_processors(recipe)
    assert processors[1] is processors[2]
    held_out = HeldOut(recipe, processors)
    assert len(held_out.sources) == 2
    for stage, processor in zip(recipe.stages, processors, strict=True):
        torch.manual_seed(0)
        model = VLM(recipe.model_in(stage))
        sample = processor.collate(held_out.sources[processor].samples(0, [0]))
        look = held_out.look(model, processor)
        assert sample["images"].shape[-1] == model.config.image.size
        assert look.value == pytest.approx(model.eval()(**sample).cross_entropy.item())


def test_each_stage_reads_samples_in_its_form_and_size(larger) -> None:
    recipe = larger()
    sources, _ = open_sources(recipe, stage_processors(recipe))
    first, second, third = (source.samples(0, [0])[0] for source in sources)
    processor = recipe.processor()
    written = [processor.tokenizer.id_to_token(i) for i in first["input_ids"].tolist()]
    assert written[:4] == ["<image>"] * 4
    assert "<user>" not in written
    assert (first["labels"][4:] == first["input_ids"][4:]).all()
    assert second["input_ids"][0] == processor.tokenizer.token_to_id("<user>")
    assert [sample["images"].shape[-1] for sample in (first, second, third)] == [8, 16, 16]


def test_budget_and_card_know_the_size_of_each_stage() -> None:
    recipe = load_recipe("pali-3", "tiny")
    stages = make_budget(recipe, rate=1e12).stages
    assert [stage.images for stage in stages] == [16, 16, 16]
    tokens = [model.tokens_per_image for model in map(recipe.model_in, recipe.stages)]
    assert tokens == [16, 36, 64]
    for number, stage in enumerate(stages[1:], start=1):
        assert stage.tokens - stages[0].tokens == 16 * (tokens[number] - tokens[0])
    vision = [stage.step["vision.siglip"].forward for stage in stages]
    assert vision[0] < vision[1] < vision[2]
    assert "captions" not in card(recipe)
    assert "images of 48 pixels, 36 tokens each" in card(recipe)
    assert "connector 0.01; captions" in card(load_recipe("llava-1.5", "tiny"))
    captions = make_budget(load_recipe("llava-1.5", "tiny"), rate=1e12).stages[0]
    dialogues = load_recipe("llava-1.5", "tiny", settings=["stages.align.form=dialogue"])
    assert captions.tokens < make_budget(dialogues, rate=1e12).stages[0].tokens


def test_experts_of_one_stage_stay_when_images_grow_in_another(larger) -> None:
    recipe = larger(model={"language": {"moe": None}})
    stages = dict(recipe.stages)
    content = recipe.model_dump() | {
        "stages": {
            "two": stages["two"].model_dump()
            | {"upcycle": {"layers": [0], "num_experts": 2}, "train": ["moe", "vision"]},
            "three": stages["three"].model_dump() | {"image_size": 24},
        }
    }
    budget = make_budget(type(recipe).model_validate(content), rate=1e12)
    assert all("experts" in stage.step for stage in budget.stages)


def test_data_show_of_a_stage(tmp_path, larger, capsys) -> None:
    content = larger().model_dump(mode="json", exclude_none=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "one.png")
    turns = [{"from": "human", "value": "which digit is in image 1?\n<image>"}, {"from": "gpt", "value": "3"}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "one.png", "conversations": turns}]))
    command = ["data", "show", str(tmp_path / "data.json"), "--recipe", str(tmp_path / "recipe.yaml")]
    assert main([*command, "--stage", "one"]) == 0
    printed = capsys.readouterr().out
    assert "6 tokens, 2 of them learnt, 1 images" in printed
    assert "  0-3   2  <image> ×4  ·      image 1" in printed  # noqa: RUF001
    assert main([*command, "--stage", "two"]) == 0
    assert "<user>" in capsys.readouterr().out
    assert main([*command, "--stage", "four"]) == 2
    assert "has the stages one, two, three" in capsys.readouterr().err
    assert main([*command[:3], "--stage", "one"]) == 2
    assert "--stage: of a recipe, and none is named" in capsys.readouterr().err
    assert main([*command, "--stage", "two", "--set", "stages.two.form=plain"]) == 0
    assert "<user>" not in capsys.readouterr().out


FILES = {"source": "files", "path": "a.json"}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"form": "plane"}, "'dialogue' or 'plain'"),
        ({"form": "plain"}, r'form "plain" is one image and its caption: give data.images \[1, 1\]'),
        ({"form": "plain", "data": ONE_QUESTION | {"rounds": [1, 2]}}, r"give data.rounds \[1, 1\]"),
        ({"form": "plain", "data": FILES | {"blend": {}}}, "leave out data.blend"),
        ({"form": "plain", "data": FILES | {"image_words": "{n}"}}, "leave out data.image_words"),
        ({"image_size": 0}, "greater than 0"),
        ({"image_size": 18}, "stage 'one': image_size: images of 18 pixels .* no multiple of patch_size 4"),
    ],
)
def test_stages_that_cannot_be_are_refused(small_recipe, stage, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_recipe(stages={"one": stage})

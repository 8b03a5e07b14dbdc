"""Every system's recipe, at full size in numbers and tiny in earnest: stage by stage, reloaded, talked to."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_languages, vision_encoders
from models.chat_folders import FAMILIES, write_folder
from PIL import Image
from torch import Tensor

from pyvlm.models import VLM, hash_parts, upcycle
from pyvlm.models.speaker import Sampling
from pyvlm.training.chat import Chat, load_model
from pyvlm.training.photos import photographs
from pyvlm.training.recipe import Recipe, load_recipe, shipped_recipes
from pyvlm.training.recipe_card import card, list_recipes
from pyvlm.training.replies import VLMSpeaker
from pyvlm.training.trainer import new_model, train

SYSTEMS = [name for name in shipped_recipes() if name != "demo"]
STEPS = 8  # of each stage: enough for the loss to fall


def shortened(recipe: Recipe) -> Recipe:
    stages = {
        name: stage.model_copy(update={"steps": STEPS, "batch_size": 8, "warmup": 0})
        for name, stage in recipe.stages.items()
    }
    return recipe.model_copy(update={"stages": stages, "keep_stages": True, "profile_every": STEPS})


def test_all_nine_are_there() -> None:
    assert SYSTEMS == [
        "comm",
        "deepspeed-visualchat",
        "internlm-xcomposer2",
        "llava-1.5",
        "llava-1.6",
        "moe-llava",
        "mousi",
        "pali-3",
        "qwen-vl",
    ]
    listed = list_recipes().splitlines()
    assert [line.split()[0] for line in listed] == shipped_recipes()
    assert all(len(line.split()) > 5 for line in listed)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llava-1.5", "7,050,312,704"),  # Vicuna 7B, CLIP-L without its last layer, two layers between
        ("qwen-vl", "9,655,889,920"),  # the paper: 9.6 billion
        ("moe-llava", "2,134,033,408"),
    ],
)
def test_full_size_is_counted_without_a_checkpoint(name: str, parameters: str) -> None:
    assert parameters in card(load_recipe(name))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_stage_trains_its_parts_and_the_model_talks(name: str, tmp_path: Path) -> None:
    recipe = shortened(load_recipe(name, "tiny"))
    trained = train(recipe, tmp_path / "run", progress=False)

    before = new_model(recipe)
    for stage_name, stage in recipe.stages.items():
        after = VLM.from_pretrained(tmp_path / "run" / "stages" / stage_name)
        if stage.upcycle is not None:
            before = upcycle(before, stage.upcycle, recipe.seed)
        old, new = hash_parts(before, stage.finer), hash_parts(after, stage.finer)
        assert {part for part in old if old[part] != new[part]} == set(stage.train), stage_name
        before = after

    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == STEPS * len(recipe.stages)
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    for stage_name, stage in recipe.stages.items():
        of_stage = [line["loss"] for line in metrics if line.get("stage") == stage_name and "loss" in line]
        # Copies of an MLP begin with its loss, and a few steps of them are noise.
        assert stage.upcycle is not None or np.mean(of_stage[-4:]) < 0.95 * np.mean(of_stage[:4]), stage_name

    model, processor = load_model(tmp_path / "run")
    assert_same(model.state_dict(), trained.model.state_dict())
    picture = tmp_path / "cat.png"
    Image.fromarray(photographs()["cat"]).save(picture)
    chat = Chat(VLMSpeaker(model, processor, Sampling()), [picture], tell=lambda line: None)
    assert isinstance(chat.ask("what is in image 1?"), str)
    assert isinstance(chat.ask("what is in image 1?"), str)


def assert_same(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for key, tensor in given.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small to share: two threads take longer than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A language model, an encoder and conversations on disk, as transformers and LLaVA have them."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_languages.save("llama", root / "lm", torch.bfloat16, vocab_size=400)
    write_folder(root / "lm", FAMILIES["vicuna"])
    vision_encoders.whole_encoder("clip_vision_model").save_pretrained(root / "clip")
    (root / "images").mkdir()
    records: list[dict[str, Any]] = []
    for number, (word, picture) in enumerate(photographs().items()):
        Image.fromarray(picture).save(root / "images" / f"{word}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat is in the image?"},
            {"from": "gpt", "value": f"It is a {word}."},
        ]
        records.append({"id": str(number), "image": f"images/{word}.png", "conversations": turns})
    (root / "data.json").write_text(json.dumps(records))
    return {name: str(root / path) for name, path in (("lm", "lm"), ("clip", "clip"), ("data", "data.json"))}


def from_disk(folders: dict[str, str], name: str = "llava-1.5", **options: Any) -> Recipe:
    settings = [
        "image={size: 12, fit: pad}",
        *(f"stages.{stage}.batch_size=4" for stage in load_recipe(name).stages),
    ]
    return load_recipe(
        name,
        language=folders["lm"],
        vision=[folders["clip"]],
        data=[folders["data"]],
        settings=[f"model.{settings[0]}", *settings[1:], *options.pop("settings", [])],
        **options,
    )


@pytest.mark.parametrize("name", ["llava-1.5", "deepspeed-visualchat", "moe-llava"])
def test_recipes_begin_with_checkpoints_and_data_from_disk(
    name: str, folders: dict[str, str], tmp_path: Path
) -> None:
    recipe = from_disk(folders, name)
    language = recipe.model.language
    assert (language.hidden_size, language.num_layers, language.kv_heads) == (16, 3, 2)
    assert recipe.model.tokens_per_image in (9, 10)
    start = new_model(recipe)
    loaded = start.language.embed_tokens.weight
    trained = train(recipe, tmp_path / "run", progress=False)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    steps = sum(stage.count_steps(12) for stage in recipe.stages.values())
    assert len(losses) == (steps if name != "deepspeed-visualchat" else 9)  # blended: fewer, longer samples
    assert all(np.isfinite(losses))
    # From the folder: a random start would have another spread, and other values.
    again = VLM(recipe.model).language.embed_tokens.weight
    assert torch.equal(again.float(), loaded)
    assert list((tmp_path / "run" / "lengths").glob("*.npz"))  # of the data's samples, for the next time
    model, processor = load_model(tmp_path / "run")
    assert_same(model.state_dict(), trained.model.state_dict())
    picture = Path(folders["data"]).parent / "images" / "cat.png"
    chat = Chat(VLMSpeaker(model, processor, Sampling()), [picture], tell=lambda _: None)
    assert isinstance(chat.ask("What is in the image?"), str)


def test_what_is_missing_is_asked_for(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give its folder with --lm, or take the variant tiny"):
        train(load_recipe("llava-1.5"), tmp_path / "run", progress=False)
    recipe = load_recipe("llava-1.5", language=folders["lm"], vision=[folders["clip"]])
    with pytest.raises(ValueError, match=r"stage 'align': .*--data PATH"):
        train(recipe, tmp_path / "other", progress=False)


def test_settings_reach_any_key(folders: dict[str, str]) -> None:
    recipe = load_recipe(
        "llava-1.5", "tiny", settings=["stages.align.lr=0.5", "seed=7", "model.connector=linear"]
    )
    assert (recipe.stages["align"].lr, recipe.seed, recipe.model.connector) == (0.5, 7, "linear")
    for setting, message in (
        ("stages.align", "expected KEY=VALUE"),
        ("stages.align.rate=1", "rate is unknown"),
        ("model.vision_towers.3.levels=[1]", "there is no model.vision_towers.3 in the recipe"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe("llava-1.5", "tiny", settings=[setting])

from pathlib import Path
from typing import Any

import pytest

from pyvlm.training.recipe_paths import with_paths

CONTENT: dict[str, Any] = {
    "model": {
        "vision_towers": [
            {"name": "clip", "type": "transformers", "encoder": {"model_type": "clip"}, "levels": [-2]},
            {"name": "dino", "type": "transformers", "encoder": {}, "image_size": 28, "mean": [0.5]},
            {"name": "conv", "type": "conv"},
        ],
        "language": {"hidden_size": 8, "attention_rule": "mmca"},
    },
    "stages": {
        "align": {"data": {"source": "files", "max_length": 64}},
        "talk": {"data": {"source": "photos", "crop": 0.5}},
        "rest": {"steps": 3},
    },
}


def test_nothing_given_changes_nothing() -> None:
    assert with_paths(CONTENT, None, [], []) == CONTENT


def test_language_keeps_what_is_the_recipes() -> None:
    language = with_paths(CONTENT, "lm", [], [])["model"]["language"]
    assert language == {"hidden_size": 8, "attention_rule": "mmca", "pretrained": "lm"}


def test_a_folder_of_an_encoder_replaces_what_it_says_itself() -> None:
    clip, dino, conv = with_paths(CONTENT, None, ["dino=d", "c"], [])["model"]["vision_towers"]
    assert clip == {"name": "clip", "type": "transformers", "levels": [-2], "pretrained": "c"}
    assert dino == {"name": "dino", "type": "transformers", "pretrained": "d"}
    assert conv == {"name": "conv", "type": "conv"}


def test_data_of_files_keeps_its_options_and_other_data_go() -> None:
    stages = with_paths(CONTENT, None, [], ["a.json", "rest=b.json"])["stages"]
    assert stages["align"]["data"] == {"source": "files", "max_length": 64, "path": "a.json"}
    assert stages["talk"]["data"] == {"source": "files", "path": "a.json"}
    assert stages["rest"] == {"steps": 3, "data": {"source": "files", "path": "b.json"}}


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    stages = with_paths(CONTENT, None, [], [str(folder)])["stages"]
    assert {stage["data"]["path"] for stage in stages.values()} == {str(folder)}


@pytest.mark.parametrize(
    ("vision", "data", "message"),
    [
        (["conv=x"], [], "there is no tower of transformers 'conv'; there are clip, dino"),
        ([], ["tune=x"], "there is no stage 'tune'; there are align, talk, rest"),
        (["x", "y"], [], "'clip' is given twice"),
        ([], ["talk=x", "talk=y"], "'talk' is given twice"),
    ],
)
def test_mistakes_are_named(vision: list[str], data: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_paths(CONTENT, None, vision, data)


def test_a_recipe_without_towers_of_transformers_is_told() -> None:
    with pytest.raises(ValueError, match="the recipe has no tower of transformers"):
        with_paths({"model": {"vision_towers": [{"name": "conv", "type": "conv"}]}}, None, ["x"], [])

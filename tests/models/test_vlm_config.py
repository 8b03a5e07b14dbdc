"""Configurations: a round trip, and one clear error for everything that cannot be built."""

from typing import Any

import pytest
from pydantic import ValidationError
from tiny_vlm import tiny_config

from pyvlm.models import VLMConfig


def changed(path: str, value: Any) -> dict[str, Any]:
    """The tiny configuration as a dict with the entry at a dotted path changed."""
    config = tiny_config().model_dump()
    *parents, key = path.split(".")
    entry: Any = config
    for parent in parents:
        entry = entry[int(parent) if parent.isdigit() else parent]
    entry[key] = value
    return config


def test_round_trip() -> None:
    config = tiny_config()
    assert VLMConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    "path",
    [
        "hiden_size",
        "image.sizes",
        "language.heads",
        "language.moe.topk",
        "fusion.gird",
        "vision_towers.0.depth",
    ],
)
def test_unknown_keys_are_named(path: str) -> None:
    with pytest.raises(ValidationError, match=path.split(".")[-1]):
        VLMConfig.model_validate(changed(path, 1))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("language.attention_rule", "mcma", "'mcma'.*expected one of causal, mmca"),
        ("language.attention_rule", "bidirectional", "does not suit a next-token model"),
        ("language.num_kv_heads", 3, "num_heads 4 is no multiple of num_kv_heads 3"),
        ("language.head_dim", 5, "even head_dim, got 5"),
        ("language.moe.layers", [3], r"moe.layers \[3\] do not exist; the layers are 0 to 2"),
        ("language.moe.top_k", 4, "top_k must be 1 to num_experts=3, got 4"),
        ("language.window_layers", [0], "window_layers without a window"),
        ("vision_towers.0.levels", [3], r"'vit': levels \[3\] do not exist; it has levels 0 to 2"),
        ("vision_towers.0.levels", [2, -1], "name one level twice"),
        ("vision_towers.0.patch_size", 3, "image size 8 is no multiple of patch_size 3"),
        ("vision_towers.0.num_heads", 5, "hidden_size 12 is no multiple of num_heads 5"),
        ("vision_towers.0.name", "conv", "names of their own"),
        ("vision_towers.1.levels", [0, 3], "stages of different shapes"),
        ("vision_towers.1.blocks", [1], "2 channels for 1 stages"),
        ("vision_towers.0.type", "resnet", "'vit', 'conv'"),
        ("image.channels", 2, "image.channels"),
        ("image_token_id", 23, "outside the vocabulary of 23"),
        ("backend", "cuda", "backend"),
    ],
)
def test_what_cannot_be_built_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VLMConfig.model_validate(changed(path, value))


def test_tokens_per_image() -> None:
    assert tiny_config().tokens_per_image == 4
    first_tower = VLMConfig.model_validate(changed("fusion.grid", None))
    assert first_tower.tokens_per_image == 2 * 2
    sequence = changed("fusion", {"method": "sequence", "hidden_size": 10})
    sequence["vision_towers"][1]["patches"] = 4
    assert VLMConfig.model_validate(sequence).tokens_per_image == 2 * 2 + 4 * 4 // 4


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        tiny_config().image_token_id = 3

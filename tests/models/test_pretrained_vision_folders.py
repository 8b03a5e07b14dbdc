"""Encoders from folders that transformers saved, models that they are part of, and bad configurations."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlm import VOCAB, batch, tiny_config
from vision_encoders import (
    ENCODERS,
    hidden_states,
    pictures,
    shared_pixels,
    tokens,
    transformers,
    whole_encoder,
)

from pyvlm.models import VLM, TransformersConfig, VLMConfig
from pyvlm.models.encoders import FAMILIES, pixels_of_preprocessor
from pyvlm.models.pretrained_vision import TransformersTower


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A dual model as transformers saves it."""
    torch.manual_seed(9)
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=ENCODERS["clip_vision_model"],
            text_config=text | {"vocab_size": 9, "eos_token_id": 1},
            projection_dim=4,
        )
    )
    whole.save_pretrained(tmp_path / "clip")
    preprocessor = {
        "crop_size": {"height": 16, "width": 16},
        "image_mean": [0.1, 0.2, 0.3],
        "do_center_crop": True,
    }
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return tmp_path / "clip"


def test_a_tower_from_a_folder(clip_folder: Path) -> None:
    """The vision part of CLIP, with the sizes of its preprocessor and the weights of its file."""
    given = TransformersConfig(name="clip", pretrained=str(clip_folder), levels=[-2])
    assert (given.image_size, given.mean) == ((16, 16), (0.1, 0.2, 0.3))
    assert given.std == FAMILIES["clip_vision_model"].pixels[1]
    assert given.encoder["model_type"] == "clip_vision_model"
    tower = TransformersTower(given, shared_pixels(given)).eval()
    whole = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    images = pictures((16, 16))
    expected = whole.vision_model(images, interpolate_pos_encoding=True, output_hidden_states=True)
    assert torch.equal(tower(images)[0], expected.hidden_states[-2][:, 1:])

    with_norm = TransformersTower(given.model_copy(update={"last_norm": True}), shared_pixels(given))
    assert torch.equal(with_norm.last_norms[0].weight, whole.vision_model.post_layernorm.weight)


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        ({"crop_size": 336, "size": 400}, 336),
        ({"crop_size": {"height": 224, "width": 200}, "do_center_crop": True}, (224, 200)),
        ({"crop_size": 224, "do_center_crop": False, "size": {"height": 384, "width": 384}}, (384, 384)),
        ({"size": {"shortest_edge": 256}}, (256, 256)),
        ({"size": {"longest_edge": 1024}}, (1024, 1024)),
        ({"size": {"max_height": 3}}, None),
        ({"max_num_patches": 256, "patch_size": 16}, None),
    ],
)
def test_sizes_of_image_processors(processor: dict[str, Any], size: object) -> None:
    pixels = pixels_of_preprocessor(processor | {"image_std": [1, 2, 3]})
    assert pixels == ({} if size is None else {"image_size": size}) | {"std": [1, 2, 3]}


def test_image_processors_saved_with_the_tokenizer(clip_folder: Path) -> None:
    (clip_folder / "preprocessor_config.json").rename(clip_folder / "of_image.json")
    processor = {"image_processor": json.loads((clip_folder / "of_image.json").read_text())}
    (clip_folder / "processor_config.json").write_text(json.dumps(processor))
    given = TransformersConfig(name="clip", pretrained=str(clip_folder))
    assert (given.image_size, given.mean) == ((16, 16), (0.1, 0.2, 0.3))


@pytest.mark.parametrize("model_type", ENCODERS)
def test_every_family_is_read_from_a_folder(model_type: str, tmp_path: Path) -> None:
    whole = whole_encoder(model_type)
    whole.save_pretrained(tmp_path)
    given = TransformersConfig(name="tower", pretrained=str(tmp_path), levels=[-2])
    tower = TransformersTower(given, shared_pixels(given)).eval()
    images = pictures(given.image_size)
    assert torch.equal(tower(images)[0], tokens(hidden_states(whole, model_type, images)[-2], model_type))


def test_weights_that_a_folder_lacks_are_named(clip_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = clip_folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "vision_model.encoder.layers.0.mlp.fc1.weight" in name)
    save_file({k: v for k, v in weights.items() if k != name}, path, metadata={"format": "pt"})
    given = TransformersConfig(name="clip", pretrained=str(clip_folder))
    with pytest.raises(
        ValueError, match=r"lacks 1 weights of its clip_vision_model: .*layers.0.mlp.fc1.weight"
    ):
        TransformersTower(given, shared_pixels(given))


def test_pickled_weights_are_never_read(clip_folder: Path) -> None:
    from safetensors.torch import load_file

    path = clip_folder / "model.safetensors"
    torch.save(load_file(path), clip_folder / "pytorch_model.bin")
    path.unlink()
    given = TransformersConfig(name="clip", pretrained=str(clip_folder))
    with pytest.raises(ValueError, match="cannot be read as clip_vision_model"):
        TransformersTower(given, shared_pixels(given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a folder `pretrained` or a configuration"),
        ({"pretrained": "/no/such/folder"}, "no config.json there"),
        (
            {"encoder": {"model_type": "bert"}},
            "'bert' is unknown to pyvlm; known are clip_vision_model.*FAMILIES",
        ),
        ({"encoder": {"model_type": "no_such"}}, "'no_such'.*known are clip_vision_model"),
        (
            {"encoder": {"model_type": "clip_vision_model", "hidden_size": 7}},
            "hidden size .7. is not a multiple",
        ),
        ({"encoder": {"model_type": "convnext"}, "levels": [0, -1]}, "stages of different shapes"),
        ({"encoder": {"model_type": "vit"}, "levels": [13]}, "it has levels 0 to 12"),
        ({"encoder": {"model_type": "vit"}, "image_size": 8}, "makes nothing of an image of"),
        ({"encoder": {"model_type": "vit"}, "std": [1, 0, 1]}, "must be positive"),
        ({"encoder": {"model_type": "vit"}, "size": 8}, "size"),
    ],
)
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersConfig.model_validate({"name": "tower"} | options)


# ---- in a model


def vlm_config(*towers: dict[str, Any]) -> VLMConfig:
    given = tiny_config().model_dump()
    given |= {"image": {"size": 16}, "vision_towers": list(towers), "fusion": {"hidden_size": 10, "grid": 2}}
    return VLMConfig.model_validate(given)


def test_a_model_with_encoders_comes_back_without_their_folder(clip_folder: Path, tmp_path: Path) -> None:
    sam = {"model_type": "sam_vision_model", **ENCODERS["sam_vision_model"]}
    given = vlm_config(
        {"type": "transformers", "name": "clip", "pretrained": str(clip_folder), "levels": [1, -2]},
        {"type": "transformers", "name": "sam", "encoder": sam, "last_norm": True},
        {"type": "conv", "name": "conv", "channels": [4, 6], "blocks": [1, 2]},
    )
    model = VLM(given).eval()
    whole = transformers.CLIPModel.from_pretrained(clip_folder)
    kept = model.vision_towers["clip"].encoder.encoder.layers[0].mlp.fc1.weight
    assert torch.equal(kept, whole.vision_model.encoder.layers[0].mlp.fc1.weight), (
        "weights are not drawn anew"
    )
    assert model.config.vision_towers[0].pretrained is None

    model.save_pretrained(tmp_path / "model")
    for file in clip_folder.iterdir():
        file.unlink()
    loaded = VLM.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    images = pictures((16, 16), 1)
    input_ids, real = batch([3, *[model.config.image_token_id] * 4, 5])
    assert input_ids.max() < VOCAB
    assert torch.equal(loaded(input_ids, images, real).logits, model(input_ids, images, real).logits)


def test_a_model_in_half_precision_comes_back(tmp_path: Path) -> None:
    dino = {"model_type": "dinov3_vit", **ENCODERS["dinov3_vit"]}
    model = (
        VLM(vlm_config({"type": "transformers", "name": "dino", "encoder": dino})).eval().to(torch.bfloat16)
    )
    model.save_pretrained(tmp_path / "model")
    images = pictures((16, 16), 2)
    loaded = VLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.image_features(images), model.image_features(images))


def test_an_encoder_of_other_channels_is_refused() -> None:
    grey = {"model_type": "vit", **ENCODERS["vit"], "num_channels": 1}
    tower = {"type": "transformers", "name": "vit", "encoder": grey, "mean": [0.5], "std": [0.5]}
    with pytest.raises(ValueError, match="'vit' takes images of 1 channels"):
        vlm_config(tower)


def test_transformers_stays_out_until_it_is_asked_for() -> None:
    code = "import sys, pyvlm, pyvlm.models, pyvlm.nn; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Another image size: the towers compute what their encoders do at it, and nothing else has changed."""

import pytest
import torch
from tiny_vlm import tiny_config
from torch import nn

from pyvlm.models import VLM, VLMConfig, change_image_size
from pyvlm.models.resolution import with_image_size

ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "clip": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
    "siglip": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
    "vit": {"model_type": "vit", "image_size": 32, "patch_size": 8},
    "vit_mae": {"model_type": "vit_mae", "image_size": 32, "patch_size": 8},
    "dinov2": {"model_type": "dinov2", "image_size": 32, "patch_size": 8},
    "dinov3_vit": {"model_type": "dinov3_vit", "image_size": 32, "patch_size": 8},
    "siglip2": {"model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 8},
}
HAVE_TABLES = ("clip", "siglip", "vit", "vit_mae")  # of one size


def config_of(family: str, **changes) -> VLMConfig:
    tower = {"name": "eye", "type": "transformers", "encoder": ENCODER | FAMILIES[family], "levels": [-1]}
    content = tiny_config().model_dump() | {
        "image": {"size": 32, "channels": 3},
        "vision_towers": [tower],
        "fusion": {},
        "connector": "linear",
    }
    return VLMConfig.model_validate(content | changes)


def model_of(config: VLMConfig) -> VLM:
    torch.manual_seed(0)
    return VLM(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [48, 24])
def test_towers_compute_what_the_encoder_does_at_that_size(family: str, size: int) -> None:
    model = model_of(config_of(family))
    larger = change_image_size(model, size)
    grid = size // 8
    assert larger.config.tokens_per_image == grid**2
    assert larger.config.image.size == size
    images = torch.randn(2, 3, size, size)
    tower = larger.vision_towers["eye"]
    with torch.no_grad():
        (level,) = tower(images)
        # The old tower, told to see such images and to interpolate its table in the pass.
        old = model.vision_towers["eye"]
        old.image_size = (size, size)
        (expected,) = old(images)
    assert level.shape == (2, grid**2, 16)
    torch.testing.assert_close(level, expected)
    names = {
        name for name, tensor in tower.state_dict().items() if tensor.shape != old.state_dict()[name].shape
    }
    assert len(names) == (family in HAVE_TABLES)
    for name, parameter in larger.named_parameters():
        changed = name.removeprefix("vision_towers.eye.") in names
        assert (parameter is model.get_parameter(name)) != changed, (
            name
        )  # so that AdamW's moments stay theirs


def test_the_models_own_vit_and_saving(tmp_path) -> None:
    tower = {"name": "eye", "type": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    model = model_of(config_of("clip", image={"size": 16, "channels": 1}, vision_towers=[tower]))
    larger = change_image_size(model, 48)
    old, new = (m.vision_towers["eye"].position.detach() for m in (model, larger))
    # The middle one of every three by three cells lies where an old cell lay.
    torch.testing.assert_close(new.view(12, 12, 8)[1::3, 1::3], old.view(4, 4, 8))
    assert torch.equal(change_image_size(model, 48).vision_towers["eye"].position, new)
    larger.save_pretrained(tmp_path)
    saved = VLM.from_pretrained(tmp_path)
    assert saved.config == larger.config
    assert all(torch.equal(saved.state_dict()[name], tensor) for name, tensor in larger.state_dict().items())


def test_queries_that_read_the_map_keep_their_number() -> None:
    config = config_of("clip", connector={"type": "resampler", "queries": 4})
    larger = change_image_size(model_of(config), 64)
    assert larger.config.tokens_per_image == 4
    with torch.no_grad():
        assert larger.image_features(torch.randn(1, 3, 64, 64)).shape[1] == 4


def test_modes_and_random_numbers_stay() -> None:
    model = model_of(config_of("clip")).train()
    state = torch.get_rng_state()
    larger = change_image_size(model, 48)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in larger.modules())
    assert not any(module.training for module in change_image_size(model.eval(), 48).modules())
    assert isinstance(larger.vision_towers, nn.ModuleDict)
    assert model.config.image.size == 32
    assert model.vision_towers["eye"].image_size == (32, 32)
    assert with_image_size(model.config, 32) is model.config


def test_a_tower_with_a_size_of_its_own_keeps_it() -> None:
    own = {"name": "other", "type": "transformers", "encoder": ENCODER | FAMILIES["clip"], "image_size": 16}
    eye = {"name": "eye", "type": "transformers", "encoder": ENCODER | FAMILIES["clip"]}
    larger = with_image_size(config_of("clip", vision_towers=[eye, own]), 64)
    assert [tower.image_size for tower in larger.vision_towers] == [(64, 64), (16, 16)]
    with pytest.raises(ValueError, match=r"of 64 pixels in place of 32: every tower .* \(other 16\)"):
        with_image_size(config_of("clip", vision_towers=[own]), 64)


TILING = {"grid_pinpoints": [[32, 64]]}
SVA = {"type": "sva", "queries": 4, "hidden_dim": 16, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"tiling": TILING}, 64, "with tiling every tile"),
        ({"position_scheme": "share-by-row-and-column"}, 64, "embeddings of 4 columns, and there would be 8"),
        ({"connector": SVA}, 64, r"windows of \[2\] cells, and they would be of \[4\]"),
        ({}, 4, "makes nothing of an image of"),
    ],
)
def test_what_cannot_follow_is_refused(changes, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"images of {size} pixels in place of 32.*{message}"):
        with_image_size(config_of("clip", **changes), size)


def test_encoders_of_one_size_are_refused() -> None:
    encoder = {"model_type": "layoutlmv3", "input_size": 32, "patch_size": 8} | ENCODER
    tower = {"name": "eye", "type": "transformers", "encoder": encoder}
    with pytest.raises(ValueError, match=r"layoutlmv3 takes images of \(32, 32\) only"):
        with_image_size(config_of("clip", vision_towers=[tower]), 64)

"""Encoders of transformers as towers: their levels are its hidden_states, and nothing else is kept or run."""

import copy
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlm import VOCAB, batch, tiny_config
from tolerance import assert_conforms
from torch import Tensor, nn

from pyvlm.models import VLM, ImageConfig, TransformersConfig, VLMConfig
from pyvlm.models.encoders import FAMILIES, pixels_of_preprocessor, read_encoder
from pyvlm.models.pretrained_vision import TransformersTower

transformers = pytest.importorskip("transformers")

VIT = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
CONVNEXT = {"depths": [1, 2, 1], "hidden_sizes": [4, 6, 8], "num_stages": 3}
SMALL = {"image_size": 12, "patch_size": 4}
ENCODERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": VIT | SMALL,
    "siglip_vision_model": VIT | SMALL,
    "siglip2_vision_model": VIT | {"patch_size": 4, "num_patches": 9},
    "aimv2_vision_model": VIT | SMALL,
    "dinov2": VIT | SMALL,
    "dinov2_with_registers": VIT | SMALL | {"num_register_tokens": 2},
    "dinov3_vit": VIT | SMALL | {"num_register_tokens": 2},
    "dinov3_convnext": {"depths": [1, 2, 1], "hidden_sizes": [4, 6, 8], "image_size": 32},
    "convnext": CONVNEXT | {"patch_size": 4, "image_size": 32},
    "convnextv2": CONVNEXT | {"patch_size": 4, "image_size": 32},
    "sam_vision_model": {
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "output_channels": 6,
        "mlp_dim": 12,
        "image_size": 24,
        "patch_size": 4,
        "window_size": 4,
        "global_attn_indexes": [1],
    },
    "layoutlmv3": VIT | {"input_size": 12, "patch_size": 4, "coordinate_size": 1, "shape_size": 2},
    "vit": VIT | SMALL,
    "vit_mae": VIT | SMALL,
}
LEADING = {"clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 3, "dinov3_vit": 3, "layoutlmv3": 1}
LEADING |= {"vit": 1, "vit_mae": 1}


def config(model_type: str, **options: Any) -> TransformersConfig:
    entry = {"model_type": model_type, **ENCODERS[model_type]}
    return TransformersConfig.model_validate({"name": "tower", "encoder": entry} | options)


def whole_encoder(model_type: str, **changes: Any) -> nn.Module:
    """The whole model as transformers makes it, every parameter away from its start."""
    torch.manual_seed(5)
    source = read_encoder({"model_type": model_type, **ENCODERS[model_type], **changes})
    model = transformers.AutoModel.from_config(source.config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def same_weights(tower: TransformersTower, whole: nn.Module) -> TransformersTower:
    kept = tower.encoder.state_dict().keys()
    tower.encoder.load_state_dict({name: x for name, x in whole.state_dict().items() if name in kept})
    return tower.eval()


def shared_pixels(tower: TransformersConfig) -> ImageConfig:
    """Pixels that are normalised as the encoder wants them already."""
    return ImageConfig(size=tower.image_size[0], mean=tower.mean, std=tower.std)


def build(model_type: str, **options: Any) -> tuple[TransformersTower, nn.Module, TransformersConfig]:
    given = config(model_type, **options)
    whole = whole_encoder(model_type)
    return same_weights(TransformersTower(given, shared_pixels(given)), whole), whole, given


def pictures(size: tuple[int, int], count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size)


def hidden_states(whole: nn.Module, model_type: str, images: Tensor) -> tuple[Tensor, ...]:
    """As transformers gives them."""
    arguments: dict[str, Any] = {"pixel_values": images}
    size = tuple(images.shape[2:])
    if model_type == "siglip2_vision_model":
        from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

        as_patches = [convert_image_to_patches(x.float().numpy(), 4) for x in images]
        patches = torch.stack([torch.from_numpy(x) for x in as_patches]).to(images.dtype)
        arguments = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32),
            "spatial_shapes": torch.tensor([[size[0] // 4, size[1] // 4]] * len(images)),
        }
    if FAMILIES[model_type].positions == "interpolated":
        arguments["interpolate_pos_encoding"] = size != (12, 12)
    if model_type == "vit_mae":
        count = size[0] // 4 * (size[1] // 4)
        arguments["noise"] = torch.arange(count).float().expand(len(images), -1)
    return whole(**arguments, output_hidden_states=True).hidden_states


def tokens(level: Tensor, model_type: str) -> Tensor:
    """A hidden state as the tower hands it on: patches row by row."""
    if FAMILIES[model_type].form == "map":
        return level.flatten(2).transpose(1, 2)
    if level.dim() == 4:
        return level.flatten(1, 2)
    return level[:, LEADING.get(model_type, 0) :]


def levels_of(model_type: str) -> list[int]:
    """Every level that can stand alone; those of a ConvNeXt have unlike shapes."""
    return list(range(config(model_type).num_levels))


def test_every_family_is_tested() -> None:
    assert set(ENCODERS) == set(FAMILIES)


@pytest.mark.parametrize(
    ("model_type", "level"), [(kind, level) for kind in ENCODERS for level in levels_of(kind)]
)
def test_a_level_is_the_hidden_state_of_that_number(model_type: str, level: int) -> None:
    tower, whole, given = build(model_type, levels=[level])
    images = pictures(given.image_size)
    expected = hidden_states(whole, model_type, images)
    assert len(expected) == given.num_levels
    (found,) = tower(images)
    assert torch.equal(found, tokens(expected[level], model_type))
    rows, columns = given.grid(given.image_size[0])
    assert found.shape == (2, rows * columns, given.channels_out)

    assert config(model_type, levels=[level - given.num_levels]).level_indices == [level]


@pytest.mark.parametrize("model_type", [kind for kind in ENCODERS if FAMILIES[kind].form != "map"])
def test_several_levels_in_the_order_asked_for(model_type: str) -> None:
    tower, whole, given = build(model_type, levels=[-2, 0, 1])
    images = pictures(given.image_size)
    expected = hidden_states(whole, model_type, images)
    for found, level in zip(tower(images), [-2, 0, 1], strict=True):
        assert torch.equal(found, tokens(expected[level], model_type))


@pytest.mark.parametrize("model_type", [kind for kind in ENCODERS if FAMILIES[kind].positions != "fixed"])
def test_images_that_are_not_square(model_type: str) -> None:
    size = (32, 48) if "convnext" in model_type else (8, 16)
    tower, whole, given = build(model_type, image_size=size, levels=[-1])
    images = pictures(size)
    (found,) = tower(images)
    assert torch.equal(found, tokens(hidden_states(whole, model_type, images)[-1], model_type))
    rows, columns = given.grid(99)
    assert rows < columns
    assert found.shape[1] == rows * columns


@pytest.mark.parametrize("model_type", ["sam_vision_model", "layoutlmv3", "aimv2_vision_model"])
def test_encoders_of_one_size_say_so(model_type: str) -> None:
    with pytest.raises(ValueError, match=rf"{model_type} takes images of .* only, not \(8, 16\)"):
        config(model_type, image_size=(8, 16))


@pytest.mark.parametrize("model_type", ENCODERS)
def test_what_stands_behind_the_last_layer_on_demand(model_type: str) -> None:
    if FAMILIES[model_type].last is None:
        with pytest.raises(ValueError, match="no norm behind its last layer"):
            config(model_type, last_norm=True)
        return
    given = config(model_type, last_norm=True)
    whole = whole_encoder(model_type)
    tower = TransformersTower(given, shared_pixels(given))
    last = whole.get_submodule(FAMILIES[model_type].last)
    tower.last_norms[0].load_state_dict(last.state_dict())
    same_weights(tower, whole)
    images = pictures(given.image_size)
    level = hidden_states(whole, model_type, images)[-1]
    if model_type == "sam_vision_model":
        expected = last(level).flatten(2).transpose(1, 2)
    else:
        expected = last(tokens(level, model_type))
    assert_conforms(tower(images)[0], expected)
    assert tower(images)[0].shape[2] == given.channels_out
    assert tower(images)[0].shape[1] == given.grid(0)[0] * given.grid(0)[1]


def test_each_level_of_sam_has_a_neck_of_its_own() -> None:
    given = config("sam_vision_model", levels=[-1, 2], last_norm=True)
    tower = TransformersTower(given, shared_pixels(given)).eval()
    images = pictures(given.image_size)
    first, second = tower(images)
    assert first.shape == second.shape == (2, 36, 6)
    with torch.no_grad():
        tower.last_norms[1].layer_norm2.bias.add_(1)
    changed = tower(images)
    assert torch.equal(changed[0], first)
    assert_conforms(changed[1], second + 1)


def test_last_norm_of_an_earlier_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="last_norm fits the last stage only"):
        config("convnext", levels=[1], last_norm=True)


# ---- what is left out


@pytest.mark.parametrize("model_type", ENCODERS)
def test_only_what_the_levels_need_is_there(model_type: str) -> None:
    """Every parameter gets a gradient: no head, no text, no layer above the highest level."""
    tower, whole, given = build(model_type, levels=[-2])
    layers = tower.encoder.get_submodule(FAMILIES[model_type].layers)
    of_whole = whole.get_submodule(FAMILIES[model_type].layers)
    assert len(layers) - 1 == len(of_whole) - 1
    assert not list(layers[-1].parameters())
    cut = sum(p.numel() for p in of_whole[-1].parameters())
    assert sum(p.numel() for p in tower.parameters()) <= sum(p.numel() for p in whole.parameters()) - cut

    sum(level.square().sum() for level in tower.train()(pictures(given.image_size))).backward()
    idle = [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None]
    if model_type == "layoutlmv3":  # its own code takes the biases of positions without a gradient
        idle = [name for name in idle if "rel_pos" not in name]
    assert not idle


def test_layers_above_are_not_run() -> None:
    tower, _, given = build("clip_vision_model", levels=[1])
    calls = []
    for module in tower.modules():
        if type(module).__name__ == "CLIPEncoderLayer":
            module.register_forward_hook(lambda *_: calls.append(1))
    tower(pictures(given.image_size))
    assert len(calls) == 1


def test_other_levels_die() -> None:
    """Without gradients, a level that nobody asked for is gone when the next layer is done."""
    tower, _, given = build("clip_vision_model", levels=[-1])
    seen: list[weakref.ref[Tensor]] = []
    for layer in tower.encoder.encoder.layers:
        layer.register_forward_pre_hook(lambda _, arguments: seen.append(weakref.ref(arguments[0])))
    with torch.no_grad():
        levels = tower(pictures(given.image_size))
    gc.collect()
    assert [ref() is not None for ref in seen] == [False, False, False, True]
    assert levels[0]._base is seen[-1]()
    assert tower._kept is None


# ---- dtypes, gradients, copies


@pytest.mark.parametrize("model_type", ENCODERS)
def test_half_precision_is_that_of_transformers(model_type: str) -> None:
    tower, whole, given = build(model_type)
    rebuilt = transformers.AutoModel.from_config(given.source.config, dtype=torch.bfloat16).eval()
    rebuilt.load_state_dict(whole.state_dict())
    images = pictures(given.image_size).bfloat16()
    (found,) = tower.to(torch.bfloat16)(images)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, tokens(hidden_states(rebuilt, model_type, images)[-1], model_type))


def test_casts_there_and_back_leave_rotary_frequencies_alone() -> None:
    tower, _, given = build("dinov3_vit")
    images = pictures(given.image_size)
    before = tower.encoder.rope_embeddings.inv_freq.clone()
    tower.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(tower.encoder.rope_embeddings.inv_freq, before)
    assert tower(images)[0].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("model_type", ["clip_vision_model", "dinov2", "sam_vision_model"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model_type: str, reentrant: bool) -> None:
    tower, _, given = build(model_type, levels=[0, -2])
    images = pictures(given.image_size).requires_grad_()

    def gradients() -> list[Tensor]:
        tower.zero_grad()
        images.grad = None
        sum(level.square().sum() for level in tower.train()(images)).backward()
        return [images.grad, *(p.grad.clone() for p in tower.parameters() if p.grad is not None)]

    plain = gradients()
    tower.encoder.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for found, expected in zip(gradients(), plain, strict=True):
        assert_conforms(found, expected)


def test_a_copy_stands_alone() -> None:
    tower, _, given = build("clip_vision_model")
    other = copy.deepcopy(tower)
    images = pictures(given.image_size)
    expected = tower(images)[0]
    with torch.no_grad():
        next(tower.parameters()).add_(1)
    assert torch.equal(other(images)[0], expected)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "dinov3_vit", "sam_vision_model", "convnext"])
def test_a_tower_compiles_in_one_graph(model_type: str) -> None:
    tower, _, given = build(model_type)
    images = pictures(given.image_size)
    compiled = torch.compile(tower, backend="aot_eager", fullgraph=True)
    assert_conforms(compiled(images)[0], tower(images)[0])


# ---- pixels


def test_each_encoder_gets_its_own_size_and_normalisation() -> None:
    given = config("clip_vision_model")
    whole = whole_encoder("clip_vision_model")
    image = ImageConfig(size=20, mean=(0.2, 0.3, 0.4), std=(0.5,))
    tower = same_weights(TransformersTower(given, image), whole)
    pixels = torch.rand(2, 3, 20, 20)

    def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    small = nn.functional.interpolate(pixels, size=(12, 12), mode="bilinear", antialias=True)
    expected = hidden_states(whole, "clip_vision_model", normalised(small, given.mean, given.std))[-1]
    assert_conforms(tower(normalised(pixels, image.mean, image.std))[0], expected[:, 1:])


def test_grey_images_for_an_encoder_of_colours() -> None:
    given = config("dinov2")
    tower = TransformersTower(given, ImageConfig(size=12, channels=1)).eval()
    coloured = TransformersTower(given, ImageConfig(size=12)).eval()
    coloured.load_state_dict(tower.state_dict())
    grey = torch.randn(2, 1, 12, 12)
    assert torch.equal(tower(grey)[0], coloured(grey.expand(-1, 3, -1, -1))[0])


# ---- folders


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

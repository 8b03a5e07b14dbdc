"""Encoders of transformers as towers: their levels are its hidden_states, and nothing else is kept or run."""

import copy
import gc
import weakref

import pytest
import torch
from tolerance import assert_conforms
from torch import Tensor, nn
from vision_encoders import (
    ENCODERS,
    build,
    config,
    hidden_states,
    levels_of,
    pictures,
    same_weights,
    shared_pixels,
    tokens,
    transformers,
    whole_encoder,
)

from pyvlm.models import ImageConfig
from pyvlm.models.encoders import FAMILIES
from pyvlm.models.pretrained_vision import TransformersTower


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

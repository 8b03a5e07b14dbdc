"""Vision towers: their levels, and where in the image each token looks."""

import math
from collections.abc import Callable

import pytest
import torch
from tiny_vlm import pictures
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.models import ConvConfig, ImageConfig, ViTConfig
from pyvlm.models.vision import build_tower

IMAGE = ImageConfig(size=8, channels=1)


def vit(**changes: object) -> ViTConfig:
    return ViTConfig(name="vit", patch_size=4, hidden_size=12, num_layers=3, num_heads=2).model_copy(
        update=changes
    )


def conv(**changes: object) -> ConvConfig:
    return ConvConfig(name="conv", channels=[4, 6], blocks=[1, 2]).model_copy(update=changes)


def run(config: ViTConfig | ConvConfig, images: Tensor) -> list[Tensor]:
    tower = build_tower(config, IMAGE, "auto").double()
    torch.manual_seed(3)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter)
    return tower(images)


@pytest.mark.parametrize(
    ("config", "tokens", "channels"),
    [
        (vit(levels=[0, 1, -1]), 4, 12),
        (conv(levels=[0, 1]), 64, 4),
        (conv(levels=[2, 3]), 16, 6),
        (conv(), 16, 6),
    ],
)
def test_levels_have_the_shapes_that_the_config_promises(
    config: ViTConfig | ConvConfig, tokens: int, channels: int
) -> None:
    levels = run(config, pictures(3))
    assert [level.shape for level in levels] == [(3, tokens, channels)] * len(config.levels)
    assert math.prod(config.grid(8)) == tokens
    assert config.channels_out == channels
    assert run(config, pictures(0))[0].shape == (0, tokens, channels)


@pytest.mark.parametrize("make", [vit, conv])
def test_levels_are_numbered_as_hidden_states(make: Callable[..., ViTConfig | ConvConfig]) -> None:
    images = pictures(2)
    last, before = run(make(levels=[3, 2]), images)
    assert torch.equal(last, run(make(levels=[-1]), images)[0])
    assert torch.equal(before, run(make(levels=[-2]), images)[0])
    assert not torch.isclose(last, before).all()


def test_blocks_behind_the_last_level_are_not_made() -> None:
    assert len(build_tower(vit(levels=[-2]), IMAGE, "auto").blocks) == 2
    assert len(build_tower(conv(levels=[1]), IMAGE, "auto").blocks) == 1


@pytest.mark.parametrize(("config", "grid"), [(vit(levels=[0]), 2), (conv(levels=[0]), 8)])
def test_tokens_run_row_by_row(config: ViTConfig | ConvConfig, grid: int) -> None:
    images = pictures(1)
    before = run(config, images)[0]
    images[0, 0, 0, 7] += 1  # the upper right corner
    after = run(config, images)[0]
    changed = (before != after).any(-1)[0].view(grid, grid)
    assert changed[0, -1]
    assert not changed[:, 0].any()
    assert not changed[-1].any()


@pytest.mark.parametrize("config", [vit(), conv()])
def test_images_do_not_meet(config: ViTConfig | ConvConfig) -> None:
    images = pictures(3)
    together = run(config, images)[0]
    assert_conforms(run(config, images[1:2])[0], together[1:2])

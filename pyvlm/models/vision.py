"""Vision towers: images in, a list of levels out, one [N, tokens, channels] each, tokens row by row.

Shapes: N images, C channels, T = h·w tokens.
"""

import math

import torch
from torch import Tensor, nn

from pyvlm.layout import TEXT, AttentionSpans, TokenLayout
from pyvlm.models.pretrained_vision import TransformersTower
from pyvlm.models.tower_config import ConvConfig, ImageConfig, TransformersConfig, ViTConfig
from pyvlm.nn.attention import SpanAttention


class ViTBlock(nn.Module):
    def __init__(self, config: ViTConfig, backend: str) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, int(config.mlp_ratio * config.hidden_size)
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = SpanAttention(hidden, config.num_heads, bias=True, backend=backend)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden))

    def forward(self, x_NTC: Tensor, spans: AttentionSpans) -> Tensor:
        x_NTC = x_NTC + self.attention(self.attention_norm(x_NTC), spans)
        return x_NTC + self.mlp(self.mlp_norm(x_NTC))


class ViTTower(nn.Module):
    """A vision transformer (arXiv 2010.11929) without a class token, and without a last norm."""

    def __init__(self, config: ViTConfig, image: ImageConfig, backend: str) -> None:
        super().__init__()
        self.levels = config.level_indices
        self.patch_embed = nn.Conv2d(
            image.channels, config.hidden_size, config.patch_size, stride=config.patch_size
        )
        self.position = nn.Parameter(torch.empty(math.prod(config.grid(image.size)), config.hidden_size))
        self.position_init_std = config.position_init_std
        # Blocks behind the last level handed on would be computed for nothing.
        self.blocks = nn.ModuleList(ViTBlock(config, backend) for _ in range(max(self.levels)))

    def forward(self, images_NCHW: Tensor) -> list[Tensor]:
        x_NTC = self.patch_embed(images_NCHW).flatten(2).transpose(1, 2) + self.position
        kind_NT = torch.full(x_NTC.shape[:2], TEXT, dtype=torch.uint8, device=x_NTC.device)
        spans = TokenLayout(kind_NT).spans("bidirectional")
        outputs = [x_NTC]
        for block in self.blocks:
            outputs.append(block(outputs[-1], spans))
        return [outputs[level] for level in self.levels]


class ConvBlock(nn.Module):
    """A pre-activation residual block (arXiv 1603.05027); its norm never mixes images."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(1, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        changes_shape = in_channels != out_channels or stride != 1
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, stride, stride=stride) if changes_shape else nn.Identity()
        )

    def forward(self, x_NChw: Tensor) -> Tensor:
        y = self.conv1(nn.functional.gelu(self.norm1(x_NChw)))
        y = self.conv2(nn.functional.gelu(self.norm2(y)))
        return self.shortcut(x_NChw) + y


class ConvTower(nn.Module):
    """A small residual network whose stages after the first halve the map."""

    def __init__(self, config: ConvConfig, image: ImageConfig, backend: str) -> None:
        super().__init__()
        self.levels = config.level_indices
        self.stem = nn.Conv2d(image.channels, config.channels[0], 3, padding=1)
        blocks = []
        channels = config.channels[0]
        for stage, (out_channels, num_blocks) in enumerate(zip(config.channels, config.blocks, strict=True)):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ConvBlock(channels, out_channels, stride))
                channels = out_channels
        # Blocks behind the last level handed on would be computed for nothing.
        self.blocks = nn.ModuleList(blocks[: max(self.levels)])

    def forward(self, images_NCHW: Tensor) -> list[Tensor]:
        outputs = [self.stem(images_NCHW)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return [outputs[level].flatten(2).transpose(1, 2) for level in self.levels]


# One entry a `type` of tower configuration.
TOWERS: dict[str, type[nn.Module]] = {"vit": ViTTower, "conv": ConvTower, "transformers": TransformersTower}


def build_tower(
    config: ViTConfig | ConvConfig | TransformersConfig, image: ImageConfig, backend: str
) -> nn.Module:
    """The tower of a configuration: from images [N, C, H, W] to its levels, [N, T, channels] each."""
    return TOWERS[config.type](config, image, backend)

"""Sizes of resamplers that tests and benchmarks share, each with its reason."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyvlm.nn import Resampler


@dataclass(frozen=True)
class ResampleCase:
    name: str
    reason: str
    images: int
    side: int  # of the map
    grid: int  # of the queries
    embed_dim: int
    heads: int
    channels: int  # of the map, before it is projected
    large: bool = False

    def reduced(self) -> "ResampleCase":
        """The same kind of layer, small enough to run anywhere at once."""
        return replace(self, images=min(self.images, 2), side=7, grid=4, embed_dim=64, heads=4, channels=40)

    def module(self) -> Resampler:
        generator = torch.Generator().manual_seed(1)
        module = Resampler(self.grid, self.embed_dim, self.heads, self.channels)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.dim() == 2:
                    scale = 1.0 if name == "query" else parameter.shape[1] ** -0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return module

    def features(self) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randn(self.images, self.side**2, self.channels, generator=generator)


SMALL_CASES = (
    ResampleCase("same-grid", "positions are taken as they are", 2, 4, 4, 32, 4, 32),
    ResampleCase("finer-map", "positions are resized", 3, 9, 4, 64, 2, 40),
    ResampleCase("one-query", "a grid of one", 1, 3, 1, 8, 1, 5),
)
LARGE_CASES = (
    ResampleCase("qwen-vl", "Qwen-VL's, one image", 1, 32, 16, 4096, 32, 1664, large=True),
    ResampleCase("qwen-vl-b4", "the same, four images", 4, 32, 16, 4096, 32, 1664, large=True),
)
CASES = SMALL_CASES + LARGE_CASES

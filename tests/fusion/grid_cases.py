"""Maps of several encoders that tests and benchmarks share, each set with its reason."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class GridCase:
    name: str
    reason: str
    images: int
    grids: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]
    target: tuple[int, int]
    out_features: int
    mode: str = "bilinear"
    align_corners: bool = False
    large: bool = False

    def reduced(self) -> "GridCase":
        """The same kind of maps, small enough to run anywhere at once."""
        grids = tuple((-(-rows // 4), -(-columns // 4)) for rows, columns in self.grids)
        target = (-(-self.target[0] // 4), -(-self.target[1] // 4))
        return replace(
            self,
            images=min(self.images, 2),
            grids=grids,
            target=target,
            channels=tuple(24 + i for i in range(len(grids))),
            out_features=40,
        )

    def features(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randn(self.images, rows * columns, c, generator=generator).to(dtype)
            for (rows, columns), c in zip(self.grids, self.channels, strict=True)
        ]

    def projection(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias, whose results are of unit variance."""
        generator, channels = torch.Generator().manual_seed(2), sum(self.channels)
        weight = torch.randn(self.out_features, channels, generator=generator) * channels**-0.5
        return weight.to(dtype), torch.randn(self.out_features, generator=generator).to(dtype)


SMALL_CASES = (
    GridCase("one-grid", "nothing is resized", 2, ((8, 8), (8, 8)), (30, 41), (8, 8), 50),
    GridCase("down", "resized, then projected", 2, ((8, 8), (11, 13)), (30, 41), (8, 8), 50),
    GridCase("up", "projected, then resized", 2, ((8, 8), (3, 5)), (30, 41), (8, 8), 40),
    GridCase("up-and-wider", "resized, then projected", 2, ((8, 8), (3, 5)), (30, 41), (8, 8), 50),
    GridCase(
        "all-up",
        "the first that is written is projected at its own size",
        3,
        ((4, 4), (3, 5)),
        (31, 7),
        (9, 8),
        7,
    ),
    GridCase("nearest", "the other modes", 2, ((5, 5), (9, 7), (8, 6)), (9, 10, 11), (8, 6), 17, "nearest"),
    GridCase("area", "the other modes", 2, ((5, 5), (9, 7), (8, 6)), (9, 10, 11), (8, 6), 17, "area"),
    GridCase("corners", "Eagle's form", 1, ((5, 5), (9, 7)), (9, 10), (8, 6), 17, align_corners=True),
    GridCase("one-token", "a grid of one", 2, ((1, 1), (2, 2)), (3, 4), (1, 1), 5),
)
LARGE_CASES = (
    GridCase(
        "prismatic",
        "DINOv2 and SigLIP on one grid",
        4,
        ((27, 27), (27, 27)),
        (1024, 1152),
        (27, 27),
        4096,
        large=True,
    ),
    GridCase(
        "eagle",
        "CLIP, ConvNeXt and SAM",
        2,
        ((24, 24), (32, 32), (16, 16)),
        (1024, 1536, 256),
        (32, 32),
        2048,
        align_corners=True,
        large=True,
    ),
)
CASES = SMALL_CASES + LARGE_CASES

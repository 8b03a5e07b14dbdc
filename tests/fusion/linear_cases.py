"""Sizes of linear layers that tests and benchmarks share, each with its reason."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearCase:
    name: str
    reason: str
    tokens: int
    in_features: int
    out_features: int
    large: bool = False

    def reduced(self) -> "LinearCase":
        """The same, small enough to run anywhere at once, and large enough for the native product."""
        return replace(self, tokens=160, in_features=96, out_features=136)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight and bias, whose results are of unit variance."""
        generator = torch.Generator().manual_seed(2)

        def normal(*shape: int, fan_in: int = 1) -> Tensor:
            return (torch.randn(shape, generator=generator) * fan_in**-0.5).to(dtype)

        x = normal(self.tokens, self.in_features)
        return (
            x,
            normal(self.out_features, self.in_features, fan_in=self.in_features),
            normal(self.out_features),
        )


# The native product's own sizes: 32 rows and 64 columns a tile, 4 tiles of columns at once, 512 rows a chunk,
# 128 of the depth a step, and at least 2^20 multiply-adds.
SMALL_CASES = (
    LinearCase("a-few-tiles", "whole tiles only", 128, 128, 128),
    LinearCase("fewest-rows", "the fewest rows that are packed", 32, 257, 131),
    LinearCase("fewer-rows", "torch's own product", 31, 257, 131),
    LinearCase("several-chunks", "of rows, and a last one that is not full", 1061, 40, 72),
    LinearCase("several-steps", "of the depth, and a last one of one", 40, 769, 90),
    LinearCase("more-depth-than-stays", "in a cache", 70, 2100, 66),
    LinearCase("odd-rows", "no row begins on a word", 301, 67, 83),
    LinearCase("one-feature-out", "a single column", 4099, 257, 1),
    LinearCase("one-feature-in", "a depth of one", 1031, 1, 1033),
)
LARGE_CASES = (
    LinearCase("connector", "four images of a 24 x 24 grid, CLIP-L's width", 2304, 1024, 1024, large=True),
    LinearCase("mlp-up", "the first layer of an MLP of 2,048", 2048, 2048, 8192, large=True),
    LinearCase("kv-proj", "one image into Qwen-VL's resampler", 1024, 1664, 4096, large=True),
)
CASES = SMALL_CASES + LARGE_CASES

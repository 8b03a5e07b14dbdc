"""Sizes of RMSNorms that tests and benchmarks share, each with its reason."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class NormCase:
    name: str
    reason: str
    tokens: int
    channels: int
    heads: int = 0  # a norm of each head's channels
    unit_offset: bool = False
    large: bool = False

    def reduced(self) -> "NormCase":
        """The same, small enough to run anywhere at once."""
        return replace(self, tokens=37, channels=min(self.channels, 130), heads=min(self.heads, 3))

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x, with the heads before the tokens as models have them, and the weight."""
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(self.tokens, max(self.heads, 1), self.channels, generator=generator).to(dtype)
        weight = torch.randn(self.channels, generator=generator) / 10 + (not self.unit_offset)
        return (x.transpose(0, 1) if self.heads else x[:, 0]), weight.to(dtype)


SMALL_CASES = (
    NormCase("one-number", "a single element", 1, 1),
    NormCase("odd", "no row ends with a vector", 29, 83),
    NormCase("odd-heads", "the same, rows in another order", 7, 37, heads=3, unit_offset=True),
)
LARGE_CASES = (
    NormCase("qwen2-0.5b", "4 images of 576 tokens and text, Qwen2 0.5B", 2432, 896, large=True),
    NormCase("gemma3-1b", "the same, Gemma 3 1B", 2432, 1152, unit_offset=True, large=True),
    NormCase("gemma3-queries", "its queries", 2432, 256, heads=4, unit_offset=True, large=True),
)
CASES = SMALL_CASES + LARGE_CASES

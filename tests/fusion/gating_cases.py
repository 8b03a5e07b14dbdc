"""Sizes of gated activations that tests and benchmarks share, each with its reason."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class GatingCase:
    name: str
    reason: str
    tokens: int
    channels: int
    activation: str
    large: bool = False
    gated: bool = True

    def reduced(self) -> "GatingCase":
        """The same, small enough to run anywhere at once."""
        return replace(self, tokens=37, channels=130)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """gate and, where it is gated, up."""
        generator = torch.Generator().manual_seed(2)
        shape = (self.tokens, self.channels)
        return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(1 + self.gated))


SMALL_CASES = (
    GatingCase("one-number", "a single element", 1, 1, "silu"),
    GatingCase("odd", "no row ends with a vector", 29, 83, "gelu"),
)
LARGE_CASES = (
    GatingCase("qwen2-0.5b", "4 images of 576 tokens and text, Qwen2 0.5B", 2432, 4864, "silu", large=True),
    GatingCase("clip-l", "4 images, no gate", 2304, 4096, "quick_gelu", large=True, gated=False),
    GatingCase("gemma3-1b", "the same, Gemma 3 1B", 2432, 6912, "gelu_tanh", large=True),
)
CASES = SMALL_CASES + LARGE_CASES

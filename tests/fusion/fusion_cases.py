"""Sizes of merged levels that tests and benchmarks share, each with its reason."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergeCase:
    name: str
    reason: str
    levels: int
    images: int
    tokens: int
    channels: int
    features: int
    per_level: str = ""  # "w", "b", "g", "n": weight, bias, γ and β that are one a level
    views: bool = False  # of maps with a CLS token, which is cut off
    large: bool = False

    def reduced(self) -> "MergeCase":
        """The same kind of merge, small enough to run anywhere at once."""
        return replace(self, levels=min(self.levels, 3), images=2, tokens=20, channels=48, features=40)

    def inputs(self, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Levels whose means and sizes differ, and the parameters by their names."""
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * std + mean).to(dtype)

        def parameter(letter: str, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
            each = (self.levels,) if letter in self.per_level else ()
            return normal(*each, *shape, mean=mean, std=std)

        cls = int(self.views)
        levels = [
            normal(self.images, cls + self.tokens, self.channels, mean=0.1 * i, std=1 + 0.1 * i)[:, cls:]
            for i in range(self.levels)
        ]
        return levels, {
            "alpha": normal(self.levels, mean=1 / self.levels, std=0.5 / self.levels),
            "weight": parameter("w", self.features, self.channels, std=self.channels**-0.5),
            "bias": parameter("b", self.features),
            "ln_weight": parameter("g", self.channels, mean=1.0, std=0.2),
            "ln_bias": parameter("n", self.channels, std=0.2),
        }


# The native kernels' own sizes: 8 rows of a level at a time, 32 tokens and 64 features a tile, 64 tokens a
# block, 512 tokens a chunk, 256 features a round of panels, 128 channels or more a step.
SMALL_CASES = (
    MergeCase("one-number", "one of everything", 1, 1, 1, 1, 1),
    MergeCase("one-channel", "the norm is 0", 2, 1, 9, 1, 3, "wbgn"),
    MergeCase("primes", "no row is whole vectors", 3, 2, 37, 67, 41),
    MergeCase("primes-per-level", "the same, each level with a weight of its own", 3, 2, 37, 67, 41, "wbgn"),
    MergeCase("norms-per-level", "one weight after several norms", 4, 1, 70, 96, 130, "gn"),
    MergeCase("weights-per-level", "several weights after one norm", 2, 3, 50, 130, 70, "w"),
    MergeCase("mixed", "a bias and a norm for each level", 3, 1, 40, 33, 35, "bg"),
    MergeCase("views", "CLS cut off", 3, 2, 33, 64, 64, views=True),
    MergeCase("views-per-level", "CLS cut off", 3, 2, 33, 64, 64, "wbgn", views=True),
    MergeCase("several-chunks", "and rounds of panels", 2, 1, 601, 40, 300),
    MergeCase("several-chunks-per-level", "the same", 2, 1, 601, 40, 300, "w"),
    MergeCase("several-steps", "channels to sum over", 2, 1, 40, 600, 24),
    MergeCase("clip-l", "as many levels as CLIP-L has", 24, 1, 10, 32, 16),
    MergeCase("no-image", "nothing to do", 2, 0, 4, 3, 2),
    MergeCase("no-token", "nothing to do", 2, 2, 0, 3, 2, "w"),
)
LARGE_CASES = (
    MergeCase("comm-clip-l", "COMM's levels of CLIP-L at 336 pixels", 24, 4, 576, 1024, 1024, large=True),
    MergeCase(
        "comm-clip-l-per-level",
        "the same, each with its projection",
        24,
        4,
        576,
        1024,
        1024,
        "wbgn",
        large=True,
    ),
)
CASES = SMALL_CASES + LARGE_CASES

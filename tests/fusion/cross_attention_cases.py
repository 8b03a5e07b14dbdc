"""Sizes of attention to windows that tests and benchmarks share, each with its reason."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LocalCase:
    name: str
    reason: str
    images: int
    heads: int
    dim: int
    grid: tuple[int, int]
    sides: tuple[int, ...]  # of a query's window, a map each
    masked: bool = False
    large: bool = False

    @property
    def queries(self) -> int:
        return math.prod(self.grid)

    @property
    def window(self) -> int:
        """Keys of a query, over all maps."""
        return sum(side**2 for side in self.sides)

    def reduced(self) -> "LocalCase":
        """The same kind of problem, small enough to run anywhere at once."""
        return replace(self, images=2, heads=min(self.heads, 3), grid=(5, 4))

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Query, keys and values [N, A, tokens, D] that lie as [N, tokens, A, D], as from projections."""
        generator = torch.Generator().manual_seed(1)

        def heads_of(tokens: int) -> Tensor:
            shape = (self.images, tokens, self.heads, self.dim)
            return torch.randn(shape, generator=generator).to(dtype).transpose(1, 2)

        sizes = [self.queries * side**2 for side in self.sides]
        return heads_of(self.queries), [heads_of(t) for t in sizes], [heads_of(t) for t in sizes]

    def masks(self) -> list[Tensor] | None:
        """As of letterboxed images: of most of them the upper part of every map is hidden."""
        if not self.masked:
            return None
        rows, columns = self.grid
        masks = []
        for side in self.sides:
            row = torch.arange(rows * side)[None, :, None]
            hidden = (torch.arange(self.images) % 4)[:, None, None] * (rows * side) // 8
            mask = (row >= hidden).expand(-1, -1, columns * side)
            masks.append(mask.flatten(1).contiguous())
        return masks


SMALL_CASES = (
    LocalCase("one-query", "a grid of one", 2, 3, 16, (1, 1), (2, 1)),
    LocalCase("one-key", "the softmax of one score is 1", 2, 3, 16, (3, 2), (1,)),
    LocalCase("one-head", "several keys fill a vector of scores", 2, 1, 64, (3, 5), (1, 3)),
    LocalCase("more-heads-than-lanes", "the last vector is part full", 1, 19, 32, (2, 3), (2, 1)),
    LocalCase("prime", "no row begins on a word", 3, 5, 37, (3, 5), (1, 2, 3)),
    LocalCase("one-feature", "less than a vector", 2, 2, 1, (2, 2), (2,)),
    LocalCase("no-images", "an empty batch", 0, 4, 16, (2, 2), (1, 2)),
    LocalCase("more-queries-than-a-task", "and a rest of one", 1, 16, 64, (1, 17), (1, 1, 1, 4)),
    LocalCase("long-windows", "more keys than a tile has", 1, 2, 24, (2, 1), (8, 9)),
    LocalCase(
        "masked", "whole windows and parts of others are hidden", 4, 3, 40, (6, 3), (1, 3, 2), masked=True
    ),
)
LARGE_CASES = (
    LocalCase("cambrian", "Cambrian-1's four encoders", 4, 16, 64, (24, 24), (1, 1, 1, 4), large=True),
    LocalCase("cambrian-letterbox", "the same", 4, 16, 64, (24, 24), (1, 1, 1, 4), masked=True, large=True),
    LocalCase("fine-maps", "every map is finer", 2, 16, 64, (12, 12), (2, 4, 8), large=True),
)
CASES = SMALL_CASES + LARGE_CASES

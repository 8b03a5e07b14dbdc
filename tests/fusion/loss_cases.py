"""Sizes of language-model heads that tests and benchmarks share, each with its reason."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossCase:
    name: str
    reason: str
    tokens: int
    labeled: int  # tokens that have a label
    hidden: int
    words: int
    large: bool = False

    def reduced(self) -> "LossCase":
        """The same share of labels, small enough to run anywhere at once."""
        tokens = min(self.tokens, 64)
        return replace(
            self, tokens=tokens, labeled=tokens * self.labeled // self.tokens, hidden=48, words=700
        )

    def labels(self) -> Tensor:
        """int64 [tokens]: words, and -100 for the others."""
        generator = torch.Generator().manual_seed(1)
        labels = torch.full((self.tokens,), -100)
        labeled = torch.randperm(self.tokens, generator=generator)[: self.labeled]
        labels[labeled] = torch.randint(0, self.words, (self.labeled,), generator=generator)
        return labels

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weight and bias; logits are of unit variance."""
        generator = torch.Generator().manual_seed(2)
        hidden = torch.randn(self.tokens, self.hidden, generator=generator)
        weight = torch.randn(self.words, self.hidden, generator=generator) * max(self.hidden, 1) ** -0.5
        bias = torch.randn(self.words, generator=generator)
        return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


# The native kernels' own sizes: 32 rows and 64 words a tile, 512 rows a chunk, 256 words at once, and blocks
# of 1,024 (many rows) to 16,384 words (few).
SMALL_CASES = (
    LossCase("less-than-a-tile", "padding in every direction", 9, 5, 8, 11),
    LossCase("more-than-a-tile", "of rows, words and features", 70, 45, 300, 330),
    LossCase("odd-rows", "no row begins on a word", 50, 33, 67, 131),
    LossCase("several-chunks", "of rows", 700, 600, 24, 300),
    LossCase("several-blocks", "of words", 40, 33, 10, 16_500),
    LossCase("chunks-and-blocks", "of rows and words", 4200, 4100, 8, 1100),
    LossCase("one-row", "has a label", 7, 1, 40, 90),
    LossCase("one-word", "is the whole vocabulary", 7, 5, 16, 1),
    LossCase("one-feature", "an outer product", 40, 35, 1, 70),
    LossCase("no-feature", "the logits are the bias", 5, 3, 0, 70),
    LossCase("no-label", "nothing to do", 6, 0, 16, 20),
    LossCase("no-token", "not even a row", 0, 0, 16, 20),
)
LARGE_CASES = (
    LossCase("answers", "Qwen2-0.5B's head, as in most of a VLM's data", 800, 120, 896, 151_936, large=True),
    LossCase("all-labeled", "the same as in pretraining on text", 800, 800, 896, 151_936, large=True),
)
CASES = SMALL_CASES + LARGE_CASES

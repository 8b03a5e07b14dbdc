"""Image tokens to place that tests and benchmarks share, each with its reason."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyvlm.ops import add_at_image_tokens, anyres_grid, anyres_index, pack_image_tokens, place_image_tokens

PINPOINTS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]  # LLaVA-NeXT's
TILE = 336


@dataclass(frozen=True)
class PlacementCase:
    """A batch of samples, each of some text with one image in its middle."""

    name: str
    reason: str
    op: str  # place, pack (tiled images alone) or add
    samples: int
    text_tokens: int
    width: int
    side: int  # of a map of image tokens
    image_size: tuple[int, int] | None = None  # of an image in tiles, else there is one map
    large: bool = False

    def reduced(self) -> "PlacementCase":
        """The same kind of batch, small enough to run anywhere at once."""
        return replace(self, text_tokens=min(self.text_tokens, 20), width=48, side=4)

    @property
    def num_maps(self) -> int:
        """Maps of one image, its base view among them."""
        if self.image_size is None:
            return 1
        rows, columns = anyres_grid(self.image_size, PINPOINTS, TILE)
        return 1 + rows * columns

    def index(self) -> Tensor | None:
        """The index map of tiled images, None where there is one map."""
        if self.image_size is None:
            return None
        return anyres_index([self.image_size] * self.samples, PINPOINTS, TILE, self.side)[0]

    def image_mask(self) -> Tensor:
        index = self.index()
        image_tokens = self.side**2 if index is None else len(index) // self.samples
        before = self.text_tokens // 2
        mask = torch.zeros(self.samples, self.text_tokens + image_tokens, dtype=torch.bool)
        mask[:, before : before + image_tokens] = True
        return mask

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The differentiable arguments of `run`: text, but for pack; image rows; a newline where tiled."""
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        text = () if self.op == "pack" else (normal(*self.image_mask().shape, self.width),)
        newline = () if self.image_size is None else (normal(self.width),)
        return (*text, normal(self.samples * self.num_maps * self.side**2, self.width), *newline)

    def run(
        self, inputs: tuple[Tensor, ...], image_mask: Tensor, index: Tensor | None, backend: str
    ) -> Tensor:
        """The op on inputs as `inputs` makes them."""
        if self.op == "pack":
            features, newline = inputs
            return pack_image_tokens(features, index, newline, backend=backend)
        if self.op == "add":
            return add_at_image_tokens(*inputs, image_mask, backend=backend)
        text, features, *newline = inputs
        return place_image_tokens(text, features, image_mask, index, *newline, backend=backend)


# Copies are shared out in blocks of 128 KB, and sums in vectors of 64 bytes.
SMALL_CASES = (
    PlacementCase("one-map", "rows of odd length", "place", 3, 7, 33, 4),
    PlacementCase("long-rows", "a block is less than a row", "place", 2, 3, 40_000, 2),
    PlacementCase("many-blocks", "of short rows", "place", 3, 5000, 24, 9),
    PlacementCase("tiles", "packed on the way", "place", 2, 5, 40, 6, (500, 700)),
    PlacementCase("packed-tiles", "more newlines than one sum on a GPU", "pack", 3, 0, 67, 12, (900, 333)),
    PlacementCase("added", "rows of odd length", "add", 2, 9, 35, 5),
    PlacementCase("one-feature", "rows of one number", "add", 2, 3, 1, 2),
)
LARGE_CASES = (
    PlacementCase("merge", "an image of 576 tokens a sample", "place", 4, 448, 2048, 24, large=True),
    PlacementCase(
        "pack-tiles", "LLaVA-NeXT 7B, a base view and 4 tiles", "pack", 1, 0, 4096, 24, (480, 640), large=True
    ),
    PlacementCase("merge-tiles", "packed on the way", "place", 1, 448, 4096, 24, (480, 640), large=True),
    PlacementCase("deepstack", "visual features into a decoder layer", "add", 4, 448, 2048, 24, large=True),
)
CASES = SMALL_CASES + LARGE_CASES

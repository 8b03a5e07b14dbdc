"""Images of any size as tokens: a base view and tiles, packed into one sequence with a learned newline.

Shapes: M maps (base views and tiles) of all images · T tokens of a map, row-major · C features of a token ·
S tokens of all packed images · B samples · L tokens of a sample.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyvlm.ops.placement import pack_image_tokens, place_image_tokens
from pyvlm.ops.tiling import anyres_grid, anyres_index, anyres_tokens

ImageSize = tuple[int, int]


class AnyResPacker(nn.Module):
    """Packs the tokens of tiled images as LLaVA-NeXT does, or places them into the text embeddings.

    An image is its base view and then its tiles, which become one map: without the rows or columns that show
    nothing but padding, and with the newline behind each row. All of it is one gather, which makes no map.
    Sources: "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge" (llava-vl.github.io, 2024), whose
    `mm_patch_merge_type` "spatial_unpad" this is; transformers `LlavaNextModel.pack_image_features`.

    Args:
        width: C.
        pinpoints: canvas sizes (height, width) in pixels to choose from, multiples of `tile_size`.
        tile_size: side of a view or tile in pixels.
        tile_tokens: side of its map in tokens, so that T = tile_tokens².
        unpad, newline: see above; both True in LLaVA-NeXT.

    Attributes:
        newline: learned [C], or None without newlines.
    """

    def __init__(
        self,
        width: int,
        pinpoints: Sequence[ImageSize],
        tile_size: int,
        tile_tokens: int,
        *,
        unpad: bool = True,
        newline: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        anyres_grid((1, 1), pinpoints, tile_size)  # refuses canvas sizes that do not fit
        self.width, self.tile_size, self.tile_tokens = width, tile_size, tile_tokens
        self.pinpoints = [(height, across) for height, across in pinpoints]
        self.unpad, self.backend = unpad, backend
        self.newline = nn.Parameter(torch.randn(width) / math.sqrt(width)) if newline else None

    def num_maps(self, image_size: ImageSize) -> int:
        """Maps that an image of (height, width) pixels takes: its base view and its tiles."""
        return 1 + math.prod(anyres_grid(image_size, self.pinpoints, self.tile_size))

    def num_tokens(self, image_size: ImageSize) -> int:
        """Tokens, and so placeholders, of an image of (height, width) pixels."""
        return anyres_tokens(
            image_size, self.pinpoints, self.tile_size, self.tile_tokens, self.newline is not None, self.unpad
        )

    def forward(
        self, features: Tensor, image_sizes: Sequence[ImageSize], num_maps: Sequence[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        """The packed tokens [S, C] of all images, one after another, and how many each image has.

        Args:
            features: [M, T, C], image by image its base view and its tiles row-major.
            image_sizes: (height, width) in pixels of each original image.
            num_maps: maps of each image where some come without tiles: 1, or all of them.

        Raises:
            ValueError: a wrong shape, or another number of maps than the images have.
        """
        rows, index, lengths = self._rows_and_index(features, image_sizes, num_maps)
        return pack_image_tokens(rows, index, self.newline, self.backend), lengths

    def place(
        self,
        text_embeds: Tensor,
        features: Tensor,
        image_mask: Tensor,
        image_sizes: Sequence[ImageSize],
        num_maps: Sequence[int] | None = None,
    ) -> Tensor:
        """The text embeddings with the packed tokens at the placeholders, [B, L, C], in one gather.

        Args:
            text_embeds: [B, L, C].
            image_mask: bool [B, L], True at the placeholders.
            features, image_sizes, num_maps: as in `forward`, the images in reading order.

        Raises:
            ValueError: as in `forward`; placeholders and packed tokens differ in number (see
                `pyvlm.ops.place_image_tokens`).
        """
        rows, index, _ = self._rows_and_index(features, image_sizes, num_maps)
        return place_image_tokens(text_embeds, rows, image_mask, index, self.newline, backend=self.backend)

    def _rows_and_index(
        self, features: Tensor, image_sizes: Sequence[ImageSize], num_maps: Sequence[int] | None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Feature rows [M·T, C], the index map on their device, and the number of tokens of each image."""
        expected = sum(map(self.num_maps, image_sizes)) if num_maps is None else sum(num_maps)
        if features.shape != (expected, self.tile_tokens**2, self.width):
            raise ValueError(
                f"features must be [{expected}, {self.tile_tokens**2}, {self.width}], the maps of "
                f"{len(image_sizes)} images of sizes {list(image_sizes)}, got {list(features.shape)}"
            )
        index, lengths = anyres_index(
            image_sizes,
            self.pinpoints,
            self.tile_size,
            self.tile_tokens,
            self.newline is not None,
            num_maps,
            self.unpad,
        )
        return features.flatten(0, 1), index.to(features.device, non_blocking=True), lengths

    def extra_repr(self) -> str:
        return (
            f"width={self.width}, pinpoints={self.pinpoints}, tile_size={self.tile_size}, "
            f"tile_tokens={self.tile_tokens}, unpad={self.unpad}, newline={self.newline is not None}"
        )

"""Images of any size: how one is cut into a base view and tiles, and which of a batch's tokens it takes.

Sizes and canvases are (height, width) in pixels. `pyvlm.nn.AnyResPacker` makes the tokens of the tiles one
sequence, and `pyvlm.ops.tiling` has the arithmetic.

Shapes: B samples, L tokens, N images in reading order, M maps (base views and tiles) of all images.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pyvlm.models.encoders import Pair
from pyvlm.models.images import RESAMPLING, to_picture
from pyvlm.models.tower_config import Config, ImageConfig, Size
from pyvlm.nn.anyres import AnyResPacker
from pyvlm.ops.tiling import anyres_grid, anyres_tokens

if TYPE_CHECKING:
    from pyvlm.models.config import VLMConfig


class TilingConfig(Config):
    """Images as a base view and the tiles of the best of several canvases: LLaVA 1.6.

    Attributes:
        strategy: "anyres", LLaVA's, is the only one.
        grid_pinpoints: the canvases to choose from, each a multiple of the model's image size.
        unpad: leave out the rows or columns of tokens that show nothing but padding.
        newline: a learned token behind each row of the tiles.
        resample: how Pillow resizes; transformers takes "bicubic".
    """

    strategy: Literal["anyres"] = "anyres"
    grid_pinpoints: Annotated[list[tuple[Size, Size]], Field(min_length=1)]
    unpad: bool = True
    newline: bool = True
    resample: Literal["bicubic", "bilinear"] = "bicubic"

    def num_maps(self, image_size: Pair, tile_size: int) -> int:
        """Maps of one image: its base view and its tiles, each of tile_size × tile_size pixels."""
        return 1 + math.prod(anyres_grid(image_size, self.grid_pinpoints, tile_size))

    def num_tokens(self, image_size: Pair, tile_size: int, tokens_per_map: int) -> int:
        """Tokens of one image, and so its placeholders."""
        side = math.isqrt(tokens_per_map)
        return anyres_tokens(
            image_size, self.grid_pinpoints, tile_size, side, newline=self.newline, unpad=self.unpad
        )

    def check(self, tile_size: int, tokens_per_map: int) -> None:
        """Raises ValueError where canvases are no whole tiles, or the tokens of a tile are no square."""
        if bad := [canvas for canvas in self.grid_pinpoints if any(side % tile_size for side in canvas)]:
            raise ValueError(
                f"tiling.grid_pinpoints {bad} are no multiples of the image size {tile_size}, a tile's"
            )
        if math.isqrt(tokens_per_map) ** 2 != tokens_per_map:
            raise ValueError(f"tiling needs a square of tokens a tile, and an image has {tokens_per_map}")


def cut_image(image: Any, tiling: TilingConfig, config: ImageConfig) -> Tensor:
    """The base view and the tiles of one image, row by row: float32 [maps, C, size, size] in [0, 1].

    The base view is the whole image, stretched to a square. For the tiles it is resized to fit the best
    canvas and set in its middle, with black around. Pillow resizes, in 8 bits. Source: transformers
    `LlavaNextImageProcessor`, to whose pixels these are equal.

    Args:
        image: what `pyvlm.models.images.to_picture` takes.

    Raises:
        TypeError, ValueError: as `to_picture`.
    """
    picture, tile = to_picture(image, config.channels), config.size
    rows, columns = anyres_grid((picture.height, picture.width), tiling.grid_pinpoints, tile)
    canvas = rows * tile, columns * tile
    height, width = fitted_size((picture.height, picture.width), canvas)
    filter_ = RESAMPLING[tiling.resample]
    base = np.asarray(picture.resize((tile, tile), filter_)).reshape(tile, tile, config.channels)
    fitted = np.asarray(picture.resize((width, height), filter_)).reshape(height, width, config.channels)
    tiled = np.zeros((*canvas, config.channels), np.uint8)
    top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
    tiled[top : top + height, left : left + width] = fitted
    tiles = tiled.reshape(rows, tile, columns, tile, -1).swapaxes(1, 2).reshape(-1, *base.shape)
    maps_MHWC = torch.from_numpy(np.concatenate([base[None], tiles]))
    return maps_MHWC.permute(0, 3, 1, 2).float() / 255


def fitted_size(image_size: Pair, canvas: Pair) -> Pair:
    """The size of an image that is resized to fill a canvas one way, and not to leave it the other way.

    Source: transformers `get_patch_output_size`, which rounds up.
    """
    scale_y, scale_x = canvas[0] / image_size[0], canvas[1] / image_size[1]
    if scale_x < scale_y:
        return min(math.ceil(image_size[0] * scale_x), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(image_size[1] * scale_y), canvas[1])


def build_packer(config: "VLMConfig") -> AnyResPacker | None:
    """The module that packs the tokens of tiles, or None for a model without tiling."""
    if config.tiling is None:
        return None
    return AnyResPacker(
        config.language.hidden_size,
        config.tiling.grid_pinpoints,
        config.image.size,
        math.isqrt(config.tokens_per_image),
        unpad=config.tiling.unpad,
        newline=config.tiling.newline,
        backend=config.backend,
    )


def host_sizes(image_sizes: Tensor | None) -> list[Pair]:
    """Sizes [N, 2] as numbers; reading them off another device waits for it, so leave them on the CPU."""
    return [] if image_sizes is None else [(height, width) for height, width in image_sizes.tolist()]


def check_sizes(config: "VLMConfig", images: Tensor | None, image_sizes: Tensor | None) -> None:
    """Raises ValueError where sizes [N, 2] do not fit the model or images [M, C, H, W]."""
    count = 0 if images is None else len(images)
    if config.tiling is None:
        if image_sizes is not None:
            raise ValueError("image_sizes were given, but the model has no tiling: every image is one map")
        return
    if image_sizes is None:
        if count:
            raise ValueError(
                "a model with tiling needs image_sizes, the (height, width) of each image before it was cut: "
                "give what Processor.collate gives"
            )
        return
    if image_sizes.dim() != 2 or image_sizes.shape[1] != 2 or image_sizes.is_floating_point():
        raise ValueError(
            f"image_sizes must be integer [images, 2], got {image_sizes.dtype} {list(image_sizes.shape)}"
        )
    sizes = host_sizes(image_sizes)
    maps = sum(config.tiling.num_maps(size, config.image.size) for size in sizes)
    if maps != count:
        raise ValueError(
            f"{len(sizes)} images of sizes {sizes} have {maps} base views and tiles, but images has {count}"
        )


def image_lengths(config: "VLMConfig", sizes: Sequence[Pair]) -> list[int]:
    """Tokens of each image of a model with tiling."""
    assert config.tiling is not None, "without tiling every image has tokens_per_image"
    return [config.tiling.num_tokens(size, config.image.size, config.tokens_per_image) for size in sizes]


def number_images(is_image: Tensor, lengths: Sequence[int]) -> Tensor:
    """The image of each placeholder, counted from 0 in each row, int32 [B, L], and −1 elsewhere.

    Args:
        is_image: bool [B, L].
        lengths: placeholders of each image in reading order.
    """
    number_S = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    if not len(number_S):
        return torch.full_like(is_image, -1, dtype=torch.int32)
    place = (is_image.flatten().cumsum(0) - 1).clamp(0, len(number_S) - 1)
    number = number_S.to(is_image.device, non_blocking=True)[place].view_as(is_image)
    first = number.masked_fill(~is_image, len(lengths)).amin(1, keepdim=True)
    return torch.where(is_image, number - first, -1).int()


def check_lengths(placeholders: Sequence[int], sizes: Sequence[Pair], lengths: Sequence[int]) -> None:
    """Raises ValueError unless the placeholders of each sample are whole images, and all images are used.

    Args:
        placeholders: how many each sample has.
        sizes, lengths: of each image in reading order.
    """
    image = 0
    for sample, count in enumerate(placeholders):
        first, features = image, 0
        while features < count and image < len(lengths):
            features += lengths[image]
            image += 1
        if features != count:
            own = "; ".join(f"image {i}, {sizes[i]}: {lengths[i]}" for i in range(first, image))
            raise ValueError(
                f"sample {sample} has {count} image placeholders, but its images have {features} features "
                f"({own or 'none is left'}): expand every image to the placeholders of its size"
            )
    if image < len(lengths):
        raise ValueError(
            f"input_ids has placeholders for {image} images, but {len(lengths)} images were given"
        )

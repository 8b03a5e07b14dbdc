"""From image files and arrays to the pixels that a model takes, with every defect told at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from pyvlm.models.tower_config import ImageConfig

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Decoded, 64 megapixels take 192 MB; a file of some kilobytes can claim far more (a decompression bomb).
MAX_PIXELS = 64_000_000


def load_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads and decodes an image file, turned upright where its EXIF data says so.

    Raises:
        ValueError: the file is missing, no image, damaged, truncated, or claims more than `max_pixels`; the
            message names it.
    """
    with _reading(path):
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise Image.DecompressionBombError(
                    f"it claims {width} by {height} pixels, and at most {max_pixels:,} are decoded: shrink it"
                )
            image.verify()
        with Image.open(path) as image:  # verify() leaves an image unusable and does not decode it
            image.load()
            return ImageOps.exif_transpose(image)


def image_size(image: Any) -> tuple[int, int]:
    """(height, width) of an image as `read_pixels` gives it; of a file, only the head is read where it tells.

    Raises:
        TypeError, ValueError: not an image, or a file that is missing or damaged.
    """
    if isinstance(image, (str, os.PathLike)):
        with _reading(image), Image.open(image) as picture:
            width, height = picture.size
            turned = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by a quarter
            if turned and picture.format != "TIFF":  # Pillow turns a TIFF by itself, its size from the start
                width, height = height, width
            return height, width
    if isinstance(image, Image.Image):
        return image.height, image.width
    if not isinstance(image, (np.ndarray, Tensor)):
        raise _not_an_image(image)
    if len(image.shape) not in (2, 3):
        raise _wrong_shape(image)
    return image.shape[0], image.shape[1]


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes one ValueError, with the file's name, of all that goes wrong while it is read."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"image {path!r}: there is no such file")
    try:
        yield
    except Image.UnidentifiedImageError:
        raise ValueError(f"image {path!r}: not an image, or of a format that Pillow cannot read") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {path!r}: {error}") from None
    except (
        Exception
    ) as error:  # what a decoder raises on a damaged file is anything from struct.error to KeyError
        raise ValueError(f"image {path!r}: damaged or truncated ({error})") from error


def fit_image(image: Any, config: ImageConfig) -> Tensor:
    """The pixels of one image as all towers take them but for the normalisation: float32 [C, size, size].

    With `config.resample` they are those of transformers' image processors (with Pillow): "stretch" is
    SigLIP's way, "crop" CLIP's, "pad" LLaVA's own.

    Args:
        image: as in `read_pixels`.

    Raises:
        TypeError, ValueError: as in `read_pixels`.
    """
    if config.resample is not None:
        picture = _fit_picture(to_picture(image, config.channels), config, RESAMPLING[config.resample])
        return read_pixels(picture, config.channels)
    if config.fit == "crop":
        image = _middle(read_pixels(image, config.channels)).permute(1, 2, 0)
    return to_pixels(image, config.channels, config.size, config.mean if config.fit == "pad" else None)


def _middle(pixels_CHW: Tensor) -> Tensor:
    """The square in the middle."""
    height, width = pixels_CHW.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels_CHW[:, top : top + side, left : left + side]


def _fit_picture(picture: Image.Image, config: ImageConfig, resampling: Image.Resampling) -> Image.Image:
    """A picture as a square of `config.size`, by the arithmetic of transformers' image processors."""
    size, (width, height) = config.size, picture.size
    if config.fit == "crop":  # resized first, its longer side rounded down
        shorter = min(width, height)
        width, height = size * width // shorter, size * height // shorter
        left, top = (width - size) // 2, (height - size) // 2
        return picture.resize((width, height), resampling).crop((left, top, left + size, top + size))
    if config.fit == "pad" and width != height:
        side = max(width, height)
        means = config.mean if len(config.mean) == config.channels else config.mean * config.channels
        ground = tuple(int(255 * mean) for mean in means)
        square = Image.new(picture.mode, (side, side), ground if config.channels == 3 else ground[0])
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture = square
    return picture.resize((size, size), resampling)


def to_pixels(image: Any, channels: int, size: int, padding: tuple[float, ...] | None = None) -> Tensor:
    """The pixels of one image, float32 [channels, size, size] in [0, 1].

    Args:
        image, channels: as in `read_pixels`.
        size: side of the square that the image is stretched or shrunk to (bilinear, antialiased).
        padding: one number, or one a channel: the image is first padded to a square with it, half on either
            side (LLaVA 1.5's `expand2square`), and keeps its proportions.

    Raises:
        TypeError, ValueError: as in `read_pixels`.
    """
    pixels_CHW = read_pixels(image, channels)
    if padding is not None:
        pixels_CHW = _pad_to_square(pixels_CHW, padding)
    if pixels_CHW.shape[1:] != (size, size):
        pixels_CHW = torch.nn.functional.interpolate(
            pixels_CHW[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False
        )[0]
    return pixels_CHW.contiguous()


def to_picture(image: Any, channels: int) -> Image.Image:
    """One image in Pillow's form of 8 bits, mode "L" or "RGB"; arguments and errors as in `read_pixels`."""
    if isinstance(image, (str, os.PathLike)):
        image = load_image(image)
    if isinstance(image, Image.Image) and not image.mode.startswith(("I", "F")):
        return image.convert("L" if channels == 1 else "RGB")
    levels_HWC = (read_pixels(image, channels) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(levels_HWC[..., 0] if channels == 1 else levels_HWC)


def read_pixels(image: Any, channels: int) -> Tensor:
    """The pixels of one image in its own size, float32 [channels, H, W] in [0, 1].

    Args:
        image: a path, a PIL image, or an array or tensor [H, W(, 1 or 3)], uint8 or floating in [0, 1].
        channels: 1 (grey) or 3 (RGB); the image is converted.

    Raises:
        TypeError: not an image.
        ValueError: an unreadable file, a wrong shape, NaN, or values outside [0, 1].
    """
    if isinstance(image, (str, os.PathLike)):
        image = load_image(image)
    if isinstance(image, Image.Image):
        image = _to_array(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(
            np.array(image, order="C")
        )  # a copy: torch takes no read-only or flipped array
    if not isinstance(image, Tensor):
        raise _not_an_image(image)
    pixels_HWC = image[..., None] if image.dim() == 2 else image
    if pixels_HWC.dim() != 3 or pixels_HWC.shape[2] not in (1, 3) or 0 in pixels_HWC.shape:
        raise _wrong_shape(image)
    if image.dtype == torch.uint8:
        pixels_HWC = pixels_HWC.float() / 255
    elif not image.is_floating_point():
        raise ValueError(f"an image must be uint8 or floating in [0, 1], got {image.dtype}")
    elif not ((pixels_HWC >= 0) & (pixels_HWC <= 1)).all():
        low, high = pixels_HWC.min().item(), pixels_HWC.max().item()
        raise ValueError(
            f"a floating image must lie in [0, 1] without NaN, got values from {low:g} to {high:g}"
        )
    pixels_CHW = pixels_HWC.float().permute(2, 0, 1)
    if channels == 3:
        pixels_CHW = pixels_CHW.expand(3, -1, -1)
    elif pixels_CHW.shape[0] == 3:
        luma = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's
        pixels_CHW = torch.einsum("chw,c->hw", pixels_CHW, luma)[None]
    return pixels_CHW


def _pad_to_square(pixels_CHW: Tensor, value: tuple[float, ...]) -> Tensor:
    channels, height, width = pixels_CHW.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = torch.tensor(value)[:, None, None].expand(channels, side, side).clone()
    square[:, top : top + height, left : left + width] = pixels_CHW
    return square


def _to_array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W(, 3)]; 16-bit greys become floating in [0, 1], since Pillow's own conversion clips them."""
    if image.mode.startswith("I;16"):
        return np.asarray(image, dtype=np.float32) / 65535
    if image.mode in ("I", "F"):
        raise ValueError(
            f"an image of mode {image.mode!r} has no fixed range: convert it to 8 bits or give an array"
        )
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def _not_an_image(image: Any) -> TypeError:
    return TypeError(
        f"an image must be a path, a PIL image, an array or a tensor, got {type(image).__name__}"
    )


def _wrong_shape(image: np.ndarray | Tensor) -> ValueError:
    return ValueError(
        f"an image must be [H, W], [H, W, 1] or [H, W, 3] and not empty, got {list(image.shape)}"
    )

"""Pictures of digits on disk: to and from the 8×8 bright strokes on dark that scikit-learn's digits are.

Shapes: H × W pixels of a picture, s × s of the model's image.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pyvlm.models.images import load_image
from pyvlm.models.tower_config import ImageConfig

MAGNIFICATION = 8  # of pictures on disk, so that a viewer shows more than a dot
# A digit that takes less of its picture is cut out; the data's own fill theirs.
FILLED = 0.75
STROKE = 0.3  # of the brightness between ground and brightest stroke


def read_strokes(path: str | os.PathLike[str], size: int) -> tuple[np.ndarray, bool]:
    """A picture of a digit as a model of digits takes it.

    It is made grey; where its border is bright it is inverted; a digit that fills little of it is cut out;
    and what is left is averaged over areas.

    Returns:
        float32 [size, size] in [0, 1], bright strokes on dark; and whether it was inverted.

    Raises:
        ValueError: the file is missing, no image, damaged, or too large; the message names it.
    """
    picture = load_image(path)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode.startswith("I;16"):
        grey_HW = np.asarray(picture, np.float32) / 65535
    else:
        grey_HW = np.asarray(picture.convert("L"), np.float32) / 255
    inverted = _border_median(grey_HW) > 0.5
    if inverted:
        grey_HW = 1 - grey_HW
    square = torch.from_numpy(_cut_out(grey_HW))[None, None]
    small = torch.nn.functional.interpolate(square, (size, size), mode="area")
    return small[0, 0].numpy(), inverted


def read_picture(path: str | os.PathLike[str], image: ImageConfig) -> tuple[Any, bool]:
    """A picture as a model takes it, and whether it was inverted.

    Models of grey images are models of strokes and take what `read_strokes` reads; others the picture itself.

    Raises:
        ValueError: as `read_strokes`.
    """
    return read_strokes(path, image.size) if image.channels == 1 else (load_image(path), False)


def _border_median(grey_HW: np.ndarray) -> float:
    border = [grey_HW[0], grey_HW[-1], grey_HW[:, 0], grey_HW[:, -1]]
    return float(np.median(np.concatenate(border)))


def _cut_out(grey_HW: np.ndarray) -> np.ndarray:
    """A square: the whole picture, or the strokes alone where they fill little of it or it is not square."""
    height, width = grey_HW.shape
    low, high = _border_median(grey_HW), float(grey_HW.max())
    strokes_HW = grey_HW > low + STROKE * (high - low)
    if not strokes_HW.any():
        strokes_HW = np.ones_like(strokes_HW)  # a blank picture is as good as another
    rows, columns = np.flatnonzero(strokes_HW.any(1)), np.flatnonzero(strokes_HW.any(0))
    side = int(max(np.ptp(rows), np.ptp(columns))) + 1
    if height == width and side >= FILLED * height:
        return grey_HW
    top, left = (int(found[0] + found[-1] + 1 - side) // 2 + side for found in (rows, columns))
    padded = np.pad(grey_HW, side, constant_values=low)
    return padded[top : top + side, left : left + side]


def write_pictures(images: Sequence[np.ndarray], names: Sequence[str], folder: Path) -> list[Path]:
    """Writes images [h, w] in [0, 1] as PNG files, magnified."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in names]
    for image, path in zip(images, paths, strict=True):
        pixels = np.round(255 * image).astype(np.uint8)
        Image.fromarray(pixels.repeat(MAGNIFICATION, 0).repeat(MAGNIFICATION, 1)).save(path)
    return paths

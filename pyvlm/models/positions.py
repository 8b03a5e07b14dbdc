"""Positions of the language model's tokens, and how many of them an image takes: MouSi's schemes.

"MouSi: Poly-Visual-Expert Vision-Language Models" (arXiv 2401.17221), its section on positional encoding
schemes; no code was released. Tokens of several experts follow one another, and so do their rows.

Shapes: B batch, L tokens, N images in reading order. A grid is (rows, columns); a token that ends a row (a
newline) is one more column.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from pyvlm.layout import IMAGE, PADDING, TokenLayout
from pyvlm.spans import first_true, is_readable

PositionScheme = Literal["all", "share-all", "share-by-row", "share-by-row-and-column"]
SCHEMES: tuple[str, ...] = get_args(PositionScheme)
Grids = Sequence[tuple[int, int]]


def position_ids(layout: TokenLayout, scheme: str = "all", grids: Sequence[Grids] | None = None) -> Tensor:
    """Position of each token in its document, int64 [B, L]; what is not padding counts from 0.

    - "all": every token has a position of its own.
    - "share-all": the tokens of an image have one position between them.
    - "share-by-row": those of a row have one.
    - "share-by-row-and-column": the same; a learned embedding of the column is added to each token besides,
      which is the model's (`image_cells` gives the columns).

    A token after an image has the position after the image's last. Positions depend on earlier tokens only.

    Args:
        layout: of all tokens so far.
        grids: for the schemes by row, the grids whose tokens make up an image, one after another: one entry
            for all images, or one an image.

    Raises:
        ValueError: an unknown scheme, one by row without grids, or an image with more tokens than its grids.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"position scheme {scheme!r} is unknown; expected one of {', '.join(SCHEMES)}")
    takes_one = layout.kind != PADDING
    if scheme != "all":
        is_image = layout.kind == IMAGE
        starts = _starts(layout)
        if scheme != "share-all":
            if grids is None:
                raise ValueError(f"position scheme {scheme!r} needs the grids of the images")
            row, _ = image_cells(layout, grids)
            starts[:, 1:] |= row.diff(dim=1) != 0
        takes_one = takes_one & (starts | ~is_image)
    count = takes_one.cumsum(1)  # positions taken up to here, this one included
    document_starts = torch.ones_like(takes_one)
    document_starts[:, 1:] = layout.document.diff(dim=1) != 0
    before = torch.where(document_starts, count - takes_one.long(), 0).cummax(1).values
    return (count - before - 1).clamp(min=0)


def image_cells(layout: TokenLayout, grids: Sequence[Grids]) -> tuple[Tensor, Tensor]:
    """Row and column of each image token in its image, int64 [B, L] each, and −1 elsewhere.

    Rows count on from grid to grid; columns start anew.

    Args:
        layout: of all tokens so far; images are told apart by their index.
        grids: as in `position_ids`.

    Raises:
        ValueError: for CPU tensors, an image with more tokens than its grids have cells, or another number of
            images than of grids.
    """
    rows, columns, sizes = grid_cells(tuple(tuple(of_image) for of_image in grids), layout.kind.device)
    is_image, starts = layout.kind == IMAGE, _starts(layout)
    place = torch.arange(layout.length, device=layout.kind.device)
    within = place - torch.where(starts, place, 0).cummax(1).values
    number = torch.zeros_like(within)
    if len(sizes) > 1:
        number = (starts.flatten().cumsum(0) - 1).clamp(0, len(sizes) - 1).view_as(within)
    if is_readable(layout.kind):
        _check_images(is_image, starts, within, number, sizes)
    cell = ((sizes.cumsum(0) - sizes)[number] + within).clamp(max=len(rows) - 1)
    return torch.where(is_image, rows[cell], -1), torch.where(is_image, columns[cell], -1)


@lru_cache(maxsize=8)  # a token of generation would else copy the same tables to the device again
def grid_cells(grids: tuple[Grids, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Row and column of the cells of all grids, image by image, and how many each image has."""
    rows: list[int] = []
    columns: list[int] = []
    sizes = []
    for of_image in grids:
        first = 0
        for height, width in of_image:
            rows += [first + r for r in range(height) for _ in range(width)]
            columns += [c for _ in range(height) for c in range(width)]
            first += height
        sizes.append(sum(height * width for height, width in of_image))
    with torch.inference_mode(False):  # what is kept must serve training too
        return tuple(torch.tensor(values, device=device) for values in (rows, columns, sizes))


def _starts(layout: TokenLayout) -> Tensor:
    """bool [B, L]: the first token of each image."""
    starts = layout.kind == IMAGE
    changed = (layout.image.diff(dim=1) != 0) | (layout.document.diff(dim=1) != 0)
    starts[:, 1:] &= changed
    return starts


def _check_images(is_image: Tensor, starts: Tensor, within: Tensor, number: Tensor, sizes: Tensor) -> None:
    if len(sizes) > 1 and (count := int(starts.sum())) != len(sizes):
        raise ValueError(f"the layout has {count} images, and grids are given for {len(sizes)}")
    late = is_image & (within >= sizes[number])
    if late.any():
        b, i = first_true(late)
        raise ValueError(
            f"token [{b}, {i}] is number {int(within[b, i]) + 1} of its image, whose grids have "
            f"{int(sizes[number[b, i]])} cells; give each image an index of its own"
        )

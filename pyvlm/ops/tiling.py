"""Where the rows of image maps go: index maps and masks, made on the host from sizes alone, once an image.

Sizes and grids are (height, width) and (rows, columns). Maps are row-major. The index maps serve
`pyvlm.ops.pack_image_tokens` and `pyvlm.ops.place_image_tokens`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvlm.ops.placement import NEWLINE


def anyres_grid(
    image_size: tuple[int, int], pinpoints: Sequence[tuple[int, int]], tile_size: int
) -> tuple[int, int]:
    """The grid of tiles (rows, columns) that LLaVA-NeXT cuts an image into.

    Of `pinpoints` (canvas sizes in pixels) it takes the one that keeps most pixels of the image, then the one
    that wastes fewest, then the first. Source: transformers `select_best_resolution`, whose truncations it
    keeps.
    """
    _check_sizes("image_size", [image_size])
    if not pinpoints:
        raise ValueError("anyres_grid: pinpoints is empty; give at least one canvas size (height, width)")
    _check_sizes("pinpoints", pinpoints)
    if any(h % tile_size or w % tile_size for h, w in pinpoints):
        raise ValueError(
            f"anyres_grid: pinpoints {list(pinpoints)} are not all multiples of the tile of {tile_size}"
        )
    height, width = image_size

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    best = max(pinpoints, key=merit)
    return best[0] // tile_size, best[1] // tile_size


def anyres_index(
    image_sizes: Sequence[tuple[int, int]],
    pinpoints: Sequence[tuple[int, int]],
    tile_size: int,
    tile_tokens: int,
    newline: bool = True,
    num_maps: Sequence[int] | None = None,
    unpad: bool = True,
) -> tuple[Tensor, list[int]]:
    """The index map of LLaVA-NeXT's packing: base view, then the tiles as one unpadded map with newlines.

    The feature rows it addresses are, image by image, a base map and then the tiles row-major, each of
    tile_tokens × tile_tokens rows. Source: transformers `LlavaNextModel.pack_image_features` and
    `unpad_image`.

    Args:
        image_sizes: (height, width) in pixels of each original image.
        pinpoints: the canvas sizes to choose from, in pixels.
        tile_size: side of a tile in pixels.
        tile_tokens: side of a tile in tokens.
        newline: put a newline row after each row of the tiled map (and after a base view that stands alone).
        num_maps: maps of each image, 1 for a base view alone or 1 + tiles; all tiled where None.
        unpad: leave out the rows or columns of the tiled map that show nothing but padding.

    Returns:
        int32 [S] over all images, `NEWLINE` for the newline row; and the number of tokens of each image.
    """
    if num_maps is not None and len(num_maps) != len(image_sizes):
        raise ValueError(
            f"anyres_index: {len(image_sizes)} image_sizes but num_maps names {len(num_maps)} images"
        )
    pieces: list[Tensor] = []
    lengths: list[int] = []
    first_row = 0
    for i, image_size in enumerate(image_sizes):
        grid = anyres_grid(image_size, pinpoints, tile_size)
        maps = 1 + grid[0] * grid[1] if num_maps is None else num_maps[i]
        if maps not in (1, 1 + grid[0] * grid[1]):
            raise ValueError(
                f"anyres_index: image {i} of size {tuple(image_size)} has {maps} maps, but its grid of "
                f"{grid} tiles needs {1 + grid[0] * grid[1]} with the base view, or 1 without tiles"
            )
        index = _base_and_tiles(image_size, grid if maps > 1 else (0, 0), tile_tokens, newline, unpad)
        pieces.append(torch.where(index == NEWLINE, index, index + first_row))
        lengths.append(index.numel())
        first_row += maps * tile_tokens**2
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32), lengths


def anyres_tokens(
    image_size: tuple[int, int],
    pinpoints: Sequence[tuple[int, int]],
    tile_size: int,
    tile_tokens: int,
    newline: bool = True,
    unpad: bool = True,
) -> int:
    """The number of tokens of a tiled image: the length of its `anyres_index`, with the same arguments."""
    rows, columns = (tile_tokens * tiles for tiles in anyres_grid(image_size, pinpoints, tile_size))
    top, left = _letterbox_padding(image_size, (rows, columns)) if unpad else (0, 0)
    return tile_tokens**2 + (rows - 2 * top) * (columns - 2 * left + int(newline))


def _base_and_tiles(
    image_size: tuple[int, int], grid: tuple[int, int], side: int, newline: bool, unpad: bool
) -> Tensor:
    """The index of one image, as if its base map began at row 0; no tiles where the grid is (0, 0)."""
    base = torch.arange(side * side, dtype=torch.int32)
    if grid == (0, 0):
        return torch.nn.functional.pad(base, (0, int(newline)), value=NEWLINE)
    rows, columns = grid
    tiles = torch.arange(side * side, (1 + rows * columns) * side * side, dtype=torch.int32)
    tiled_map = tiles.view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
    top, left = _letterbox_padding(image_size, (rows * side, columns * side)) if unpad else (0, 0)
    tiled_map = tiled_map[top : rows * side - top, left : columns * side - left]
    tiled_map = torch.nn.functional.pad(tiled_map, (0, int(newline)), value=NEWLINE)
    return torch.cat([base, tiled_map.flatten()])


def _letterbox_padding(image_size: tuple[int, int], map_size: tuple[int, int]) -> tuple[int, int]:
    """Rows at top (and bottom) and columns at left (and right) of a map that a fitted image leaves empty."""
    height, width = image_size
    map_height, map_width = map_size
    if width / height > map_width / map_height:
        # The original rounds at the seventh digit and then truncates.
        return (map_height - int(round(height * (map_width / width), 7))) // 2, 0
    return 0, (map_width - int(round(width * (map_height / height), 7))) // 2


def pixel_shuffle_index(grid: tuple[int, int], factor: int, num_maps: int = 1) -> Tensor:
    """The index map that folds factor × factor neighbours of a map into the channels of one token.

    Channels are neighbour by neighbour, row-major (Idefics3, nanoVLM). int32 [num_maps·rows·columns/factor²,
    factor²] into rows of maps that lie one after another.
    """
    rows, columns = grid
    if factor < 1 or rows % factor or columns % factor:
        raise ValueError(f"pixel_shuffle_index: factor {factor} does not divide the grid {tuple(grid)}")
    index = torch.arange(num_maps * rows * columns, dtype=torch.int32)
    index = index.view(num_maps, rows // factor, factor, columns // factor, factor)
    return index.transpose(2, 3).reshape(-1, factor * factor)


def pixel_unshuffle_index(grid: tuple[int, int], factor: int, num_maps: int = 1) -> Tensor:
    """The inverse of `pixel_shuffle_index` for maps that unfold to `grid`: int32 [num_maps·rows·columns].

    The rows it addresses are the tokens [.., factor²·C] seen as factor² rows of C features each.
    """
    return pixel_shuffle_index(grid, factor, num_maps).flatten().argsort().int()


def letterbox_masks(
    image_sizes: Sequence[tuple[int, int]], query_side: int, factors: Sequence[int]
) -> list[Tensor]:
    """Masks for `local_cross_attention` that hide letter-box padding, one bool [N, T_i] an encoder.

    Map i is square, of side query_side·factors[i]. A window that lies wholly in the padding is made visible,
    so that every query sees something. Source: Cambrian-1 (arXiv 2406.16860), which truncates: an odd
    remainder leaves a padding row visible.
    """
    _check_sizes("image_sizes", image_sizes)
    return [torch.stack([_letterbox_mask(s, query_side, factor) for s in image_sizes]) for factor in factors]


def _letterbox_mask(image_size: tuple[int, int], query_side: int, factor: int) -> Tensor:
    height, width = image_size
    side = query_side * factor
    top = (side - int(height * (side / width))) // 2 if width > height else 0
    left = (side - int(width * (side / height))) // 2 if height > width else 0
    visible = torch.zeros(side, side, dtype=torch.bool)
    visible[top : side - top, left : side - left] = True
    windows = visible.view(query_side, factor, query_side, factor)
    return (windows | ~windows.any(dim=3, keepdim=True).any(dim=1, keepdim=True)).flatten()


def _check_sizes(name: str, sizes: Sequence[tuple[int, int]]) -> None:
    for size in sizes:
        if len(size) != 2 or size[0] < 1 or size[1] < 1:
            raise ValueError(f"{name}: {tuple(size)} is not a size (height, width) of at least (1, 1)")

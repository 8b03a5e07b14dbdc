"""Index maps of any-resolution images: the very rows that transformers' LLaVA-NeXT packs, for every grid."""

from collections.abc import Sequence
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from fusion.placement_cases import PINPOINTS, TILE
from hypothesis import example, given
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, select_best_resolution

from pyvlm.ops.placement import NEWLINE, pack_image_tokens
from pyvlm.ops.tiling import anyres_grid, anyres_index

Size = tuple[int, int]


def packed_by_transformers(
    maps: Sequence[Tensor],
    image_sizes: Sequence[Size],
    pinpoints: list[Size],
    tile: int,
    newline: Tensor | None,
) -> tuple[list[Tensor], list[int]]:
    """maps: [maps, tokens, C] of each image."""
    side = round(maps[0].shape[1] ** 0.5)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=tile // side),
        image_grid_pinpoints=pinpoints,
    )
    packed, lengths = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), maps, image_sizes, "default", newline
    )
    return packed, lengths.tolist()


def assert_packs_alike(
    image_sizes: Sequence[Size],
    pinpoints: list[Size],
    tile: int,
    side: int,
    newline: bool,
    tiled: bool = True,
) -> None:
    grids = [anyres_grid(size, pinpoints, tile) for size in image_sizes]
    num_maps = [1 + rows * columns if tiled else 1 for rows, columns in grids]
    index, lengths = anyres_index(image_sizes, pinpoints, tile, side, newline, num_maps)
    # Features that are their own row numbers, so that what differs shows where it came from.
    features = torch.arange(sum(num_maps) * side**2, dtype=torch.float64)[:, None]
    newline_row = torch.tensor([float(NEWLINE)], dtype=torch.float64) if newline else None
    maps = features.view(-1, side**2, 1).split(num_maps)
    packed, packed_lengths = packed_by_transformers(maps, image_sizes, pinpoints, tile, newline_row)
    assert torch.equal(pack_image_tokens(features, index, newline_row), torch.cat(packed)), image_sizes
    assert lengths == packed_lengths


# Strips, primes, sides of the canvases and those beside them.
SIDES = (
    *(1, 2, 3, 5, 17, 48, 71, 97, 100, 143, 144, 168, 223, 224, 331, 335, 336, 337, 375, 480, 490, 500),
    *(511, 588, 640, 671, 672, 673, 700, 768, 999, 1000, 1007, 1008, 1009, 1280, 1536, 2001, 3000, 7919),
)
SIDE_TOKENS = 24


def sides_that_rounding_decides(across: int, along: int) -> list[tuple[int, int]]:
    """(side, other side) of images as long as a map of across × along tokens, whose other side is a whole
    number of tokens, but a little less by the arithmetic of floats."""
    found = []
    for length in range(1, 1500):
        scale = along / length
        for side in range(1, across * length // along + 1):
            if side * along % length == 0 and int(side * scale) != side * along // length:
                found.append((side, length))
    return found


@pytest.mark.parametrize("pinpoints", [PINPOINTS, *([p] for p in PINPOINTS)], ids=str)
def test_every_grid_and_size_packs_as_transformers_does(pinpoints: list[Size]) -> None:
    sizes = [(height, width) for height in SIDES for width in SIDES]
    for canvas in pinpoints:
        rows, columns = (SIDE_TOKENS * side // TILE for side in canvas)
        wide = sides_that_rounding_decides(rows, columns)
        tall = [(length, side) for side, length in sides_that_rounding_decides(columns, rows)]
        assert min(len(wide), len(tall)) > 20
        sizes += wide + tall
    grids = set()
    for i, size in enumerate(sizes):
        best = select_best_resolution(size, pinpoints)
        grids.add(anyres_grid(size, pinpoints, TILE))
        assert anyres_grid(size, pinpoints, TILE) == (best[0] // TILE, best[1] // TILE), size
        assert_packs_alike([size], pinpoints, TILE, SIDE_TOKENS, newline=i % 2 == 0)
    assert grids == {(height // TILE, width // TILE) for height, width in pinpoints}


SMALL_PINPOINTS = [(28, 56), (56, 28), (56, 56), (84, 28), (28, 84), (112, 28)]
SMALL_TILE, SMALL_SIDE = 28, 3
sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(image_sizes=st.lists(sizes, min_size=1, max_size=3), newline=st.booleans(), tiled=st.booleans())
@example(image_sizes=[(1, 3000), (3000, 1)], newline=True, tiled=True)  # strips that lose every row or column
@example(image_sizes=[(1000, 1001), (672, 672)], newline=True, tiled=True)
def test_several_images_pack_as_transformers_does(
    image_sizes: list[Size], newline: bool, tiled: bool
) -> None:
    assert_packs_alike(image_sizes, SMALL_PINPOINTS, SMALL_TILE, SMALL_SIDE, newline, tiled)


@given(
    image_size=st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)),
    pinpoints=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6, unique=True),
    side=st.integers(1, 7),
)
def test_images_of_any_grids_pack_alike(image_size: Size, pinpoints: list[Size], side: int) -> None:
    tile = 14 * side
    assert_packs_alike([image_size], [(tile * h, tile * w) for h, w in pinpoints], tile, side, newline=True)


@given(image_size=sizes, newline=st.booleans())
def test_each_row_is_used_at_most_once(image_size: Size, newline: bool) -> None:
    index, (length,) = anyres_index([image_size], SMALL_PINPOINTS, SMALL_TILE, SMALL_SIDE, newline)
    rows, columns = anyres_grid(image_size, SMALL_PINPOINTS, SMALL_TILE)
    real = index[index != NEWLINE]
    assert index.dtype == torch.int32
    assert length == index.numel()
    assert real.unique().numel() == real.numel()
    assert int(real.max()) < (1 + rows * columns) * SMALL_SIDE**2
    assert torch.equal(index[: SMALL_SIDE**2], torch.arange(SMALL_SIDE**2, dtype=torch.int32)), "base view"
    if newline:
        after_base = index[SMALL_SIDE**2 :]
        width = int((after_base == NEWLINE).int().argmax()) if after_base.numel() else 0
        assert (after_base.view(-1, width + 1)[:, width] == NEWLINE).all()
    else:
        assert (index >= 0).all()

"""A picture of who sees whom: `AttentionSpans.plot`.

Shapes: Q queries, K keys, R ranges; Y × X cells of a picture or tiles of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyvlm.spans import EVERY_CLASS, IMAGE, MAX_CLASS, PADDING, TEXT, AttentionSpans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

MAX_CELLS = 512  # a side: more than a screen shows of a picture this size
MAX_TILES = 64  # a side: more cannot be told apart

# After Okabe and Ito's palette, which people with any kind of colour vision can tell apart.
UNSEEN = "#f4f4f4"
FIRST, SECOND, BOTH = "#0072b2", "#d55e00", "#1a1a1a"
CLASS_COLOURS = ("#ffffff", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#8c6d31", "#666666")
CLASS_NAMES = {PADDING: "padding", TEXT: "text", IMAGE: "image"}
EMPTY, PARTIAL, FULL = range(3)


def plot_spans(
    spans: AttentionSpans,
    row: int = 0,
    ax: Axes | None = None,
    tile: int | None = None,
    query_start: int | None = None,
    legend: bool = True,
) -> Axes:
    """Draws the mask of one row of the batch; the arguments are those of `AttentionSpans.plot`."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(f"a picture of spans needs matplotlib ({error}): pip install matplotlib") from error

    batch, queries, keys = spans.bounds.shape[0], spans.bounds.shape[1], spans.key_class.shape[1]
    if not -batch <= row < batch:
        raise ValueError(f"row={row} is not one of the {batch} rows of the batch")
    if not queries or not keys:
        raise ValueError(f"spans of {queries} queries and {keys} keys: there is nothing to draw")
    if query_start is None and queries == keys:
        query_start = 0
    if query_start is not None and not 0 <= query_start <= keys - queries:
        raise ValueError(
            f"query_start={query_start}: the {queries} queries must lie within the {keys} keys; "
            "leave it out where they are other tokens"
        )
    if tile is not None and not max(queries, keys) <= tile * MAX_TILES:
        raise ValueError(
            f"tile={tile}: {queries} queries and {keys} keys would be more than {MAX_TILES} tiles a side; "
            f"expected at least {-(-max(queries, keys) // MAX_TILES)}"
        )

    own_figure = ax is None
    if ax is None:
        ax = Figure(figsize=(6.4, 7.2), layout="constrained").add_subplot()
    first = query_start or 0
    cell_q, cell_k = -(-queries // MAX_CELLS), -(-keys // MAX_CELLS)
    pairs_SYX = count_pairs(spans, row, cell_q, cell_k)
    sizes_YX = cell_sizes(queries, keys, cell_q, cell_k)
    palette, unseen = _rgb(FIRST, SECOND, BOTH), _rgb(UNSEEN)[0]
    _draw_cells(ax, _blend(pairs_SYX, sizes_YX, palette, unseen), cell_q, cell_k, (0, first, keys, queries))

    # The strips of classes: of the keys above the mask, of the queries on its left.
    square = max(queries, keys) <= 4 * min(queries, keys)
    width, height = (max(queries, keys),) * 2 if square else (keys, queries)
    left, top = -0.055 * width, first - 0.055 * height
    key_class = spans.key_class[row].cpu()
    _draw_cells(
        ax, _class_strip(key_class, cell_k)[None], 0.035 * height, cell_k, (0, top, keys, 0.035 * height)
    )
    if query_start is not None:
        strip = _class_strip(key_class[first : first + queries], cell_q)
        _draw_cells(ax, strip[:, None], cell_q, 0.035 * width, (left, first, 0.035 * width, queries))

    right, bottom = keys - 0.5, first + queries - 0.5
    if max(queries, keys) <= 64:  # single pairs can be told apart
        lines: dict[str, Any] = {"color": "white", "linewidth": 0.5, "zorder": 3}
        ax.vlines(np.arange(keys) - 0.5, first - 0.5, bottom, **lines)
        ax.hlines(np.arange(first, first + queries) - 0.5, -0.5, right, **lines)
    tiles = None
    if tile is not None:
        tiles = tile_covers(spans, row, tile)
        _draw_tiles(ax, tiles, tile, first, queries, keys)

    ax.set_xlim((-0.5 if query_start is None else left - 0.5) - 0.005 * width, right + 0.005 * width)
    ax.set_ylim(bottom + 0.005 * height, top - 0.5 - 0.005 * height)
    ax.set_aspect("equal" if square else "auto")
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ticks = MaxNLocator(8, integer=True)
    ax.set_xticks([x for x in ticks.tick_values(0, keys - 1) if 0 <= x < keys])
    ax.set_yticks([y for y in ticks.tick_values(first, bottom) if first <= y < bottom])
    ax.spines[:].set_visible(False)
    if legend:
        handles = legend_handles(spans, row, pairs_SYX, tiles)
        options: dict[str, Any] = {"handles": handles, "ncols": 2, "frameon": False, "fontsize": "small"}
        if own_figure:
            ax.figure.legend(loc="outside lower center", **options)
        else:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), **options)
    return ax


def count_pairs(spans: AttentionSpans, row: int, cell_q: int, cell_k: int) -> np.ndarray:
    """Visible pairs a cell of cell_q queries × cell_k keys, int64 [3, Y, X].

    In the first range only, in the second only, and in both. No mask of all pairs is made.
    """
    bounds_QR2 = spans.bounds[row].cpu().long()
    key_class = spans.key_class[row].cpu().long()
    queries, keys = len(bounds_QR2), len(key_class)
    edges_X = torch.arange(-(-keys // cell_k) + 1).mul(cell_k).clamp(max=keys)
    lo_QR, hi_QR = bounds_QR2.unbind(-1)
    ranges = [(lo_QR[:, r], hi_QR[:, r], mask) for r, mask in enumerate(spans.range_classes)]
    if len(ranges) == 2:
        first, second = spans.range_classes
        ranges.append((lo_QR.amax(1), hi_QR.amin(1), first & second))

    counts = torch.zeros(3, -(-queries // cell_q), len(edges_X) - 1, dtype=torch.int64)
    for s, (lo_Q, hi_Q, mask) in zip((0, 1, 2), ranges, strict=False):
        before_K = torch.nn.functional.pad(((mask >> key_class) & 1).cumsum(0), (1, 0))
        for y, start in enumerate(range(0, queries, cell_q)):
            lo, hi = (x[start : start + cell_q, None] for x in (lo_Q, hi_Q))
            # How many keys of the range lie before each edge: none before lo, no more after hi.
            seen_X = before_K[torch.minimum(torch.maximum(edges_X, lo), torch.maximum(hi, lo))]
            counts[s, y] = seen_X.diff(dim=1).sum(0)
    counts[:2] -= counts[2]
    return counts.numpy()


def tile_covers(spans: AttentionSpans, row: int, tile: int) -> np.ndarray:
    """EMPTY (a kernel skips it), PARTIAL or FULL (it need not mask it) for each tile, int64 [Y, X]."""
    seen_YX = count_pairs(spans, row, tile, tile).sum(0)
    sizes_YX = cell_sizes(spans.bounds.shape[1], spans.key_class.shape[1], tile, tile)
    return np.where(seen_YX == 0, EMPTY, np.where(seen_YX == sizes_YX, FULL, PARTIAL))


def cell_sizes(queries: int, keys: int, cell_q: int, cell_k: int) -> np.ndarray:
    """Pairs in each cell, int64 [Y, X]: fewer in the last ones, where the sizes do not divide."""
    height, width = (
        np.minimum(np.arange(0, total, cell) + cell, total) - np.arange(0, total, cell)
        for total, cell in ((queries, cell_q), (keys, cell_k))
    )
    return height[:, None] * width[None, :]


def legend_handles(
    spans: AttentionSpans, row: int, pairs_SYX: np.ndarray, tiles: np.ndarray | None = None
) -> list[Patch]:
    """What the colours of one picture mean; colours that are not in it are left out."""
    from matplotlib.patches import Patch

    def patch(colour: str, label: str) -> Patch:
        return Patch(facecolor=colour, edgecolor="#666666", linewidth=0.6, label=label)

    present = spans.key_class[row].unique().tolist()
    handles = [patch(CLASS_COLOURS[c], CLASS_NAMES.get(c, f"class {c}")) for c in present]
    for (colour, label), pairs in zip(_streams(spans), pairs_SYX, strict=False):
        if pairs.any():
            handles.append(patch(colour, label))
    if tiles is not None:
        for cover, label in ((FULL, "full"), (PARTIAL, "partial"), (EMPTY, "empty")):
            count = int((tiles == cover).sum())
            handles.append(Patch(**TILE_STYLES[cover], label=f"tile, {label}: {count:,} of {tiles.size:,}"))
    return handles


def _streams(spans: AttentionSpans) -> Iterator[tuple[str, str]]:
    """Colour and name of each range, and of what lies in both."""
    names = [_class_names(mask) for mask in spans.range_classes]
    if len(names) == 1:
        yield FIRST, f"sees {names[0]}"
        return
    what = "softmax" if spans.separate else "range"
    yield FIRST, f"sees, 1st {what}: {names[0]}"
    yield SECOND, f"sees, 2nd {what}: {names[1]}"
    yield BOTH, "sees in both softmaxes" if spans.separate else "sees in both ranges (counts once)"


def _class_names(mask: int) -> str:
    if mask == EVERY_CLASS:
        return "all keys"
    names = [CLASS_NAMES.get(c, f"class {c}") for c in range(1, MAX_CLASS + 1) if mask >> c & 1]
    return (" and ".join(names) or "no") + " keys"


def _blend(
    pairs_SYX: np.ndarray, sizes_YX: np.ndarray, palette: np.ndarray, unseen: np.ndarray
) -> np.ndarray:
    """RGB [Y, X, 3]: the mean colour of what is seen, paler where less of a cell is seen, never invisible."""
    seen_YX = pairs_SYX.sum(0)
    colour = np.einsum("syx,sc->yxc", pairs_SYX, palette) / np.maximum(seen_YX, 1)[..., None]
    opacity = np.where(seen_YX > 0, 0.35 + 0.65 * seen_YX / sizes_YX, 0)[..., None]
    return opacity * colour + (1 - opacity) * unseen


def _class_strip(key_class: Tensor, cell: int) -> np.ndarray:
    """RGB [X, 3]: the colour of the most frequent class of each cell."""
    one_hot = torch.nn.functional.one_hot(key_class.long(), MAX_CLASS + 1)
    cells = [chunk.sum(0).argmax().item() for chunk in one_hot.split(cell)]
    return _rgb(*CLASS_COLOURS)[cells]


def _rgb(*colours: str) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.array([to_rgb(colour) for colour in colours])


def _draw_cells(
    ax: Axes, colours: np.ndarray, cell_y: float, cell_x: float, box: tuple[float, float, float, float]
) -> None:
    """An RGB image of cells, its upper left token at x, y of the box, cut off at its width and height."""
    from matplotlib.patches import Rectangle

    x, y, width, height = box
    corner = (x - 0.5, y - 0.5)  # so that the centre of a token lies at its position
    frame = Rectangle(corner, width, height, fill=False, edgecolor="#666666", linewidth=0.8, zorder=4)
    ax.add_patch(frame)
    extent = (
        corner[0],
        corner[0] + cell_x * colours.shape[1],
        corner[1] + cell_y * colours.shape[0],
        corner[1],
    )
    picture = ax.imshow(colours, extent=extent, interpolation="nearest", aspect="auto")
    picture.set_clip_path(frame)  # the last cells may be larger than what is left for them


# As outlines, over the colours of the mask.
TILE_STYLES: dict[int, dict[str, Any]] = {
    FULL: {"facecolor": "none", "edgecolor": "black", "linewidth": 1.4},
    PARTIAL: {"facecolor": "none", "edgecolor": "black", "linewidth": 1.0, "linestyle": (0, (1.5, 1.5))},
    EMPTY: {"facecolor": "none", "edgecolor": "#b0b0b0", "linewidth": 0.4, "hatch": "////"},
}


def _draw_tiles(ax: Axes, tiles: np.ndarray, tile: int, first: int, queries: int, keys: int) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    inset = 0.07 * tile  # so that neighbouring outlines do not fall together
    for cover, style in TILE_STYLES.items():
        rectangles = []
        for y, x in np.argwhere(tiles == cover).tolist():
            width, height = min(tile, keys - x * tile), min(tile, queries - y * tile)
            corner = (x * tile + inset - 0.5, first + y * tile + inset - 0.5)
            rectangles.append(Rectangle(corner, width - 2 * inset, height - 2 * inset))
        thinner = {"linewidth": style["linewidth"] * min(1, max(0.6, 12 / max(tiles.shape)))}
        ax.add_collection(PatchCollection(rectangles, zorder=5, **(style | thinner)), autolim=False)

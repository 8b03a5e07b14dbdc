"""The picture of a mask: what is counted, which colours lie where, and what is refused."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attention.cases import AttentionCase
from attention.random_inputs import random_spans
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from pyvlm import plotting
from pyvlm.layout import IMAGE, PADDING, RULES, TEXT, AttentionSpans
from pyvlm.plotting import BOTH, CLASS_COLOURS, EMPTY, FIRST, FULL, PARTIAL, SECOND, UNSEEN, count_pairs

ROOT = Path(__file__).parents[2]
DIALOGUE = AttentionCase("dialogue", "", "mmca", ("p2 t3 i5 t2 i4 t6",))


def pixels(ax: Axes) -> np.ndarray:
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def colour_at(ax: Axes, picture: np.ndarray, key: float, query: float) -> tuple[float, ...]:
    x, y = ax.transData.transform((key, query))
    return tuple(picture[len(picture) - 1 - int(y), int(x)])


def assert_colours(ax: Axes, expected: dict[tuple[float, float], str]) -> None:
    """Of the centres of (query, key) pairs."""
    picture = pixels(ax)
    for (query, key), colour in expected.items():
        actual = colour_at(ax, picture, key, query)
        assert actual == pytest.approx(to_rgb(colour), abs=2 / 255), (query, key)


def labels(ax: Axes) -> list[str]:
    legend = ax.get_legend() or ax.figure.legends[0]
    return [text.get_text() for text in legend.get_texts()]


@settings(max_examples=60)
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    ranges=st.integers(1, 2),
    cell_q=st.integers(1, 45),
    cell_k=st.integers(1, 45),
    seed=st.integers(0, 2**31),
)
def test_pairs_are_those_of_the_dense_mask(
    queries: int, keys: int, ranges: int, cell_q: int, cell_k: int, seed: int
) -> None:
    torch.manual_seed(seed)
    spans = random_spans(2, queries, keys, ranges)
    dense = spans.dense()[1]
    first, second = dense[0], dense[-1] if ranges == 2 else torch.zeros_like(dense[0])
    expected = torch.stack([first & ~second, second & ~first, first & second])
    counts = count_pairs(spans, 1, cell_q, cell_k)
    for y in range(counts.shape[1]):
        for x in range(counts.shape[2]):
            cell = expected[:, y * cell_q : (y + 1) * cell_q, x * cell_k : (x + 1) * cell_k]
            assert counts[:, y, x].tolist() == cell.sum((1, 2)).tolist()
    assert counts.sum() == expected.sum()

    covers = plotting.tile_covers(spans, 1, cell_q)
    union = dense.any(0)
    for y in range(covers.shape[0]):
        for x in range(covers.shape[1]):
            tile = union[y * cell_q : (y + 1) * cell_q, x * cell_q : (x + 1) * cell_q]
            assert covers[y, x] == (FULL if tile.all() else PARTIAL if tile.any() else EMPTY)


def test_streams_and_classes_have_their_colours() -> None:
    ax = DIALOGUE.spans().plot()
    seen = {(10, 2): FIRST, (10, 5): SECOND, (11, 11): FIRST, (5, 5): SECOND, (21, 13): SECOND}
    unseen = {(0, 0): UNSEEN, (10, 1): UNSEEN, (10, 12): UNSEEN, (6, 5): UNSEEN, (5, 2): UNSEEN}
    # A strip is 0.035 of the longer side thick and ends 0.02 of it before the mask.
    strip = -0.5 - 22 * (0.02 + 0.035 / 2)
    of_keys = {
        (strip, 0): PADDING,
        (strip, 4): TEXT,
        (strip, 5): IMAGE,
        (strip, 15): IMAGE,
        (strip, 21): TEXT,
    }
    of_queries = {(at, strip): kind for (_, at), kind in of_keys.items()}
    classes = {place: CLASS_COLOURS[kind] for place, kind in (of_keys | of_queries).items()}
    assert_colours(ax, seen | unseen | classes)
    assert labels(ax) == [
        "padding",
        "text",
        "image",
        "sees, 1st softmax: text keys",
        "sees, 2nd softmax: image keys",
    ]


def test_pairs_in_both_ranges() -> None:
    bounds = torch.tensor([[[[0, 5], [2, 9]]] * 3], dtype=torch.int32)
    key_class = torch.tensor([[1, 1, 1, 2, 1, 1, 2, 5, 1]], dtype=torch.uint8)
    for separate, label in ((False, "sees in both ranges (counts once)"), (True, "sees in both softmaxes")):
        ax = AttentionSpans(bounds, key_class, (2 | 4, 4 | 32), separate).plot()
        expected = {0: FIRST, 2: FIRST, 3: BOTH, 4: FIRST, 5: UNSEEN, 6: SECOND, 7: SECOND, 8: UNSEEN}
        assert_colours(ax, {(query, key): colour for key, colour in expected.items() for query in range(3)})
        assert labels(ax)[:3] == ["text", "image", "class 5"]
        assert labels(ax)[4].endswith("image and class 5 keys")
        assert labels(ax)[5] == label


def test_what_is_not_in_the_picture_is_not_in_the_legend() -> None:
    text = AttentionCase("text", "", "mmca", ("t5",)).spans()
    assert labels(text.plot()) == ["text", "sees, 1st softmax: text keys"]
    assert labels(AttentionCase("", "", "causal", ("t5",)).spans().plot()) == ["text", "sees all keys"]
    ax = text.plot(legend=False)
    assert ax.get_legend() is None
    assert not ax.figure.legends


def test_a_row_of_the_batch() -> None:
    spans = AttentionCase("rows", "", "causal", ("t9", "p6 t3")).spans()
    assert_colours(spans.plot(row=0), {(4, 2): FIRST, (8, 7): FIRST})
    assert_colours(spans.plot(row=-1), {(4, 2): UNSEEN, (8, 7): FIRST})


def test_chunks_lie_at_their_positions() -> None:
    spans = DIALOGUE.layout().spans("mmca", query_start=9, num_queries=8)
    unknown, known = spans.plot(), spans.plot(query_start=9)
    assert_colours(unknown, {(1, 2): FIRST, (0, 9): SECOND, (7, 17): UNSEEN})
    assert_colours(known, {(10, 2): FIRST, (9, 9): SECOND, (16, 17): UNSEEN})
    assert known.get_xlim()[0] < -1 < unknown.get_xlim()[0]  # room for a strip of queries
    assert min(known.get_yticks()) >= 9
    assert max(known.get_yticks()) <= 16


def test_tiles_are_marked_and_counted() -> None:
    spans = AttentionCase("causal", "", "causal", ("t32",)).spans()
    ax = spans.plot(tile=8)
    assert labels(ax)[2:] == ["tile, full: 6 of 16", "tile, partial: 4 of 16", "tile, empty: 6 of 16"]
    assert sorted(len(c.get_paths()) for c in ax.collections if len(c.get_paths()) in (4, 6)) == [4, 6, 6]
    picture = pixels(ax)
    # The left edge of the full tile of queries 8 to 15 and keys 0 to 7 is 0.07 of a tile inside of it.
    edge = [colour_at(ax, picture, -0.5 + 0.56 + shift, 11.25) for shift in np.linspace(-0.1, 0.1, 9)]
    assert min(map(sum, edge)) < 0.3 < sum(to_rgb(FIRST))


def test_long_rows_are_drawn_in_cells() -> None:
    spans = AttentionCase("long", "", "mmca", ("t8000 i8000 t8000 i5000 t3768",)).spans()
    ax = spans.plot()
    mask, strip, _ = (image.get_array() for image in ax.images)
    assert mask.shape == (512, 512, 3)
    assert strip.shape == (1, 512, 3)
    # The diagonal of an image is one pair in 64 of a cell: pale, but there.
    opacity = 0.35 + 0.65 / 64
    pale = opacity * np.array(to_rgb(SECOND)) + (1 - opacity) * np.array(to_rgb(UNSEEN))
    assert tuple(mask[200, 200]) == pytest.approx(tuple(pale))
    assert tuple(mask[300, 100]) == pytest.approx(to_rgb(FIRST))
    assert tuple(mask[300, 200]) == pytest.approx(to_rgb(SECOND))
    assert tuple(mask[100, 300]) == pytest.approx(to_rgb(UNSEEN))


def test_one_query_on_many_keys_is_legible() -> None:
    spans = DIALOGUE.layout().spans("mmca", query_start=21)
    ax = spans.plot(query_start=21)
    box = ax.get_window_extent()
    assert box.height > 0.5 * box.width
    assert_colours(ax, {(21, 3): FIRST, (21, 7): SECOND, (21, 0): UNSEEN})


def test_given_axes_are_drawn_into_and_returned() -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert DIALOGUE.spans().plot(ax=right) is right
    assert not left.images
    assert right.get_legend() is not None


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("row=1 is not one of the 1 rows", {"row": 1}),
        ("row=-2 is not one of the 1 rows", {"row": -2}),
        ("query_start=1: the 22 queries must lie within the 22 keys", {"query_start": 1}),
        ("query_start=-1", {"query_start": -1}),
        ("tile=0: .* expected at least 1", {"tile": 0}),
    ],
)
def test_bad_arguments(message: str, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=message):
        DIALOGUE.spans().plot(**arguments)


def test_too_many_tiles_are_refused() -> None:
    spans = AttentionCase("long", "", "causal", ("t1000",)).spans()
    spans.plot(tile=16)
    with pytest.raises(ValueError, match=r"tile=15: .* more than 64 tiles a side; expected at least 16"):
        spans.plot(tile=15)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0)])
def test_nothing_to_draw(queries: int, keys: int) -> None:
    with pytest.raises(ValueError, match=f"spans of {queries} queries and {keys} keys"):
        random_spans(1, queries, keys).plot()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib .*: pip install matplotlib"):
        DIALOGUE.spans().plot()


def test_pyplot_and_its_windows_are_left_alone() -> None:
    code = """
import sys
import torch, pyvlm
assert "matplotlib" not in sys.modules
ax = pyvlm.TokenLayout(torch.ones(1, 5, dtype=torch.uint8)).spans("causal").plot(tile=2)
ax.figure.canvas.draw()
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_picture_of_the_readme_is_made_by_its_script() -> None:
    figure = runpy.run_path(str(ROOT / "docs" / "masks.py"))["figure"]()
    assert [ax.get_title().split(",")[0] for ax in figure.axes] == list(RULES)
    width, height = figure.get_size_inches() * 100
    assert Image.open(ROOT / "docs" / "masks.png").size == (width, height)

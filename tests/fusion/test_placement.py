"""Image rows into text: the merge, its index maps (against transformers), and counts that differ."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from tolerance import assert_conforms
from torch import Tensor
from torch.autograd import gradcheck

from pyvlm.ops.placement import NEWLINE, add_at_image_tokens, pack_image_tokens, place_image_tokens
from pyvlm.ops.tiling import (
    anyres_grid,
    anyres_index,
    letterbox_masks,
    pixel_shuffle_index,
    pixel_unshuffle_index,
)


def mask_of(*rows: str) -> Tensor:
    """`i` is an image token, anything else is not."""
    return torch.tensor([[token == "i" for token in row] for row in rows])


MASKS = [
    pytest.param(mask_of("tiit", "iiii"), id="images within and alone"),
    pytest.param(mask_of("titi", "tttt"), id="interleaved, and a row without"),
    pytest.param(mask_of("ttt"), id="no image at all"),
    pytest.param(mask_of("i"), id="one token"),
    pytest.param(torch.zeros(2, 0, dtype=torch.bool), id="no token"),
    pytest.param(torch.zeros(0, 3, dtype=torch.bool), id="no sample"),
    pytest.param(mask_of("tit", "iti", "iit").T, id="a mask that is not contiguous"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_place_image_tokens_is_masked_scatter(mask: Tensor, dtype: torch.dtype) -> None:
    text = torch.randn(*mask.shape, 5).to(dtype)
    features = torch.randn(int(mask.sum()), 5).to(dtype)
    before = text.clone()
    placed = place_image_tokens(text, features, mask, features_per_sample=mask.sum(1).tolist())
    assert torch.equal(placed, text.masked_scatter(mask[..., None], features))
    assert torch.equal(text, before), "the text embeddings were written to"


@pytest.mark.parametrize("mask", MASKS)
def test_add_at_image_tokens_adds_there_only(mask: Tensor) -> None:
    hidden, updates = torch.randn(*mask.shape, 5), torch.randn(int(mask.sum()), 5)
    before = hidden.clone()
    added = add_at_image_tokens(hidden, updates, mask)
    expected = hidden.clone()
    expected[mask] += updates
    assert torch.equal(added, expected)
    assert torch.equal(hidden, before), "the hidden states were written to"


def test_place_from_views() -> None:
    mask = mask_of("tiit", "itti")
    text, features = torch.randn(5, 4, 2).permute(2, 1, 0), torch.randn(5, 4).T
    assert torch.equal(
        place_image_tokens(text, features, mask),
        place_image_tokens(text.contiguous(), features.contiguous(), mask),
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_index_takes_rows_in_any_order_and_newlines(dtype: torch.dtype) -> None:
    features, newline = torch.randn(3, 2), torch.randn(2)
    index = torch.tensor([2, NEWLINE, 0, 2], dtype=dtype)
    expected = torch.stack([features[2], newline, features[0], features[2]])
    assert torch.equal(pack_image_tokens(features, index, newline), expected)
    text, mask = torch.randn(2, 3, 2), mask_of("tii", "iti")
    placed = place_image_tokens(text, features, mask, index, newline, features_per_sample=[2, 2])
    assert torch.equal(placed[mask], expected)
    assert torch.equal(placed[~mask], text[~mask])


def test_an_index_lays_rows_side_by_side() -> None:
    features = torch.randn(4, 2)
    index = torch.tensor([[3, 0], [1, 1]])
    expected = torch.stack([torch.cat([features[3], features[0]]), torch.cat([features[1], features[1]])])
    assert torch.equal(pack_image_tokens(features, index), expected)
    text, mask = torch.randn(1, 4, 4), mask_of("tiit")
    assert torch.equal(place_image_tokens(text, features, mask, index)[mask], expected)


def test_an_empty_index_packs_nothing() -> None:
    assert pack_image_tokens(torch.randn(0, 3), torch.empty(0, dtype=torch.int32)).shape == (0, 3)
    assert pack_image_tokens(torch.randn(2, 3), torch.empty(0, 4, dtype=torch.int32)).shape == (0, 12)


def test_gradients() -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    mask, index = mask_of("tii", "iti"), torch.tensor([1, NEWLINE, 0, 1])
    assert gradcheck(lambda t, f: place_image_tokens(t, f, mask), [leaf(2, 3, 2), leaf(4, 2)])
    assert gradcheck(
        lambda t, f, n: place_image_tokens(t, f, mask, index, n), [leaf(2, 3, 2), leaf(2, 2), leaf(2)]
    )
    assert gradcheck(lambda f: pack_image_tokens(f, index[[0, 2]].view(1, 2)), [leaf(3, 2)])
    assert gradcheck(lambda h, u: add_at_image_tokens(h, u, mask), [leaf(2, 3, 2), leaf(4, 2)])


@pytest.mark.parametrize("op", [place_image_tokens, add_at_image_tokens])
def test_compiles_to_one_graph(op: Callable[..., Tensor]) -> None:
    """Nothing on the way needs a value on the host; a wrong count is still refused, by the graph itself."""
    mask = mask_of("tiit", "itti")
    text, features = torch.randn(2, 4, 3), torch.randn(4, 3)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(text, features, mask), op(text, features, mask))
    with pytest.raises(RuntimeError, match="number of image placeholders differs"):
        compiled(text, features, mask_of("tttt", "itti"))


def test_half_features_meet_float32_text_under_autocast() -> None:
    mask, index = mask_of("tii", "iti"), torch.tensor([1, NEWLINE, 0, 1])
    text, features, newline = torch.randn(2, 3, 2), torch.randn(2, 2).bfloat16(), torch.randn(2)
    with torch.autocast("cpu", torch.bfloat16):
        placed = place_image_tokens(text, features, mask, index, newline)
        added = add_at_image_tokens(text, features[[0, 1, 0, 1]], mask)
    assert placed.dtype == added.dtype == torch.float32
    rows = torch.stack([features[1], newline.bfloat16(), features[0], features[1]]).float()
    assert torch.equal(placed[mask], rows)
    assert torch.equal(added[mask], text[mask] + features[[0, 1, 0, 1]].float())


# ---- counts that differ

TEXT, FEATURES = torch.zeros(3, 4, 2), torch.zeros(4, 2)
COUNTS = {
    "too few features": (
        ("itti", "ttii", "ttit"),
        None,
        "sample 2 has 1 image placeholders, but 0 image features",
    ),
    "too few for the first": (
        ("iiii", "iiii", "tttt"),
        None,
        "sample 1 has 4 image placeholders, but 0 image features",
    ),
    "too many features": (
        ("itti", "tttt", "itt"),
        None,
        "sample 2 has 1 image placeholders, but 2 image features",
    ),
    "no placeholder": (
        ("tttt", "tttt", "tttt"),
        None,
        "sample 2 has 0 image placeholders, but 4 image features",
    ),
    "shifted between samples": (
        ("iitt", "itti", "tttt"),
        [3, 1, 0],
        r"sample 0 has 2 image placeholders, but 3 image features \(4 and 4 in the batch\)",
    ),
    "counts of fewer samples": (
        ("iitt", "itti", "tttt"),
        [2, 2],
        r"features_per_sample has 2 numbers that add up to 4, expected 3 \(one a sample\)",
    ),
    "counts of fewer features": (
        ("iitt", "ittt", "tttt"),
        [2, 1, 0],
        "add up to 3, expected 3 .* that add up to the 4 image rows",
    ),
}


@pytest.mark.parametrize("op", [place_image_tokens, add_at_image_tokens])
@pytest.mark.parametrize("name", COUNTS)
def test_a_mismatch_names_sample_placeholders_and_features(name: str, op: Callable[..., Tensor]) -> None:
    rows, per_sample, message = COUNTS[name]
    mask = mask_of(*[row.ljust(4, "t") for row in rows])
    with pytest.raises(ValueError, match=f"{op.__name__}: .*{message}"):
        op(TEXT, FEATURES, mask, features_per_sample=per_sample)


MASK = mask_of("iitt", "itti", "tttt")
BAD = {
    "features of another width": (
        lambda: place_image_tokens(TEXT, torch.zeros(4, 3), MASK),
        ValueError,
        "image_features has 3 features a row, but text_embeds has 2",
    ),
    "parts of another width": (
        lambda: place_image_tokens(TEXT, FEATURES, MASK, torch.zeros(4, 2, dtype=torch.int32)),
        ValueError,
        "2 features a row, 2 rows a token, but text_embeds has 2",
    ),
    "mask of another shape": (
        lambda: place_image_tokens(TEXT, FEATURES, MASK[:, :3]),
        ValueError,
        r"image_mask has shape \[3, 3\], expected \[B, L\] with B = 3 \(from text_embeds\), L = 4",
    ),
    "integer mask": (
        lambda: place_image_tokens(TEXT, FEATURES, MASK.int()),
        TypeError,
        "image_mask is torch.int32, expected torch.bool",
    ),
    "features of another type": (
        lambda: place_image_tokens(TEXT, FEATURES.half(), MASK),
        TypeError,
        "image_features is torch.float16 but text_embeds is torch.float32",
    ),
    "newline without an index": (
        lambda: place_image_tokens(TEXT, FEATURES, MASK, newline=torch.zeros(2)),
        ValueError,
        "newline was given without an index",
    ),
    "index without a newline": (
        lambda: pack_image_tokens(FEATURES, torch.tensor([0, NEWLINE])),
        ValueError,
        "index runs from -1 to 0; there are 4 feature rows, and no newline was given",
    ),
    "index beyond the rows": (
        lambda: pack_image_tokens(FEATURES, torch.tensor([0, 4]), torch.zeros(2)),
        ValueError,
        "index runs from 0 to 4; there are 4 feature rows",
    ),
    "index below the newline": (
        lambda: pack_image_tokens(FEATURES, torch.tensor([-2, 0]), torch.zeros(2)),
        ValueError,
        "index runs from -2 to 0",
    ),
    "float index": (lambda: pack_image_tokens(FEATURES, torch.zeros(2)), TypeError, "index is torch.float32"),
    "factor that leaves a rest": (
        lambda: pixel_shuffle_index((4, 6), 4),
        ValueError,
        r"factor 4 does not divide the grid \(4, 6\)",
    ),
    "empty image": (
        lambda: anyres_index([(0, 5)], [(8, 8)], 4, 2),
        ValueError,
        r"image_size: \(0, 5\) is not a size",
    ),
    "no canvas": (lambda: anyres_grid((5, 5), [], 4), ValueError, "pinpoints is empty"),
    "canvas of broken tiles": (
        lambda: anyres_grid((5, 5), [(8, 6)], 4),
        ValueError,
        "not all multiples of the tile of 4",
    ),
    "maps of another grid": (
        lambda: anyres_index([(8, 8)], [(8, 8)], 4, 2, num_maps=[4]),
        ValueError,
        r"image 0 of size \(8, 8\) has 4 maps, but its grid of \(2, 2\) tiles needs 5",
    ),
    "maps of more images": (
        lambda: anyres_index([(8, 8)], [(8, 8)], 4, 2, num_maps=[5, 5]),
        ValueError,
        "1 image_sizes but num_maps names 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


# ---- index maps

sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(
    factor=st.integers(1, 4), rows=st.integers(1, 4), columns=st.integers(1, 4), num_maps=st.integers(0, 3)
)
def test_pixel_shuffle_index_folds_squares_of_neighbours(
    factor: int, rows: int, columns: int, num_maps: int
) -> None:
    grid = (rows * factor, columns * factor)
    index = pixel_shuffle_index(grid, factor, num_maps)
    assert index.shape == (num_maps * rows * columns, factor**2)
    for token, neighbours in enumerate(index.tolist()):
        image, cell = divmod(token, rows * columns)
        for part, source in enumerate(neighbours):
            y = (cell // columns) * factor + part // factor
            x = (cell % columns) * factor + part % factor
            assert source == image * grid[0] * grid[1] + y * grid[1] + x
    inverse = pixel_unshuffle_index(grid, factor, num_maps)
    assert torch.equal(index.flatten()[inverse.long()], torch.arange(inverse.numel(), dtype=torch.int32))


@given(image_size=sizes, query_side=st.integers(1, 6), factor=st.integers(1, 4))
def test_letterbox_masks_leave_every_query_something(
    image_size: tuple[int, int], query_side: int, factor: int
) -> None:
    (mask,) = letterbox_masks([image_size], query_side, [factor])
    assert mask.shape == (1, (query_side * factor) ** 2)
    visible = mask.view(query_side, factor, query_side, factor).any(3).any(1)
    assert visible.all()
    if image_size[0] == image_size[1]:
        assert mask.all()


def test_letterbox_masks_hide_the_padding_of_a_wide_image() -> None:
    (mask,) = letterbox_masks(
        [(2, 4)], 2, [4]
    )  # half the rows of 8 × 8 are padding: two at the top, two below
    rows = mask.view(8, 8)
    assert torch.equal(rows.all(1), rows.any(1))
    assert rows.all(1).tolist() == [False, False, True, True, True, True, False, False]
    assert_conforms(letterbox_masks([(4, 2)], 2, [4])[0].view(8, 8).T, rows)

"""Positions of images in the language model: against plain loops, and the same token by token."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_vlm import VOCAB, batch, pictures, tiny_config, tokens
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.layout import IMAGE, PADDING, TEXT, TokenLayout
from pyvlm.models import VLM, VLMConfig
from pyvlm.models.inputs import default_layout
from pyvlm.models.language import slice_layout
from pyvlm.models.positions import SCHEMES, image_cells, position_ids

Piece = int | list[tuple[int, int]]  # so many words, or an image of these grids

CLIP, SAM, WITH_NEWLINES = [(2, 2)], [(3, 2), (1, 4)], [(2, 3 + 1)]
ROWS: dict[str, list[Piece]] = {
    "text only": [5],
    "image first": [CLIP, 2],
    "image last": [1, SAM],
    "images side by side": [1, CLIP, CLIP, WITH_NEWLINES, 1],
    "one cell": [1, [(1, 1)], 1],
    "one row, one column": [[(1, 3)], 1, [(3, 1)], 2],
}


def make(*rows: list[Piece], side: str = "left") -> tuple[TokenLayout, list[list[tuple[int, int]]]]:
    """The layout of rows of words and images, and the grids of its images in reading order."""
    kinds, images, grids = [], [], []
    for row in rows:
        kind, image = [], []
        for number, piece in enumerate(row):
            count = piece if isinstance(piece, int) else sum(h * w for h, w in piece)
            kind += [TEXT if isinstance(piece, int) else IMAGE] * count
            image += [-1 if isinstance(piece, int) else number] * count
            if not isinstance(piece, int):
                grids.append(piece)
        kinds.append(torch.tensor(kind, dtype=torch.uint8))
        images.append(torch.tensor(image, dtype=torch.int32))
    pad = torch.nn.utils.rnn.pad_sequence
    return TokenLayout(pad(kinds, True, PADDING, side), pad(images, True, -1, side)), grids


def by_loops(rows: list[list[Piece]], scheme: str) -> list[list[int]]:
    """Position of every token that is no padding, row by row."""
    result = []
    for row in rows:
        positions: list[int] = []
        free = 0
        for piece in row:
            if isinstance(piece, int):
                positions += range(free, free + piece)
                free += piece
                continue
            if scheme == "share-all":
                positions += [free] * sum(h * w for h, w in piece)
                free += 1
                continue
            for height, width in piece:
                for _ in range(height):
                    if scheme == "all":
                        positions += range(free, free + width)
                        free += width
                    else:
                        positions += [free] * width
                        free += 1
        result.append(positions)
    return result


def assert_positions(rows: list[list[Piece]], scheme: str, side: str) -> None:
    layout, grids = make(*rows, side=side)
    found = position_ids(layout, scheme, grids or [[(1, 1)]])
    real = layout.kind != PADDING
    assert [x[m].tolist() for x, m in zip(found, real, strict=True)] == by_loops(rows, scheme)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ROWS)
def test_positions_equal_plain_loops(name: str, scheme: str, side: str) -> None:
    assert_positions([ROWS[name], [2, CLIP, 4]], scheme, side)


PIECES = st.one_of(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=2),
)


@given(st.lists(st.lists(PIECES, min_size=1, max_size=4), min_size=1, max_size=3), st.sampled_from(SCHEMES))
def test_positions_of_any_batch(rows: list[list[Piece]], scheme: str) -> None:
    assert_positions(rows, scheme, "left")


def test_how_many_positions_an_image_takes() -> None:
    """MouSi's example: SAM's 64 × 64 tokens take 4096, 64 or 1 positions."""
    layout, grids = make([1, [(64, 64)], 1])
    after = {scheme: int(position_ids(layout, scheme, grids)[0, -1]) - 1 for scheme in SCHEMES}
    assert after == {"all": 4096, "share-all": 1, "share-by-row": 64, "share-by-row-and-column": 64}


def test_documents_count_anew() -> None:
    kind = torch.tensor([[TEXT, IMAGE, IMAGE, IMAGE, IMAGE, TEXT, TEXT]], dtype=torch.uint8)
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    layout = TokenLayout(kind, document=document)
    assert position_ids(layout, "share-all").tolist() == [[0, 1, 1, 0, 0, 1, 2]]
    assert position_ids(layout, "share-by-row", [[(2, 1)]]).tolist() == [[0, 1, 2, 0, 1, 2, 3]]


def test_cells_are_rows_and_columns() -> None:
    layout, grids = make([1, [(2, 3), (1, 2)], 1])
    row, column = image_cells(layout, grids)
    assert row.tolist() == [[-1, 0, 0, 0, 1, 1, 1, 2, 2, -1]]
    assert column.tolist() == [[-1, 0, 1, 2, 0, 1, 2, 0, 1, -1]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_positions_depend_on_earlier_tokens_only(scheme: str) -> None:
    layout, _ = make([1, CLIP, 2, CLIP, 1], [2, CLIP, CLIP, 1])
    whole = position_ids(layout, scheme, [CLIP])
    for length in range(1, layout.length):
        assert torch.equal(position_ids(slice_layout(layout, 0, length), scheme, [CLIP]), whole[:, :length])


def test_what_cannot_be_placed_is_refused() -> None:
    layout, grids = make([1, CLIP, CLIP])
    with pytest.raises(ValueError, match="'share' is unknown; expected one of all, share-all"):
        position_ids(layout, "share")
    with pytest.raises(ValueError, match="needs the grids"):
        position_ids(layout, "share-by-row")
    with pytest.raises(ValueError, match="has 2 images, and grids are given for 3"):
        position_ids(layout, "share-by-row", [*grids, CLIP])
    with pytest.raises(
        ValueError, match=r"token \[0, 3\] is number 3 of its image, whose grids have 2 cells"
    ):
        position_ids(layout, "share-by-row", [[(2, 1)]])


# ---- in a model


def model_of(scheme: str, **fusion: Any) -> VLM:
    content = tiny_config().model_dump() | {"position_scheme": scheme}
    if fusion:
        content["fusion"] = fusion
        content["vision_towers"][1]["patches"] = 2
    torch.manual_seed(7)
    model = VLM(VLMConfig.model_validate(content)).double().eval()
    with torch.no_grad():
        for parameter in model.language.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def words(model: VLM, *parts: int | str) -> list[int]:
    each = model.config.tokens_per_image
    ids: list[int] = []
    for part in parts:
        ids += [model.config.image_token_id] * each if part == "image" else tokens(part)
    return ids


@pytest.mark.parametrize("fusion", [{}, {"method": "sequence", "hidden_size": 10}])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_token_by_token_is_one_pass(scheme: str, fusion: dict[str, Any]) -> None:
    model = model_of(scheme, **fusion)
    input_ids, real = batch(
        words(model, 2, "image", 3, "image", 2), words(model, 1, "image"), words(model, 3)
    )
    images = pictures(3)
    whole = torch.cat([input_ids, torch.randint(3, VOCAB, (3, 4))], dim=1)
    mask = torch.cat([real, torch.ones(3, 4, dtype=real.dtype)], dim=1)
    layout = default_layout(model.config, whole, mask)
    full = model(whole, images, layout=layout).logits
    cache = model.new_cache(whole.shape[1])
    pieces: list[Tensor] = []
    start = 0
    for stop in range(input_ids.shape[1], whole.shape[1] + 1):
        given = images if start == 0 else None
        piece = model(whole[:, start:stop], given, layout=slice_layout(layout, 0, stop), cache=cache)
        pieces.append(piece.logits)
        start = stop
    assert_conforms(torch.cat(pieces, dim=1)[mask == 1], full[mask == 1])

    answer = model.generate(input_ids, images, real, max_new_tokens=4)
    again = torch.cat([input_ids, answer[:, :3]], dim=1)
    mask = torch.cat([real, torch.ones(3, 3, dtype=real.dtype)], dim=1)
    logits = model(again, images, layout=default_layout(model.config, again, mask)).logits[:, -4:]
    logits[..., model.config.image_token_id] = -torch.inf
    assert torch.equal(logits.argmax(-1), answer)


def test_schemes_differ_and_columns_are_learned() -> None:
    logits = []
    for scheme in SCHEMES:
        model = model_of(scheme)
        input_ids, real = batch(torch.arange(3, 8).tolist() + [model.config.image_token_id] * 4 + [5, 9])
        torch.manual_seed(3)
        logits.append(model(input_ids, pictures(1), real).logits)
    for i, one in enumerate(logits):
        assert not any(torch.allclose(one[:, -1], other[:, -1]) for other in logits[:i])

    model = model_of("share-by-row-and-column")
    input_ids, real = batch(words(model, 2, "image", 2))
    model.train()(
        input_ids, pictures(1), real, labels=input_ids.masked_fill(input_ids == 2, -100)
    ).loss.backward()
    assert (model.column_embedding.weight.grad.abs().sum(1) > 0).all()
    assert id(model.column_embedding.weight) in map(id, model.parts()["connector"])
    with torch.no_grad():
        before = model.image_features(pictures(1).zero_())
        model.column_embedding.weight[1] += 1
        moved = model.image_features(pictures(1).zero_()) - before
    assert_conforms(moved[0, :, 0], torch.tensor([0.0, 1, 0, 1], dtype=torch.float64))


def test_a_table_made_without_gradients_serves_training() -> None:
    model = model_of("share-by-row-and-column", method="sequence", hidden_size=10)
    images = pictures(1)
    with torch.inference_mode():
        model.image_features(images)
    model.image_features(images).sum().backward()


def test_tokens_across_rows_have_no_row() -> None:
    content = tiny_config().model_dump() | {"position_scheme": "share-by-row"}
    content["fusion"] = {"method": "sequence", "hidden_size": 10}
    content["image"]["size"] = 24
    content["vision_towers"][0]["patches"] = 4
    with pytest.raises(ValueError, match="4 patches a token do not fit rows of 6"):
        VLMConfig.model_validate(content)
    content["vision_towers"][0]["patches"] = 12
    assert VLMConfig.model_validate(content).token_grids[0] == (3, 1)

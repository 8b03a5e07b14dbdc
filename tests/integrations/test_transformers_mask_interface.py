"""Masks of transformers' mask functions as spans: nothing but the form may change."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from pyvlm.integrations.transformers import masks
from pyvlm.integrations.transformers.masks import (
    dense_spans,
    kept_spans,
    pack_spans,
    spans_mask,
    unpack_spans,
)

BATCH, TOKENS = 2, 12


def seen(packed: Tensor, queries: int, keys: int) -> Tensor:
    """bool [B, Q, K] of a packed mask."""
    return unpack_spans(packed, queries, keys).dense().any(1)


def blocks(*pieces: tuple[int, int]) -> Tensor:
    """int64 [2, TOKENS]: -1, and in the first row the number of its block in each piece."""
    ids = torch.full((BATCH, TOKENS), -1)
    for number, (start, stop) in enumerate(pieces):
        ids[0, start:stop] = number
    return ids


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
MASKS: dict[str, Any] = {
    "causal": causal_mask_function,
    "everything": bidirectional_mask_function,
    "window": sliding_window_causal_mask_function(4),
    "window both ways": sliding_window_bidirectional_mask_function(3),
    "chunks": chunked_causal_mask_function(5, torch.tensor([0, 2])),
    "images both ways": or_masks(causal_mask_function, blockwise_overlay(blocks((2, 5), (7, 10)))),
    "images see each other": or_masks(
        causal_mask_function, blockwise_overlay(blocks((2, 5)) + blocks((7, 10)) + 1)
    ),
    "window beside an image": or_masks(
        sliding_window_causal_mask_function(2), blockwise_overlay(blocks((4, 9)))
    ),
    "packed": and_masks(packed_sequence_mask_function(DOCUMENTS), causal_mask_function),
    "nothing": and_masks(causal_mask_function, lambda b, h, q, k: k < 0),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("piece", [1 << 26, 40], ids=["whole", "pieces"])
def test_spans_see_what_the_mask_function_says(
    name: str, padded: str | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "PIECE", piece)
    mask = None
    if padded:
        mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
        mask[1, :3] = mask[1, -2:] = False
        mask[0] = True
    expected = sdpa_mask(
        BATCH, TOKENS, TOKENS, mask_function=MASKS[name], attention_mask=mask, allow_is_causal_skip=False
    )
    ours = spans_mask(BATCH, TOKENS, TOKENS, mask_function=MASKS[name], attention_mask=mask)
    assert torch.equal(seen(ours, TOKENS, TOKENS), expected[:, 0])


@given(
    queries=st.integers(0, 6),
    past=st.integers(0, 5),
    more=st.integers(0, 4),
    offset=st.integers(0, 3),
    window=st.integers(1, 8),
)
def test_spans_follow_caches(queries: int, past: int, more: int, offset: int, window: int) -> None:
    """Queries after a past, keys that are still empty (static caches) or dropped already (sliding ones)."""
    keys = max(past + queries + more - offset, 1)
    for function in (causal_mask_function, sliding_window_causal_mask_function(window)):
        arguments = {"q_offset": past, "kv_offset": offset, "mask_function": function}
        real = torch.arange(keys + offset).expand(BATCH, -1) >= torch.tensor([[0], [2]])
        expected = sdpa_mask(
            BATCH, queries, keys, attention_mask=real, allow_is_causal_skip=False, **arguments
        )
        ours = spans_mask(BATCH, queries, keys, attention_mask=real, **arguments)
        assert torch.equal(seen(ours, queries, keys), expected[:, 0])


@given(data=st.data(), queries=st.integers(0, 5), keys=st.integers(1, 9))
def test_dense_masks_are_taken_exactly_or_refused(data: st.DataObject, queries: int, keys: int) -> None:
    rows = data.draw(
        st.lists(st.lists(st.booleans(), min_size=keys, max_size=keys), min_size=queries, max_size=queries)
    )
    mask = torch.tensor(rows, dtype=torch.bool).view(1, 1, queries, keys)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    try:
        spans = dense_spans(mask)
    except ValueError:
        with pytest.raises(ValueError, match="two key ranges"):
            dense_spans(additive)
        # at least one row must have had more than one run
        runs = torch.nn.functional.pad(mask[0, 0].int(), (1, 0)).diff(dim=-1).clamp(min=0).sum(-1)
        assert (runs > 1).any()
        return
    assert torch.equal(spans.dense().any(1), mask[:, 0])
    assert torch.equal(dense_spans(additive).dense().any(1), mask[:, 0])


def test_masks_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(ValueError, match="2 masks for the heads"):
        dense_spans(torch.ones(1, 2, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="adds a bias"):
        dense_spans(torch.randn(1, 1, 3, 3))
    with pytest.raises(ValueError, match="expected bool, or floating"):
        dense_spans(torch.ones(1, 1, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="two key ranges"):
        spans_mask(1, 6, 6, mask_function=lambda b, h, q, k: (k + q) % 2 == 0)


def test_packed_spans_come_back_and_cut_ones_are_refused() -> None:
    spans = dense_spans(torch.ones(2, 1, 4, 7, dtype=torch.bool).tril())
    packed = pack_spans(spans.bounds, spans.key_class)
    assert packed.dtype == torch.int32
    assert packed.dim() == 4
    back = unpack_spans(packed, 4, 7)
    assert torch.equal(back.bounds, spans.bounds)
    assert torch.equal(back.key_class, spans.key_class)
    with pytest.raises(ValueError, match="the model cut or changed the mask"):
        unpack_spans(packed[:, :, :, :1], 4, 7)


@pytest.mark.parametrize("window", [None, 3])
def test_a_mask_knows_its_spans_until_it_is_written_to_or_copied(window: int | None) -> None:
    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    real = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    mask = spans_mask(2, 4, 6, 2, mask_function=rule, attention_mask=real)
    kept = kept_spans(mask, (4, 6, None))
    packed = unpack_spans(mask, 4, 6)
    assert kept is not None
    assert torch.equal(kept.bounds, packed.bounds)
    assert torch.equal(kept.key_class, packed.key_class)
    assert kept.range_classes == packed.range_classes
    for other in ((3, 6, None), (4, 5, None), (4, 6, "pyvlm_mmca")):
        assert kept_spans(mask, other) is None
    assert kept_spans(mask.clone(), (4, 6, None)) is None
    mask[:, :, 0] = 0
    assert kept_spans(mask, (4, 6, None)) is None

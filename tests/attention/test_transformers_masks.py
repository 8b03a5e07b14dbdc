"""The spans of the rules against the masks that transformers' own code makes, over random batches.

A batch has padding on either side, text and images; its rows are asked for at once, as a later chunk of the
prefill against a cache, or as one decoded token. Only the rows of real tokens are compared: in transformers
padding removes keys only and a padding query sees what a real one would, while here it sees nothing.

Shapes: B rows, L tokens a row, Q queries, K keys.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyvlm.layout import IMAGE, PADDING, TEXT, AttentionSpans, TokenLayout

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
from transformers import DynamicCache, Gemma3TextConfig
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
    sliding_window_overlay,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration
from transformers.models.paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Batch:
    kind: Tensor  # uint8 [B, L]
    document: Tensor  # int32 [B, L]; padding belongs to the first or the last document of its row
    prefix: Tensor  # bool [B, L]; the head of every document

    @property
    def is_image(self) -> Tensor:
        return self.kind == IMAGE

    @property
    def is_real(self) -> Tensor:
        return self.kind != PADDING

    def until(self, stop: int) -> "Batch":
        """The tokens that exist once the first `stop` of a row have been given to the model."""
        return Batch(self.kind[:, :stop], self.document[:, :stop], self.prefix[:, :stop])

    def layout(self) -> TokenLayout:
        # Gemma 3 takes neighbouring images for one block, so each run of image tokens is one image here.
        return TokenLayout(self.kind, document=self.document, prefix=self.prefix)


@st.composite
def batches(draw: st.DrawFn, max_documents: int = 1) -> Batch:
    segments = st.lists(st.tuples(st.sampled_from([TEXT, IMAGE]), st.integers(1, 6)), min_size=1, max_size=5)
    columns: list[tuple[list[int], list[int], list[bool]]] = []
    for _ in range(draw(st.integers(1, 2))):
        left = draw(st.integers(0, 4))
        kind, document, prefix = [PADDING] * left, [0] * left, [True] * left
        for number in range(draw(st.integers(1, max_documents))):
            tokens = [k for k, length in draw(segments) for _ in range(length)]
            cut = draw(st.integers(0, len(tokens)))
            kind += tokens
            document += [number] * len(tokens)
            prefix += [i < cut for i in range(len(tokens))]
        columns.append((kind, document, prefix))
    length = max(len(kind) for kind, _, _ in columns) + draw(st.integers(0, 3))
    for kind, document, prefix in columns:
        right = length - len(kind)
        kind += [PADDING] * right
        document += document[-1:] * right
        prefix += [False] * right
    kinds, documents, prefixes = zip(*columns, strict=True)
    return Batch(
        torch.tensor(kinds, dtype=torch.uint8),
        torch.tensor(documents, dtype=torch.int32),
        torch.tensor(prefixes, dtype=torch.bool),
    )


@st.composite
def chunks(draw: st.DrawFn, batch: Batch) -> tuple[int, int]:
    """Cached tokens and tokens seen after this step: a full pass, a chunk of the prefill, or one token."""
    length = batch.kind.shape[1]
    past = draw(st.one_of(st.just(0), st.integers(0, length - 1)), "past")
    stop = draw(st.one_of(st.just(length), st.just(past + 1), st.integers(past + 1, length)), "stop")
    return past, stop


# A sliding cache of transformers keeps w − 1 keys, and where w is 1 all of them instead of none.
windows = st.integers(2, 9)


def text_config(window: int) -> Gemma3TextConfig:
    config = Gemma3TextConfig(
        num_hidden_layers=2,
        layer_types=[SLIDING, FULL],
        sliding_window=window,
        hidden_size=4,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
    )
    config._attn_implementation = "eager"  # its masks are always spelled out
    return config


def arguments(batch: Batch, window: int, past: int, stop: int) -> dict[str, object]:
    """What every maker of masks in transformers takes, for the queries past, …, stop − 1."""
    config = text_config(window)
    rows = len(batch.kind)
    cache = None
    if past:
        cache = DynamicCache(config=config)
        for layer in range(2):
            cache.update(torch.zeros(rows, 1, past, 4), torch.zeros(rows, 1, past, 4), layer)
    return {
        "config": config,
        "inputs_embeds": torch.zeros(rows, stop - past, 4),
        "attention_mask": batch.is_real[:, :stop].long(),
        "past_key_values": cache,
        "position_ids": None,
    }


def assert_same_pairs(
    spans: AttentionSpans, additive_B1QK: Tensor, is_real_BQ: Tensor, forgets: bool = False
) -> None:
    """The same pairs; `forgets`: the original's sliding cache may have dropped keys that are seen here."""
    expected_BQK = additive_B1QK[:, 0] == 0
    ours_BQK = spans.dense().any(1)
    dropped = ours_BQK.shape[2] - expected_BQK.shape[2]  # a sliding cache holds the last keys only
    assert forgets or not ours_BQK[:, :, :dropped].any()
    assert torch.equal(ours_BQK[:, :, dropped:][is_real_BQ], expected_BQK[is_real_BQ])
    assert not ours_BQK[~is_real_BQ].any()


def rows_of(batch: Batch, rule: str, window: int | None, past: int, stop: int) -> AttentionSpans:
    return batch.until(stop).layout().spans(rule, window, query_start=past)


@settings(max_examples=60)
@given(data=st.data(), batch=batches(), window=windows)
def test_causal_and_sliding_masks(data: st.DataObject, batch: Batch, window: int) -> None:
    past, stop = data.draw(chunks(batch))
    given_ = arguments(batch, window, past, stop)
    real = batch.is_real[:, past:stop]
    assert_same_pairs(rows_of(batch, "causal", None, past, stop), create_causal_mask(**given_), real)
    assert_same_pairs(
        rows_of(batch, "causal", window, past, stop), create_sliding_window_causal_mask(**given_), real
    )


@settings(max_examples=60)
@given(data=st.data(), batch=batches(), window=windows)
def test_gemma3_masks(data: st.DataObject, batch: Batch, window: int) -> None:
    past, stop = data.draw(chunks(batch))
    masks = Gemma3ForConditionalGeneration.create_masks_for_generate(
        **arguments(batch, window, past, stop), token_type_ids=batch.is_image.long()
    )
    real = batch.is_real[:, past:stop]
    for name, ours in ((FULL, None), (SLIDING, window)):
        spans = rows_of(batch, "bidirectional_image", ours, past, stop)
        assert_same_pairs(spans, masks[name], real)


@settings(max_examples=60)
@given(data=st.data(), batch=batches(), window=windows)
def test_paligemma_masks(data: st.DataObject, batch: Batch, window: int) -> None:
    past, stop = data.draw(chunks(batch))
    masks = PaliGemmaForConditionalGeneration.create_masks_for_generate(
        **arguments(batch, window, past, stop), token_type_ids=(~batch.prefix).long()
    )
    real = batch.is_real[:, past:stop]
    for name, ours in ((FULL, None), (SLIDING, window)):
        # A prefix sees all of itself whatever the window. Where a chunk ends inside it, a sliding cache there
        # has dropped some of it, and the rows depend on the chunks; here they are those of a full pass.
        spans = rows_of(batch, "prefix", ours, past, stop)
        assert_same_pairs(spans, masks[name], real, forgets=name == SLIDING)


@settings(max_examples=60)
@given(data=st.data(), batch=batches())
def test_molmo2_masks(data: st.DataObject, batch: Batch) -> None:
    reason = "this release of transformers has no Molmo 2"
    molmo2 = pytest.importorskip("transformers.models.molmo2.modeling_molmo2", reason=reason)
    past, stop = data.draw(chunks(batch))
    given_ = arguments(batch, 2, past, stop)
    given_["past_key_values"] = None if past == 0 else DynamicCache()
    if past:
        zeros = torch.zeros(len(batch.kind), 1, past, 4)
        given_["past_key_values"].update(zeros, zeros, 0)
    config = molmo2.Molmo2TextConfig(num_hidden_layers=1)
    config._attn_implementation = "eager"
    mask = molmo2.Molmo2ForConditionalGeneration.create_masks_for_generate(
        **(given_ | {"config": config}), mm_token_type_ids=batch.is_image.long()
    )
    real = batch.is_real[:, past:stop]
    # A step of one token is causal in Molmo 2, since what it generates is text. Here an image token sees the
    # other image tokens in such a step too, and the row is that of the full pass.
    rule = "causal" if stop - past == 1 else "all_images"
    assert_same_pairs(rows_of(batch, rule, None, past, stop), mask, real)


@settings(max_examples=60)
@given(data=st.data(), batch=batches(max_documents=3), window=windows)
def test_packed_documents_found_from_positions(data: st.DataObject, batch: Batch, window: int) -> None:
    # Transformers looks for documents only where it got neither an attention mask nor a cache.
    ends = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in batch.document]
    starts = [[data.draw(st.integers(0, 5)) for _ in row] for row in ends]
    position_ids = torch.stack(
        [
            torch.cat([start + torch.arange(count) for start, count in zip(*row, strict=True)])
            for row in zip(starts, ends, strict=True)
        ]
    )
    given_ = arguments(batch, window, 0, batch.kind.shape[1])
    given_ |= {"attention_mask": None, "position_ids": position_ids}
    layout = TokenLayout.from_input_ids(batch.is_image.long(), image_token_id=1, position_ids=position_ids)
    start, stop = data.draw(chunks(batch))
    for ours, mask in (
        (None, create_causal_mask(**given_)),
        (window, create_sliding_window_causal_mask(**given_)),
    ):
        everything = torch.ones_like(batch.is_real)
        assert_same_pairs(layout.spans("causal", ours), mask, everything)
        spans = layout.spans("causal", ours, query_start=start, num_queries=stop - start)
        assert_same_pairs(spans, mask[:, :, start:stop], everything[:, start:stop])


@settings(max_examples=60)
@given(data=st.data(), batch=batches(max_documents=3), window=windows)
def test_everything_at_once(data: st.DataObject, batch: Batch, window: int) -> None:
    """Documents, padding, images, windows and caches, put together from transformers' mask functions.

    A function given as `or_mask_function` joins before one given as `and_mask_function` cuts, and a block
    of `block_sequence_ids` joins last. No model composes a window with one block for all images.
    """
    past, stop = data.draw(chunks(batch))
    given_ = arguments(batch, window, past, stop)
    in_document = packed_sequence_mask_function(batch.document)
    image = torch.where(batch.is_image, batch.layout().image, -1)
    prefix = torch.where(batch.prefix, batch.document, -1)
    one_block = torch.where(batch.is_image, 0, -1)
    near = sliding_window_overlay(window)
    sliding = given_ | {"layer_idx": 0}
    expected = {
        ("causal", None): create_causal_mask(**given_, and_mask_function=in_document),
        ("causal", window): create_sliding_window_causal_mask(**given_, and_mask_function=in_document),
        ("bidirectional_image", None): create_causal_mask(
            **given_, or_mask_function=blockwise_overlay(image), and_mask_function=in_document
        ),
        ("bidirectional_image", window): create_causal_mask(
            **sliding,
            or_mask_function=blockwise_overlay(image),
            and_mask_function=and_masks(near, in_document),
        ),
        ("prefix", None): create_causal_mask(
            **given_, and_mask_function=in_document, block_sequence_ids=prefix
        ),
        ("prefix", window): create_sliding_window_causal_mask(
            **given_, and_mask_function=in_document, block_sequence_ids=prefix
        ),
        ("all_images", None): create_causal_mask(
            **given_, or_mask_function=blockwise_overlay(one_block), and_mask_function=in_document
        ),
    }
    if past == 0:  # an encoder keeps no cache
        given_["past_key_values"] = None
        del given_["position_ids"]
        mask = create_bidirectional_mask(**given_, and_mask_function=in_document)
        expected["bidirectional", None] = mask
    for (rule, ours), mask in expected.items():
        spans = rows_of(batch, rule, ours, past, stop)
        assert_same_pairs(spans, mask, batch.is_real[:, past:stop], forgets=rule == "prefix")


def test_neighbouring_images_are_one_block_in_gemma3_and_two_images_here() -> None:
    is_image = torch.tensor([[0, 1, 1, 1, 1, 1, 0]])
    layout = TokenLayout(
        torch.where(is_image == 1, IMAGE, TEXT).to(torch.uint8),
        image=torch.tensor([[-1, 0, 0, 1, 1, 1, -1]], dtype=torch.int32),
    )
    batch = Batch(layout.kind, layout.document, torch.zeros(1, 7, dtype=torch.bool))
    mask = Gemma3ForConditionalGeneration.create_masks_for_generate(
        **arguments(batch, 9, 0, 7), token_type_ids=is_image
    )[FULL]
    theirs, ours = mask[0, 0] == 0, layout.spans("bidirectional_image").dense()[0, 0]
    only_theirs = torch.zeros(7, 7, dtype=torch.bool)
    only_theirs[1:3, 3:6] = True  # the first image sees the second
    assert torch.equal(theirs & ~ours, only_theirs)
    assert not (ours & ~theirs).any()
    assert_same_pairs(batch.layout().spans("bidirectional_image"), mask, batch.is_real)


@settings(max_examples=40)
@given(
    grids=st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3
    ),
    merge=st.integers(1, 2),
    side=st.integers(1, 4),
)
def test_qwen2_5_vl_windows(grids: list[tuple[int, int, int]], merge: int, side: int) -> None:
    """Packed windows are documents: two patches see each other where they are of one frame and one window.

    The model attends within the segments of `cu_seqlens`, once its patches lie in the order of its windows.
    """
    grid_thw = torch.tensor([(t, h * merge, w * merge) for t, h, w in grids])
    patch = 14
    window_index, cu_windows = get_vision_window_index(grid_thw, merge, side * merge * patch, patch)

    frame, window = [], []  # of every merge unit, in the order before the windows
    frames = 0
    for t, h, w in grids:
        for _ in range(t):
            frame += [frames] * (h * w)
            window += [(frames, y // side, x // side) for y in range(h) for x in range(w)]
            frames += 1
    number = {cell: n for n, cell in enumerate(dict.fromkeys(window))}
    windows = torch.tensor([number[cell] for cell in window])[window_index]
    units = merge * merge  # patches of a merge unit lie together
    for offsets, segment in (
        (cu_windows, windows),
        (get_vision_cu_seqlens(grid_thw), torch.tensor(frame)),
    ):
        sizes = offsets.diff()
        document = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(sizes)[None]
        layout = TokenLayout(torch.full_like(document, IMAGE, dtype=torch.uint8), document=document)
        segment = segment.repeat_interleave(units)
        expected = segment[:, None] == segment[None, :]
        assert torch.equal(layout.spans("bidirectional").dense()[0, 0], expected)

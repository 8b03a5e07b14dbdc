"""Layouts, spans and the op against the outputs of the code that the models' authors published."""

from collections.abc import Iterator

import conformance
import pytest
import torch
from conformance import Case
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.layout import IMAGE, PADDING, TEXT, AttentionSpans, TokenLayout
from pyvlm.ops.attention import span_attention

# kind in the file -> rule; every kind has a mask for global layers and most have one for window layers.
RULES = {
    "gemma3": "bidirectional_image",
    "gemma3_cached_chunk": "bidirectional_image",
    "paligemma_prefix_lm": "prefix",
    "molmo2_all_images_one_block": "all_images",
    "packed_documents": "causal",
}


def outputs(case: Case, spans: AttentionSpans, backend: str, suffix: str = "") -> dict[str, Tensor]:
    """out and the gradients of q, k, v for the stored cotangent, named as in the file."""
    inputs = {name: case[f"input.{name}"].detach().requires_grad_() for name in "qkv"}
    heads_first = {name: x if x.dim() == 4 else x.transpose(0, 1)[None] for name, x in inputs.items()}
    out = span_attention(**heads_first, spans=spans, backend=backend)
    if inputs["q"].dim() == 3:  # [patches, heads, head_dim]
        out = out[0].transpose(0, 1)
    grads = torch.autograd.grad(out, list(inputs.values()), case[f"cotangent.out{suffix}"])
    named = {f"grad.{name}{suffix}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {f"output.out{suffix}": out.detach(), **named}


def assert_outputs_conform(
    case: Case, spans: AttentionSpans, backend: str, suffix: str = "", rows: Tensor | None = None
) -> None:
    """Output on the given rows [B, Q]; gradients in whole, since the cotangent of the other rows is zero."""
    for name, actual in outputs(case, spans, backend, suffix).items():
        expected = case[name]
        if name.startswith("output") and rows is not None:
            actual, expected = (x.transpose(1, 2)[rows] for x in (actual, expected))
        assert_conforms(actual, expected, name, gradient=name.startswith("grad"))


@pytest.mark.parametrize("case", conformance.cases("attention/mmca_released"))
def test_mmca_released(case: Case, backend: str) -> None:
    class_ids = case["input.class_ids"]
    assert {PADDING, TEXT, IMAGE} >= set(class_ids.unique().tolist())  # the file numbers the classes as we do
    layout = TokenLayout(class_ids.to(torch.uint8))
    spans = layout.spans("mmca_released", query_start=case.settings["past_len"])
    rows = case["valid_rows"]
    text, image = spans.dense().unbind(1)
    assert torch.equal(text[rows], case["output.mask_text"][rows])
    assert torch.equal(image[rows], case["output.mask_image"][rows])
    assert_outputs_conform(case, spans, backend, rows=rows)


def transformers_layout(case: Case) -> TokenLayout:
    if case.settings["kind"] == "packed_documents":
        positions = case["input.position_ids"]
        return TokenLayout.from_input_ids(torch.ones_like(positions), 9, position_ids=positions)
    if case.settings["kind"] == "molmo2_all_images_one_block":
        return TokenLayout.from_input_ids(case["input.mm_token_type_ids"], image_token_id=1)
    types = case["input.token_type_ids"]
    mask = case.tensors.get("input.attention_mask")
    if case.settings["kind"] != "paligemma_prefix_lm":
        return TokenLayout.from_input_ids(types, image_token_id=1, attention_mask=mask)
    layout = TokenLayout.from_input_ids(types, image_token_id=9, attention_mask=mask)
    return TokenLayout(layout.kind, prefix=types == 0)


def without_padding(layout: TokenLayout) -> TokenLayout:
    kind = torch.where(layout.kind == PADDING, TEXT, layout.kind)
    return TokenLayout(kind, layout.image, layout.document, layout.prefix)


def transformers_spans(case: Case) -> Iterator[tuple[str, AttentionSpans, AttentionSpans]]:
    """For each mask of the case, its suffix, our spans, and the spans in which padding queries see keys.

    In transformers padding removes keys only, and the stored gradients hold the rows of padding queries.
    """
    kind = case.settings["kind"]
    layout = transformers_layout(case)
    windows = {".full": None, ".sliding": case.settings.get("sliding_window")}
    if kind == "molmo2_all_images_one_block":
        windows = {"": None}
    for suffix, window in windows.items():
        arguments = (RULES[kind], window, case.settings.get("past_len", 0))
        all_queries_see = without_padding(layout).spans(*arguments)
        yield (
            suffix,
            layout.spans(*arguments),
            AttentionSpans(all_queries_see.bounds, layout.kind, all_queries_see.range_classes, False),
        )


@pytest.mark.parametrize(
    "case", conformance.cases("attention/transformers_masks", lambda settings: settings["kind"] in RULES)
)
def test_transformers_masks(case: Case, backend: str) -> None:
    for suffix, spans, all_queries_see in transformers_spans(case):
        stored = case[f"output.mask{suffix}"]
        rows = case[f"valid_rows{suffix}"]
        real = spans.key_class[:, -stored.shape[1] :] != PADDING
        # A sliding cache keeps only the last keys; what it dropped must be what nobody sees.
        dropped = spans.key_class.shape[1] - stored.shape[2]
        for ours, queries in ((spans, real & rows), (all_queries_see, rows)):
            dense = ours.dense().any(1)
            assert torch.equal(dense[..., dropped:][queries], stored[queries]), suffix
            assert not dense[..., :dropped].any(), suffix
        assert_outputs_conform(case, all_queries_see, backend, suffix, rows)


@pytest.mark.parametrize(
    "case", conformance.cases("attention/transformers_masks", lambda settings: settings["kind"] not in RULES)
)
def test_qwen2_5_vl_packed_windows(case: Case, backend: str) -> None:
    assert case.settings["kind"] == "qwen2_5_vl_vit"
    patches = len(case["input.q"])
    for suffix, offsets in ((".full", "output.cu_seqlens"), (".window", "output.cu_window_seqlens")):
        sizes = case[offsets].diff()
        document = torch.repeat_interleave(torch.arange(len(sizes)), sizes).int()[None]
        kind = torch.full((1, patches), IMAGE, dtype=torch.uint8)
        spans = TokenLayout(kind, document=document).spans("bidirectional")
        assert torch.equal(spans.dense()[0, 0], case[f"output.mask{suffix}"])
        assert_outputs_conform(case, spans, backend, suffix)

"""The spans of every rule against a predicate a pair, written from the table of rules with plain loops."""

import pytest
import torch
from attention.random_layouts import Token, layout_of, rows, windows
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvlm.layout import IMAGE, PADDING, RULES, TEXT, AttentionSpans, TokenLayout


def sees(rule: str, window: int | None, row: list[Token], i: int, j: int) -> list[bool]:
    """Whether query i sees key j, in each of the rule's softmaxes."""
    query, key = row[i], row[j]
    separate = rule.startswith("mmca")
    if PADDING in (query.kind, key.kind) or query.document != key.document:
        return [False] * (2 if separate else 1)
    causal = j <= i
    near = window is None or j > i - window
    both_images = query.kind == key.kind == IMAGE
    same_image = both_images and query.image == key.image
    if separate:
        sees_text = sees_image = causal and near
        if query.kind == IMAGE:
            sees_text = sees_text and rule == "mmca_released"
            sees_image = same_image and near if rule == "mmca_image" else i == j
        return [key.kind == TEXT and sees_text, key.kind == IMAGE and sees_image]
    return [
        {
            "causal": causal and near,
            "bidirectional_image": (causal or same_image) and near,
            "prefix": (causal and near) or (query.prefix and key.prefix),
            "all_images": (causal or both_images) and near,
            "bidirectional": near,
        }[rule]
    ]


def masks(spans: AttentionSpans) -> torch.Tensor:
    """bool [B, softmaxes, Q, K]."""
    return spans.dense() if spans.separate else spans.dense().any(1, keepdim=True)


@settings(max_examples=100)
@given(rows=rows(), window=windows, data=st.data())
def test_every_rule_sees_what_its_predicate_says(
    rows: list[list[Token]], window: int | None, data: st.DataObject
) -> None:
    layout = layout_of(rows)
    length = layout.length
    start = data.draw(st.integers(0, length), "query_start")
    count = data.draw(st.integers(0, length - start), "num_queries")
    for rule in RULES:
        spans = layout.spans(rule, window)
        expected = torch.tensor(
            [[[sees(rule, window, row, i, j) for j in range(length)] for i in range(length)] for row in rows]
        ).reshape(len(rows), length, length, 2 if spans.separate else 1)
        assert torch.equal(masks(spans), expected.movedim(-1, 1)), rule

        padding = layout.kind == PADDING
        assert (spans.bounds[padding] == 0).all(), rule
        if not spans.separate:
            assert (spans.dense().sum(1) <= 1).all(), f"{rule}: ranges overlap"

        chunk = layout.spans(rule, window, query_start=start, num_queries=count)
        assert torch.equal(chunk.bounds, spans.bounds[:, start : start + count]), rule
        assert torch.equal(chunk.key_class, spans.key_class), rule


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("batch", "length"), [(0, 5), (2, 0), (1, 1)], ids=["no rows", "no tokens", "one token"]
)
def test_tiny_layouts(rule: str, batch: int, length: int) -> None:
    kind = torch.full((batch, length), TEXT, dtype=torch.uint8)
    spans = TokenLayout(kind, prefix=torch.zeros(batch, length, dtype=torch.bool)).spans(rule, window=2)
    ranges = 2 if rule.startswith("mmca") or rule == "all_images" else 1
    assert spans.bounds.shape == (batch, length, ranges, 2)
    assert masks(spans).sum() == batch * length


@pytest.mark.parametrize("rule", RULES)
def test_no_value_is_read_back(rule: str) -> None:
    # Meta tensors have no values: whatever reads one raises.
    kind = torch.ones(2, 11, dtype=torch.uint8, device="meta")
    layout = TokenLayout(kind, prefix=torch.zeros(2, 11, dtype=torch.bool, device="meta"))
    spans = layout.spans(rule, window=4, query_start=3, num_queries=5)
    assert spans.bounds.device.type == "meta"
    assert spans.bounds.shape[:2] == (2, 5)


@pytest.mark.parametrize("rule", RULES)
def test_layout_and_spans_compile_in_one_graph(rule: str) -> None:
    kind = torch.tensor([[0, 1, 2, 2, 1, 2, 1], [2, 2, 2, 1, 1, 0, 0]], dtype=torch.uint8)
    document = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    prefix = torch.zeros(2, 7, dtype=torch.bool)

    def bounds(kind: torch.Tensor, document: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        return TokenLayout(kind, None, document, prefix).spans(rule, window=3, query_start=1).bounds

    compiled = torch.compile(bounds, fullgraph=True, backend="eager")
    assert torch.equal(compiled(kind, document, prefix), bounds(kind, document, prefix))


def test_to_moves_every_tensor() -> None:
    layout = TokenLayout(torch.ones(1, 3, dtype=torch.uint8), prefix=torch.zeros(1, 3, dtype=torch.bool))
    moved = layout.to("meta")
    assert {x.device.type for x in (moved.kind, moved.image, moved.document, moved.prefix)} == {"meta"}
    spans = layout.spans("mmca").to("meta")
    assert {spans.bounds.device.type, spans.key_class.device.type} == {"meta"}
    assert spans.range_classes == (2, 4)
    assert spans.separate


@pytest.mark.parametrize("rule", RULES)
def test_the_default_device_is_not_the_tensors(rule: str) -> None:
    """As where a model is made under `torch.device`, or after `torch.set_default_device`."""
    kind = torch.tensor([[1, 2, 2, 1, 2]], dtype=torch.uint8)
    image = torch.tensor([[-1, 0, 0, -1, 1]], dtype=torch.int32)
    prefix = torch.tensor([[True, True, True, False, False]])
    expected = TokenLayout(kind, image, prefix=prefix).spans(rule, window=3)
    with torch.device("meta"):
        spans = TokenLayout(kind, image, prefix=prefix).spans(rule, window=3)
    assert torch.equal(spans.bounds, expected.bounds)


def test_joint_ranges_are_a_union_of_sets() -> None:
    bounds = torch.tensor([[[[0, 3], [1, 4]]]], dtype=torch.int32)
    spans = AttentionSpans(bounds, torch.tensor([[1, 2, 1, 0]], dtype=torch.uint8), (0b010, 0b110), False)
    assert spans.dense().tolist() == [[[[True, False, True, False]], [[False, True, True, False]]]]


IDS = torch.tensor([[5, 9, 9, 5, 9, 5, 5], [9, 5, 5, 9, 9, 9, 5]])


class TestFromInputIds:
    def test_runs_of_the_image_token_are_images(self) -> None:
        layout = TokenLayout.from_input_ids(IDS, image_token_id=9)
        assert layout.kind.tolist() == [[1, 2, 2, 1, 2, 1, 1], [2, 1, 1, 2, 2, 2, 1]]
        assert layout.image.tolist() == [[-1, 0, 0, -1, 1, -1, -1], [0, -1, -1, 1, 1, 1, -1]]
        assert layout.document.unique().tolist() == [0]
        assert layout.prefix is None

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8], ids=str)
    def test_attention_mask_marks_padding_on_either_side(self, dtype: torch.dtype) -> None:
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).to(dtype)
        layout = TokenLayout.from_input_ids(IDS, 9, mask)
        assert layout.kind.tolist() == [[0, 0, 2, 1, 2, 1, 1], [2, 1, 1, 2, 2, 0, 0]]
        assert layout.image.tolist() == [[-1, -1, 0, -1, 1, -1, -1], [0, -1, -1, 1, 1, -1, -1]]

    def test_any_step_but_one_starts_a_document(self) -> None:
        positions = torch.tensor([[0, 1, 0, 1, 2, 3, 0], [4, 5, 6, 6, 7, 9, 8]])
        layout = TokenLayout.from_input_ids(IDS, 9, position_ids=positions)
        assert layout.document.tolist() == [[0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 1, 1, 2, 3]]
        # a document ends an image
        assert layout.image.tolist() == [[-1, 0, 1, -1, 2, -1, -1], [0, -1, -1, 1, 1, 2, -1]]

    def test_one_row_of_positions_serves_all_rows(self) -> None:
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
        layout = TokenLayout.from_input_ids(IDS, 9, position_ids=positions)
        assert layout.document.tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 2

    def test_positions_counted_by_an_attention_mask_are_one_document(self) -> None:
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        layout = TokenLayout.from_input_ids(IDS, 9, mask, positions)
        for kind, document in zip(layout.kind, layout.document, strict=True):
            assert len(document[kind != PADDING].unique()) == 1

"""`AttentionSpans.visible_pairs` against the dense mask: of the rules, of every case, and by hand."""

import pytest
import torch
from attention.cases import SMALL_CASES, AttentionCase

from pyvlm.layout import RULES, TokenLayout
from pyvlm.spans import AttentionSpans


def assert_counted(spans: AttentionSpans) -> None:
    """Of separate streams each has its own pairs; where ranges of a union overlap, a pair counts once."""
    seen = spans.dense() if spans.separate else spans.dense().any(1)
    assert spans.visible_pairs() == seen.sum()


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_of_the_cases(case: AttentionCase) -> None:
    assert_counted(case.spans())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("window", [None, 3])
def test_of_the_rules(rule: str, window: int | None) -> None:
    kind = torch.tensor([[1, 2, 2, 1, 1, 2, 2, 2, 1, 1], [0, 0, 1, 1, 2, 2, 1, 1, 2, 1]], dtype=torch.uint8)
    document = torch.tensor([[0] * 5 + [1] * 5, [0] * 10], dtype=torch.int32)
    first = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    assert_counted(TokenLayout(kind, document=document, prefix=first).spans(rule, window))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("classes", [(2, 4), (6, 6), (6, 2)])
def test_ranges_that_overlap_or_lie_apart(classes: tuple[int, int], separate: bool) -> None:
    bounds = torch.tensor([[[[0, 4], [2, 6]], [[5, 6], [0, 1]], [[3, 3], [1, 5]]]], dtype=torch.int32)
    key_class = torch.tensor([[1, 2, 1, 2, 0, 1]], dtype=torch.uint8)
    assert_counted(AttentionSpans(bounds, key_class, classes, separate))


def test_without_tokens() -> None:
    bounds, classes = torch.zeros(1, 0, 2, 2, dtype=torch.int32), torch.zeros(1, 0, dtype=torch.uint8)
    assert AttentionSpans(bounds, classes, (2, 4), separate=False).visible_pairs() == 0

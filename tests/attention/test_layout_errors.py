"""Bad layouts and spans: one clear error that names what was given and what was expected."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyvlm.layout import AttentionSpans, TokenLayout

IDS = torch.tensor([[5, 9, 9, 5], [5, 5, 5, 5]])


def kind(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def int32(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def flags(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def expect(error: type[Exception], message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"kind must be a tensor of torch\.uint8, got torch\.int64", {"kind": IDS}),
        (TypeError, r"kind must be a tensor of torch\.uint8, got list", {"kind": [[1, 2]]}),
        (ValueError, r"kind must be \[batch, length\], got \[3\]", {"kind": kind([1, 1, 1])[0]}),
        (
            ValueError,
            r"kind\[1, 2\] is 8: classes run from 0 \(padding\) to 7",
            {"kind": kind([1, 1, 7], [1, 1, 8])},
        ),
        (
            TypeError,
            r"image must be a tensor of torch\.int32, got torch\.int64",
            {"kind": kind([1, 2]), "image": torch.tensor([[-1, 0]])},
        ),
        (
            ValueError,
            r"image must be \[batch, length\] = \[1, 2\], got \[1, 3\]",
            {"kind": kind([1, 2]), "image": int32([-1, 0, -1])},
        ),
        (
            ValueError,
            r"document is on meta and the rest of the batch on cpu",
            {"kind": kind([1, 2]), "document": int32([0, 0]).to("meta")},
        ),
        (
            TypeError,
            r"prefix must be a tensor of torch\.bool",
            {"kind": kind([1, 2]), "prefix": int32([1, 0])},
        ),
        (
            ValueError,
            r"token \[0, 1\] has kind 2 and image index -1",
            {"kind": kind([1, 2]), "image": int32([-1, -1])},
        ),
        (
            ValueError,
            r"token \[0, 0\] has kind 1 and image index 3",
            {"kind": kind([1, 2]), "image": int32([3, 0])},
        ),
        (
            ValueError,
            r"image 5 of row 1 lies in more than one piece",
            {"kind": kind([2, 1, 2], [2, 1, 2]), "image": int32([0, -1, 1], [5, -1, 5])},
        ),
        (
            ValueError,
            r"token \[0, 3\] is in the prefix and token \[0, 2\] before it is not",
            {"kind": kind([0, 1, 1, 1]), "prefix": flags([0, 1, 0, 1])},
        ),
    ],
)
def test_bad_layouts(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    expect(error, message, lambda: TokenLayout(**arguments))


def test_a_prefix_starts_anew_in_each_document_and_may_follow_padding() -> None:
    layout = TokenLayout(
        kind([0, 1, 1, 1, 1]), document=int32([0, 0, 0, 1, 1]), prefix=flags([0, 1, 0, 1, 0])
    )
    assert layout.spans("prefix").bounds[0, :, 0].tolist() == [[0, 0], [0, 2], [0, 3], [3, 4], [3, 5]]


def test_an_index_may_be_used_again_in_another_document() -> None:
    layout = TokenLayout(kind([2, 1, 2]), int32([0, -1, 0]), int32([0, 0, 1]))
    assert layout.spans("mmca_image").bounds[0, 2].tolist() == [[3, 3], [2, 3]]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "input_ids must be an integer tensor, got torch.float32", {"input_ids": IDS.float()}),
        (TypeError, "input_ids must be an integer tensor, got list", {"input_ids": [[1, 2]]}),
        (ValueError, r"input_ids must be \[batch, length\], got \[4\]", {"input_ids": IDS[0]}),
        (TypeError, "image_token_id must be an int, got None", {"image_token_id": None}),
        (TypeError, "image_token_id must be an int, got 9.0", {"image_token_id": 9.0}),
        (
            ValueError,
            r"attention_mask must be \[batch, length\] = \[2, 4\], got \[2, 1, 4, 4\]",
            {"attention_mask": torch.ones(2, 1, 4, 4)},
        ),
        (TypeError, "attention_mask must be a tensor, got list", {"attention_mask": [[1, 1, 1, 1]] * 2}),
        (
            ValueError,
            r"attention_mask\[1, 0\] is nan: expected 1 for a token and 0 for padding",
            {"attention_mask": torch.tensor([[1.0] * 4, [torch.nan, 1.0, 1.0, 1.0]])},
        ),
        (
            ValueError,
            r"attention_mask\[0, 0\] is -inf: .*not an additive mask",
            {"attention_mask": torch.full((2, 4), -torch.inf)},
        ),
        (ValueError, r"attention_mask\[0, 1\] is 2", {"attention_mask": torch.tensor([[1, 2, 1, 1]] * 2)}),
        (ValueError, "attention_mask is on meta", {"attention_mask": torch.ones(2, 4, device="meta")}),
        (
            ValueError,
            r"position_ids must be \[batch, length\] = \[2, 4\], got \[3, 2, 4\]",
            {"position_ids": torch.arange(4).expand(3, 2, 4)},
        ),
        (
            ValueError,
            r"position_ids must be \[batch, length\] = \[2, 4\], got \[2, 3\]",
            {"position_ids": torch.arange(3).expand(1, 3)},
        ),
        (
            TypeError,
            "position_ids must be an integer tensor, got torch.float32",
            {"position_ids": torch.full((2, 4), torch.nan)},
        ),
    ],
)
def test_bad_input_ids(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    expect(
        error,
        message,
        lambda: TokenLayout.from_input_ids(**{"input_ids": IDS, "image_token_id": 9, **arguments}),
    )


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "rule='flash' is unknown; expected one of 'causal', 'mmca'", {"rule": "flash"}),
        (ValueError, "rule=None is unknown", {"rule": None}),
        (ValueError, r'rule="prefix" needs a layout with a prefix', {"rule": "prefix"}),
        (ValueError, "window=0: .* at least 1", {"window": 0}),
        (TypeError, "window must be an int, got nan", {"window": float("nan")}),
        (TypeError, "window must be an int, got True", {"window": True}),
        (TypeError, "query_start must be an int, got nan", {"query_start": float("nan")}),
        (TypeError, "num_queries must be an int, got 2.0", {"num_queries": 2.0}),
        (ValueError, "query_start=-1, .* within the 4 tokens", {"query_start": -1}),
        (ValueError, "query_start=5, num_queries=None", {"query_start": 5}),
        (ValueError, "query_start=2, num_queries=3", {"query_start": 2, "num_queries": 3}),
        (ValueError, "query_start=2, num_queries=-1", {"query_start": 2, "num_queries": -1}),
    ],
)
def test_bad_rules(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    layout = TokenLayout.from_input_ids(IDS, 9)
    expect(error, message, lambda: layout.spans(**{"rule": "causal", **arguments}))


BOUNDS = torch.tensor([[[[0, 3]], [[1, 2]]]], dtype=torch.int32)
SPANS = {"bounds": BOUNDS, "key_class": kind([1, 1, 2]), "range_classes": (6,), "separate": False}


def with_range(lo: int, hi: int) -> torch.Tensor:
    bounds = BOUNDS.clone()
    bounds[0, 1, 0] = torch.tensor([lo, hi])
    return bounds


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"bounds must be a tensor of torch\.int32, got torch\.int64", {"bounds": BOUNDS.long()}),
        (TypeError, r"bounds must be a tensor of torch\.int32, got NoneType", {"bounds": None}),
        (TypeError, r"key_class must be a tensor of torch\.uint8", {"key_class": IDS}),
        (
            ValueError,
            r"bounds must be \[batch, queries, 1 or 2 ranges, 2\], got \[2, 1, 2\]",
            {"bounds": BOUNDS[0]},
        ),
        (ValueError, r"bounds must be .*, got \[1, 2, 3, 2\]", {"bounds": BOUNDS.repeat(1, 1, 3, 1)}),
        (ValueError, r"bounds must be .*, got \[1, 2, 0, 2\]", {"bounds": BOUNDS[:, :, :0]}),
        (ValueError, r"bounds must be .*, got \[1, 2, 1, 1\]", {"bounds": BOUNDS[..., :1]}),
        (
            ValueError,
            r"key_class must be \[batch, keys\] .*, got \[2, 3\]",
            {"key_class": kind([1, 1, 2], [1, 1, 2])},
        ),
        (ValueError, r"key_class must be \[batch, keys\] .*, got \[3\]", {"key_class": kind([1, 1, 2])[0]}),
        (ValueError, "key_class is on meta and bounds on cpu", {"key_class": kind([1, 1, 2]).to("meta")}),
        (ValueError, "range_classes holds 2 bitmasks for 1 ranges", {"range_classes": (2, 4)}),
        (ValueError, r"range_classes=\(7,\): each must be", {"range_classes": (7,)}),
        (ValueError, r"range_classes=\(256,\): each must be", {"range_classes": (256,)}),
        (ValueError, r"range_classes=\(-2,\): each must be", {"range_classes": (-2,)}),
        (ValueError, r"range_classes=\(2\.0,\): each must be", {"range_classes": (2.0,)}),
        (ValueError, r"key_class\[0, 1\] is 8: classes run from 0", {"key_class": kind([1, 8, 9])}),
        (ValueError, r"bounds\[0, 1, 0\] is the range \[1, 4\), .* the 3 keys", {"bounds": with_range(1, 4)}),
        (ValueError, r"bounds\[0, 1, 0\] is the range \[-1, 2\)", {"bounds": with_range(-1, 2)}),
        (ValueError, r"bounds\[0, 1, 0\] is the range \[2, 1\)", {"bounds": with_range(2, 1)}),
    ],
)
def test_bad_spans(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    expect(error, message, lambda: AttentionSpans(**{**SPANS, **arguments}))

"""Bad calls of the op: one clear error that names what was given and expected, from every backend."""

from typing import Any

import pytest
import torch
from attention.random_inputs import random_qkv, random_spans

from pyvlm.ops.attention import span_attention


def call(backend: str = "auto", **changed: Any) -> torch.Tensor:
    """A good call (2 rows, 4 heads on 2, 3 queries, 5 keys, 8 dimensions) with some arguments changed."""
    q, k, v = random_qkv(2, 4, 2, 3, 5, 8)
    arguments = {"q": q, "k": k, "v": v, "spans": random_spans(2, 3, 5)}
    return span_attention(**{**arguments, **changed}, backend=backend)


def test_the_unchanged_call_is_good(backend: str) -> None:
    assert call(backend).shape == (2, 4, 3, 8)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, r"3, 4 and 4 dimensions; expected 4", {"q": torch.zeros(4, 3, 8)}),
        (ValueError, r"v \[2, 2, 6, 8\]; expected k and v \[2, G, keys, 8\]", {"v": torch.zeros(2, 2, 6, 8)}),
        (ValueError, r"k \[2, 2, 5, 16\]", {"k": torch.zeros(2, 2, 5, 16), "v": torch.zeros(2, 2, 5, 16)}),
        (ValueError, r"k \[1, 2, 5, 8\]", {"k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8)}),
        (
            ValueError,
            r"q has 4 heads and k, v have 3",
            {"k": torch.zeros(2, 3, 5, 8), "v": torch.zeros(2, 3, 5, 8)},
        ),
        (
            ValueError,
            r"q has 4 heads and k, v have 0",
            {"k": torch.zeros(2, 0, 5, 8), "v": torch.zeros(2, 0, 5, 8)},
        ),
        (
            ValueError,
            r"head_dim is 0",
            {"q": torch.zeros(2, 4, 3, 0), "k": torch.zeros(2, 2, 5, 0), "v": torch.zeros(2, 2, 5, 0)},
        ),
        (
            TypeError,
            r"torch\.float32, torch\.bfloat16 and torch\.float32",
            {"k": torch.zeros(2, 2, 5, 8).bfloat16()},
        ),
        (
            TypeError,
            r"q, k, v are torch\.int64, torch\.int64 and torch\.int64; expected one of",
            {
                "q": torch.ones(2, 4, 3, 8).long(),
                "k": torch.ones(2, 2, 5, 8).long(),
                "v": torch.ones(2, 2, 5, 8).long(),
            },
        ),
        (ValueError, r"lie on meta, cpu, cpu, cpu and cpu", {"q": torch.zeros(2, 4, 3, 8, device="meta")}),
        (
            TypeError,
            r"spans is a Tensor; expected AttentionSpans",
            {"spans": torch.ones(3, 5, dtype=torch.bool)},
        ),
        (TypeError, r"spans is a NoneType", {"spans": None}),
        (ValueError, r"spans are for \[2, 4\] queries .* q has \[2, 3\]", {"spans": random_spans(2, 4, 5)}),
        (ValueError, r"spans are for \[1, 3\] queries .* q has \[2, 3\]", {"spans": random_spans(1, 3, 5)}),
        (ValueError, r"spans are for \[2, 6\] keys .* k, v have \[2, 5\]", {"spans": random_spans(2, 3, 6)}),
        (ValueError, r"scale=nan; expected a finite number", {"scale": float("nan")}),
        (ValueError, r"scale=inf; expected a finite number", {"scale": float("inf")}),
        (ValueError, r"softcap=0; expected a positive number", {"softcap": 0}),
        (ValueError, r"softcap=-2\.0", {"softcap": -2.0}),
        (ValueError, r"softcap=nan", {"softcap": float("nan")}),
        (TypeError, r"sinks is float; expected a floating tensor", {"sinks": 0.5}),
        (TypeError, r"sinks is torch\.int64; expected a floating tensor", {"sinks": torch.ones(4).long()}),
        (ValueError, r"sinks is \[2\]; expected \[4\], one value a query head", {"sinks": torch.ones(2)}),
        (ValueError, r"sinks is \[1, 4\]; expected \[4\]", {"sinks": torch.ones(1, 4)}),
        (ValueError, r"sinks lies on meta and q on cpu", {"sinks": torch.ones(4, device="meta")}),
    ],
)
def test_bad_calls(error: type[Exception], message: str, changed: dict[str, Any], backend: str) -> None:
    with pytest.raises(error, match=message):
        call(backend, **changed)


def test_tensors_that_are_no_tensors(backend: str) -> None:
    with pytest.raises(TypeError, match="q, k, v are list, Tensor, Tensor; expected tensors"):
        call(backend, q=[[1.0]])


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend='fast' is unknown; expected one of 'auto', 'reference'"):
        call("fast")


def test_a_backend_that_is_not_there_says_why() -> None:
    with pytest.raises(RuntimeError, match=r'backend="triton" cannot run on cpu: .*; use backend="auto"'):
        call("triton")


@pytest.mark.parametrize("wrong", ["class", "range"])
def test_spans_changed_after_their_making_do_not_crash_the_kernel(wrong: str) -> None:
    # The values were checked when the spans were made; the kernel indexes by them, and looks again.
    spans = random_spans(2, 3, 5)
    if wrong == "class":
        spans.key_class[1, 4] = 200
    else:
        spans.bounds[1, 2, 0, 1] = 1 << 30
    with pytest.raises((RuntimeError, ValueError), match=wrong):
        call("native", spans=spans)

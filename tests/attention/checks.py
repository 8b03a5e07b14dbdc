"""The check of one implementation of span attention on one set of inputs."""

import torch
from attention.plain import expected_and_plain, results
from tolerance import assert_close
from torch import Tensor

from pyvlm.layout import AttentionSpans
from pyvlm.ops.attention import span_attention


def assert_results_close(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """out, lse, dq, dk, dv (and dsinks) within the policy, for random cotangents of out and lse."""
    out_grad = torch.randn(q.shape).to(q)
    streams = len(spans.range_classes) if spans.separate else 1
    lse_grad = torch.randn(*q.shape[:2], streams, q.shape[2]).to(q.device)
    inputs = (q, k, v, spans, out_grad, lse_grad, scale, softcap, sinks)
    expected, plain = expected_and_plain(*inputs)
    actual = results(span_attention, *inputs, return_lse=True, backend=backend)
    for name, value in actual.items():
        assert value.dtype == expected_dtype(name, q, sinks), name
        if value.dtype == torch.float64 != q.dtype:  # sinks wider than what their gradient was computed from
            value = value.to(q.dtype)
        # The gradient of a score is P·(dP − δ), a difference of sums of products of unit normals.
        cancels = name in ("dq", "dk", "dsinks")
        assert_close(value, expected[name], plain[name], name, terms=1.0 if cancels else 0.0)


def expected_dtype(name: str, q: Tensor, sinks: Tensor | None) -> torch.dtype:
    if name == "lse":
        return torch.promote_types(q.dtype, torch.float32)
    return sinks.dtype if name == "dsinks" and sinks is not None else q.dtype

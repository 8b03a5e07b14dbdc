"""What a call costs before any arithmetic: tiny tensors, and the making of layouts and spans.

Run with `pytest benchmarks --benchmark-enable`; without that option each function runs once, as a test.
"""

import pytest
import torch
import torch.nn.functional as F
from attention.cases import CASES

from pyvlm.layout import RULES, TokenLayout
from pyvlm.ops.attention import span_attention

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def tiny():
    """q, k, v and spans of one token: nothing to compute."""
    case = BY_NAME["one-token"]
    return *case.inputs(torch.float32)[:3], case.spans()


@pytest.mark.benchmark(group="one token, forward")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_span_attention_forward(benchmark, tiny, backend):
    q, k, v, spans = tiny
    out = benchmark(span_attention, q, k, v, spans, backend=backend)
    assert out.shape == q.shape


@pytest.mark.benchmark(group="one token, forward")
def test_sdpa_forward(benchmark, tiny):
    q, k, v, spans = tiny
    mask = spans.dense().any(1, keepdim=True)
    out = benchmark(F.scaled_dot_product_attention, q, k, v, mask)
    assert out.shape == q.shape


@pytest.mark.benchmark(group="one token, forward and backward")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_span_attention_training(benchmark, tiny, backend):
    *inputs, spans = tiny
    leaves = [x.requires_grad_() for x in inputs]
    cotangent = torch.ones_like(leaves[0])

    def call():
        return torch.autograd.grad(span_attention(*leaves, spans, backend=backend), leaves, cotangent)

    assert len(benchmark(call)) == 3


@pytest.mark.benchmark(group="layout of 4,096 tokens")
def test_layout_from_input_ids(benchmark):
    kind = BY_NAME["mmca-4k-d64"].layout().kind
    input_ids = torch.where(kind == 2, 9, 1)
    layout = benchmark(TokenLayout.from_input_ids, input_ids, 9)
    assert torch.equal(layout.kind, kind)


@pytest.mark.benchmark(group="spans of 4,096 tokens")
@pytest.mark.parametrize("rule", RULES)
def test_spans(benchmark, rule):
    layout = BY_NAME["mmca-4k-d64"].layout()
    spans = benchmark(layout.spans, rule)
    assert spans.bounds.shape[:2] == layout.kind.shape

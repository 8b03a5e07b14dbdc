"""What a forward and backward take in memory, as the operating system counts it."""

import sys

import pytest
import torch
from attention.random_inputs import random_qkv

from benchmarks.harness.measure import peak_memory
from pyvlm.layout import IMAGE, TEXT, TokenLayout
from pyvlm.ops.attention import span_attention


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc")
def test_neither_scores_nor_a_dense_mask_are_kept() -> None:
    tokens = 32_768
    position = torch.arange(tokens)
    kind = torch.where(position % 2048 < 576, IMAGE, TEXT).to(torch.uint8)[None]
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 2, tokens, tokens, 16))
    grads = []

    def train() -> None:
        spans = TokenLayout(kind).spans("mmca", window=1024)  # a window, so that it takes a second
        out = span_attention(q, k, v, spans, backend="native")
        grads[:] = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread has a scratch of its own
    try:
        peak = peak_memory(train, torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(grad.isfinite().all() for grad in grads)
    # The scores of one head are 4 GiB in fp32, a dense mask 1 GiB. Measured: 38 to 65 MiB; 24 of them are
    # the output, the share of its first softmax, its cotangent and the three gradients.
    assert peak < 128 * 2**20

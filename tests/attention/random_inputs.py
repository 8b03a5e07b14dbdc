"""Random inputs for span attention, from torch's seeded generator, and their strides."""

import torch
from torch import Tensor

from pyvlm.layout import AttentionSpans


def random_qkv(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit normals: q [batch, heads, queries, head_dim], and k, v [batch, kv_heads, keys, head_dim]."""
    q = torch.randn(batch, heads, queries, head_dim).to(dtype)
    k, v = torch.randn(2, batch, kv_heads, keys, head_dim).to(dtype).unbind()
    return q, k, v


def random_spans(
    batch: int, queries: int, keys: int, ranges: int = 2, separate: bool = True
) -> AttentionSpans:
    """Any spans: ranges empty, full, overlapping, in any order; keys and masks of every class."""
    bounds = torch.randint(0, keys + 1, (batch, queries, ranges, 2), dtype=torch.int32)
    key_class = torch.randint(0, 8, (batch, keys), dtype=torch.uint8)
    masks = torch.randint(0, 128, (ranges,)) * 2  # never bit 0
    return AttentionSpans(bounds.sort(-1).values, key_class, tuple(masks.tolist()), separate)


def permuted(x: Tensor, permutation: tuple[int, ...]) -> Tensor:
    """The same values, lying in memory in the order of `permutation`."""
    return x.permute(permutation).contiguous().permute([permutation.index(d) for d in range(4)])

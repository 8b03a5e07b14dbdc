"""Queries that read image maps, in plain PyTorch: the definition of `pyvlm.ops.cross_attention`.

Shapes: N images · T tokens of a map, row-major · Q queries · E embedding · A attention heads · D head
features. A grid is (rows, columns). Softmax runs in float32 for half-precision inputs.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvlm.reference.fusion import accumulator


def to_windows(x: Tensor, query_grid: tuple[int, int], dim: int = 1) -> Tensor:
    """Cuts axis `dim`, a map r times as fine as `query_grid`, into the axes [Q, r·r]; all are row-major."""
    rows, columns = query_grid
    r = math.isqrt(x.shape[dim] // (rows * columns))
    x = x.unflatten(dim, (rows, r, columns, r)).transpose(dim + 1, dim + 2)
    return x.flatten(dim + 2, dim + 3).flatten(dim, dim + 1)


def local_cross_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    query_grid: tuple[int, int],
    masks: Sequence[Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """One softmax of a query over its window of every map; a window with nothing visible gives 0."""
    dtype = accumulator(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    k_NAQWD = torch.cat([to_windows(k, query_grid, dim=2) for k in keys], dim=3).to(dtype)
    v_NAQWD = torch.cat([to_windows(v, query_grid, dim=2) for v in values], dim=3).to(dtype)
    scores = torch.einsum("naqd,naqwd->naqw", query.to(dtype), k_NAQWD) * scale
    if masks is None:
        weights = scores.softmax(-1)
    else:
        hidden = ~torch.cat([to_windows(mask, query_grid) for mask in masks], dim=2).unsqueeze(1)
        # The finite minimum keeps an all-hidden row free of NaN; the second fill makes it 0, not uniform.
        weights = (
            scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)
        )
    return torch.einsum("naqw,naqwd->naqd", weights, v_NAQWD).to(query.dtype)


def resample(
    features: Tensor,
    query: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    in_proj_weight: Tensor,
    out_proj_weight: Tensor,
    num_heads: int,
    in_proj_bias: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
) -> Tensor:
    """Queries attend to a map: query q + p_q, key z + p_k, value z. All images have the same queries."""
    w_q, w_k, w_v = in_proj_weight.chunk(3)
    b_q, b_k, b_v = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q_AQD = F.linear(query + query_position, w_q, b_q).unflatten(-1, (num_heads, -1)).transpose(0, 1)
    k_NATD = F.linear(features + key_position, w_k, b_k).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    v_NATD = F.linear(features, w_v, b_v).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    scores = (q_AQD @ k_NATD.transpose(-1, -2)).to(accumulator(features.dtype)) * q_AQD.shape[-1] ** -0.5
    out_NAQD = scores.softmax(-1).to(v_NATD.dtype) @ v_NATD
    return F.linear(out_NAQD.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)

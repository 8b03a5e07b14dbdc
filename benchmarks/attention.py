"""Span attention beside SDPA with the dense mask and FlexAttention compiled.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D head dimension, R ranges a query.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from attention.cases import CASES, AttentionCase
from attention.plain import plain_attention
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention, or_masks
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.workload import (
    FORWARD,
    TRAINING,
    Cost,
    Function,
    Operation,
    Provider,
    Unavailable,
    Workload,
    large_or_named,
)
from pyvlm import reference
from pyvlm.ops.attention import span_attention
from pyvlm.spans import AttentionSpans

_QUERY_BLOCK = {"cpu": 256, "cuda": 2048}  # queries of one block of the reference's scores


@dataclass(frozen=True)
class Mask:
    spans: AttentionSpans
    scale: float | None
    softcap: float | None
    sinks: Tensor | None


def workload(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Workload:
    q_BHQD, k_BGKD, v_BGKD, cotangent_BHQD = case.inputs(dtype, device)
    spans = case.spans(device)
    # Two multiplications and two additions an element of D and a visible pair: q·k, and p times v.
    flops = 4 * case.head_dim * case.heads * spans.visible_pairs()
    queries_bytes, keys_bytes = q_BHQD.nbytes, k_BGKD.nbytes
    costs = {FORWARD: Cost(flops, 2 * queries_bytes + 2 * keys_bytes)}
    decode = q_BHQD.shape[2] == 1
    if not decode:
        # The backward has five products to the forward's two; it reads q, k, v, out, dout, writes dq, dk, dv.
        costs[TRAINING] = Cost(flops * 7 // 2, 6 * queries_bytes + 6 * keys_bytes)
    batch, heads, queries, head_dim = q_BHQD.shape
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"B{batch} H{heads}/{case.kv_heads} Q{queries} K{case.length} D{head_dim} {case.rule}",
        dtype=dtype,
        inputs=(q_BHQD, k_BGKD, v_BGKD),
        cotangent=cotangent_BHQD,
        costs=costs,
        terms=(0.0, 1.0, 1.0, 0.0),  # dq and dk sum P·(dP − δ), a difference of products of unit normals
        payload=Mask(spans, case.scale, case.softcap, case.sink_scores(dtype, device)),
        cold=decode,
    )


def _in_blocks(attention: Callable[..., tuple[Tensor, Tensor]], work: Workload) -> Function:
    """Dense attention on blocks of one row, one key head and some queries, recomputed in the backward.

    A block's scores stay near the caches, where those of the whole would be gigabytes.
    """
    mask = work.payload

    def block(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, row: int, queries: slice) -> Tensor:
        bounds = mask.spans.bounds[row : row + 1, queries]
        keys = slice(int(bounds.max()))  # none of these queries sees a later key
        spans = replace(mask.spans, bounds=bounds, key_class=mask.spans.key_class[row : row + 1, keys])
        qkv = (q[:, :, queries], k[:, :, keys], v[:, :, keys])
        return attention(*qkv, spans, mask.scale, mask.softcap, sinks)[0]

    def head(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, row: int) -> Tensor:
        size = _QUERY_BLOCK[q.device.type]
        blocks = (slice(start, start + size) for start in range(0, q.shape[2], size))
        return torch.cat([checkpoint(block, q, k, v, sinks, row, b, use_reentrant=False) for b in blocks], 2)

    def run(q_BHQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor) -> Tensor:
        group = q_BHQD.shape[1] // k_BGKD.shape[1]
        sinks = [None] * k_BGKD.shape[1] if mask.sinks is None else mask.sinks.to(q_BHQD).split(group)
        rows = []
        for row, (q, k, v) in enumerate(zip(q_BHQD.split(1), k_BGKD.split(1), v_BGKD.split(1), strict=True)):
            heads = zip(q.split(group, 1), k.split(1, 1), v.split(1, 1), sinks, strict=True)
            rows.append(torch.cat([head(*of_head, row) for of_head in heads], 1))
        return torch.cat(rows)

    return run


def _pyvlm(work: Workload) -> Function:
    mask = work.payload
    # The kernel is named: "auto" might fall back, and the time of a fallback would stand in the kernel's row.
    backend = "native" if work.device.type == "cpu" else "triton"
    options = (mask.spans, mask.scale, mask.softcap, mask.sinks)
    return lambda q, k, v: span_attention(q, k, v, *options, backend=backend)


def _sdpa(work: Workload) -> Function:
    """SDPA with the dense mask; one call a stream, summed, where the softmaxes are separate."""
    mask = work.payload
    if mask.softcap is not None:
        raise Unavailable("SDPA has no softcap")
    if mask.sinks is not None:
        raise Unavailable("SDPA has no sinks")
    dense_BRQK = mask.spans.dense() if mask.spans.separate else mask.spans.dense().any(1, keepdim=True)
    streams = [stream.unsqueeze(1).contiguous() for stream in dense_BRQK.unbind(1)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        first, *rest = (
            F.scaled_dot_product_attention(q, k, v, m, scale=mask.scale, enable_gqa=grouped) for m in streams
        )
        return sum(rest, start=first)

    return run


def flex_masks(spans: AttentionSpans) -> list[BlockMask]:
    """FlexAttention's block masks, one a softmax; what it reads for a pair are integers, no dense mask."""
    lo_RBQ, hi_RBQ = (bound.movedim(2, 0).contiguous() for bound in spans.bounds.unbind(-1))

    def mask_mod(r: int) -> Callable[..., Tensor]:
        seen_BK = (spans.range_classes[r] >> spans.key_class.long()) & 1 == 1
        lo_BQ, hi_BQ = lo_RBQ[r], hi_RBQ[r]
        return lambda b, h, i, j: (lo_BQ[b, i] <= j) & (j < hi_BQ[b, i]) & seen_BK[b, j]

    mods = [mask_mod(r) for r in range(len(spans.range_classes))]
    if not spans.separate:
        mods = [or_masks(*mods)]
    batch, queries = lo_RBQ.shape[1:]
    keys = spans.key_class.shape[1]
    return [create_block_mask(mod, batch, None, queries, keys, spans.bounds.device) for mod in mods]


def _flex(work: Workload) -> Function:
    """FlexAttention compiled for this shape, its block mask made beforehand; one call a stream, summed."""
    mask = work.payload
    if mask.softcap is not None:
        raise Unavailable("the softcap would be a score_mod; not written here")
    if mask.sinks is not None:
        raise Unavailable("the sinks would be another scaling of the output; not written here")
    block_masks = flex_masks(mask.spans)
    torch._dynamo.reset()  # else the earlier workloads' compilations count towards the recompilation limit
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        first, *rest = (
            compiled(q, k, v, block_mask=m, scale=mask.scale, enable_gqa=grouped) for m in block_masks
        )
        return sum(rest, start=first)

    return run


OPERATION = Operation(
    name="attention",
    workloads=large_or_named(workload, CASES),
    case_names=tuple(case.name for case in CASES),
    providers=(Provider("pyvlm", _pyvlm), Provider("sdpa", _sdpa), Provider("flex", _flex)),
    reference=partial(_in_blocks, reference.attention.span_attention),
    plain=partial(_in_blocks, plain_attention),
)

"""Span attention of few queries over many keys, as in decoding: the keys are split over programs
(Flash-Decoding, Dao et al. 2023), and a second small kernel puts the parts together.

The rows of a tile are all queries of all heads that share a key head, once a stream, so that keys and values
are read once. Row m of P = S · group · I rows is stream m // (group · I), head m // I % group, query m % I.

Letters and terms: see `attention_tiles`; here M are the rows of a tile, X the splits.
"""

import triton
import triton.language as tl
from pyvlm.triton_kernels.attention_forward import add_values, softmax_step
from pyvlm.triton_kernels.attention_tiles import (
    INFINITY,
    LN2,
    RUNTIME,
    keys_of_classes,
    load_classes,
    load_ranges,
    load_tile,
    scores,
    within_range,
)
from pyvlm.triton_kernels.common import LOG2E, dot


@triton.jit(do_not_specialize=RUNTIME)
def decode_kernel(
    q,
    k,
    v,
    bounds,
    key_class,
    part_acc,
    part_max,
    part_sum,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int64,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int64,
    heads: tl.int32,
    group: tl.int32,
    queries: tl.int32,
    keys: tl.int32,
    splits: tl.int32,
    split_tiles: tl.int32,
    mask_0: tl.int32,
    mask_1: tl.int32,
    factor: tl.float32,
    cap: tl.float32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANGES: tl.constexpr,
    SEPARATE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """part_acc fp32 [B, G, X, P, D], part_max and part_sum fp32 [B, G, X, P]: softmaxes over one split.

    Program: a split of one sample and key head. There are at most BLOCK_M rows.
    """
    STREAMS: tl.constexpr = RANGES if SEPARATE else 1
    BOTH: tl.constexpr = RANGES == 2 and not SEPARATE
    SHAPE: tl.constexpr = (D, BLOCK_D, ALIGN)
    k_at = (k, k_batch, k_head, k_row)
    v_at = (v, v_batch, v_head, v_row)
    program = tl.program_id(0)
    split = program % splits
    key_heads = heads // group
    key_head = program // splits % key_heads
    batch = program // splits // key_heads

    row_M = tl.arange(0, BLOCK_M)
    rows = STREAMS * group * queries
    stream_M = row_M // (group * queries)
    head_M = key_head * group + row_M // queries % group
    query_M = tl.where(row_M < rows, row_M % queries, queries)
    dim_D = tl.arange(0, BLOCK_D)
    q_row_M = batch.to(tl.int64) * q_batch + head_M.to(tl.int64) * q_head + query_M.to(tl.int64) * q_row
    within_MD = (row_M < rows)[:, None] & (dim_D < D)[None, :]
    q_MD = tl.load(q + q_row_M[:, None] * ALIGN + dim_D[None, :], mask=within_MD, other=0.0)
    ranges = load_ranges(bounds, batch, query_M, queries, keys, stream_M, mask_0, mask_1, RANGES, BOTH)[0]
    lo_M, hi_M, mask_M, lo_1_M, hi_1_M = ranges[0], ranges[1], ranges[2], ranges[3], ranges[4]
    begin = tl.min(tl.where(lo_M < hi_M, lo_M, keys), 0)
    end = tl.max(tl.where(lo_M < hi_M, hi_M, 0), 0)
    if BOTH:
        begin = tl.minimum(begin, tl.min(tl.where(lo_1_M < hi_1_M, lo_1_M, keys), 0))
        end = tl.maximum(end, tl.max(tl.where(lo_1_M < hi_1_M, hi_1_M, 0), 0))

    max_M = tl.zeros([BLOCK_M], tl.float32) - INFINITY
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_tile = tl.maximum(split * split_tiles, begin // BLOCK_N)
    last_tile = tl.minimum((split + 1) * split_tiles, tl.cdiv(end, BLOCK_N))
    for tile in tl.range(first_tile, last_tile):
        first_key = tile * BLOCK_N
        k_ND = load_tile(k_at, batch, key_head, first_key, keys, BLOCK_N, SHAPE, False, True)
        v_ND = load_tile(v_at, batch, key_head, first_key, keys, BLOCK_N, SHAPE, False, True)
        key_N = first_key + tl.arange(0, BLOCK_N)
        class_N = load_classes(key_class, batch, key_N, keys)
        key_MN = keys_of_classes(key_N[None, :], class_N[None, :], mask_M[:, None])
        seen_MN = within_range(key_MN, lo_M[:, None], hi_M[:, None])
        if BOTH:
            key_1N = keys_of_classes(key_N, class_N, mask_1)[None, :]
            seen_MN = seen_MN | within_range(key_1N, lo_1_M[:, None], hi_1_M[:, None])
        product_MN = dot(q_MD, k_ND.T, None, PRECISION)
        x_MN, unit = scores(product_MN, factor, cap, SOFTCAP)
        x_MN = tl.where(seen_MN, x_MN, -INFINITY)
        p_MN, shrink_M, max_M, sum_M = softmax_step(x_MN, unit, max_M, sum_M, True)
        acc_MD = add_values(acc_MD, p_MN, shrink_M, v_ND, PRECISION)

    part_M = program.to(tl.int64) * rows + row_M
    tl.store(part_max + part_M, max_M, mask=row_M < rows)
    tl.store(part_sum + part_M, sum_M, mask=row_M < rows)
    tl.store(part_acc + part_M[:, None] * D + dim_D[None, :], acc_MD, mask=within_MD)


@triton.jit(do_not_specialize=RUNTIME)
def combine_kernel(
    part_acc,
    part_max,
    part_sum,
    sinks,
    out,
    stream_out,
    lse,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int64,
    heads: tl.int32,
    group: tl.int32,
    queries: tl.int32,
    splits: tl.int32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STREAMS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """out and stream_out [B, H, I, D], lse [B, H, S, I] from the parts of at most BLOCK_X splits.

    Program: one query of one sample and head.
    """
    program = tl.program_id(0)
    query = program % queries
    head = program // queries % heads
    batch = program // queries // heads
    split_X = tl.arange(0, BLOCK_X)
    dim_D = tl.arange(0, BLOCK_D)
    first_part = (batch.to(tl.int64) * (heads // group) + head // group) * splits
    out_offset = batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head + query.to(tl.int64) * out_row
    out_D = tl.zeros([BLOCK_D], tl.float32)
    for stream in tl.static_range(STREAMS):
        row = (stream * group + head % group) * queries + query
        part_X = (first_part + split_X) * (STREAMS * group * queries) + row
        max_X = tl.load(part_max + part_X, mask=split_X < splits, other=-INFINITY)
        sum_X = tl.load(part_sum + part_X, mask=split_X < splits, other=0.0)
        within_XD = (split_X < splits)[:, None] & (dim_D < D)[None, :]
        acc_XD = tl.load(part_acc + part_X[:, None] * D + dim_D[None, :], mask=within_XD, other=0.0)
        total_max = tl.max(max_X, 0)
        if sinks is not None:
            sink = tl.load(sinks + head).to(tl.float32) * LOG2E
            total_max = tl.maximum(total_max, sink)
        base = tl.where(total_max == -INFINITY, 0.0, total_max)
        share_X = tl.exp2(max_X - base)
        total = tl.sum(sum_X * share_X, 0)
        if sinks is not None:
            total += tl.exp2(sink - base)
        weight = tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total))
        lse_value = (total_max + tl.log2(tl.where(total == 0, 1.0, total))) * LN2
        tl.store(lse + ((batch.to(tl.int64) * heads + head) * STREAMS + stream) * queries + query, lse_value)
        out_D += tl.sum(acc_XD * share_X[:, None], 0) * weight
        if STREAMS == 2 and stream == 0:
            target = stream_out + out_offset * ALIGN + dim_D
            tl.store(target, out_D.to(stream_out.dtype.element_ty), mask=dim_D < D)
    tl.store(out + out_offset * ALIGN + dim_D, out_D.to(out.dtype.element_ty), mask=dim_D < D)

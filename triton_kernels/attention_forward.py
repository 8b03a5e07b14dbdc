"""The forward kernel of span attention: FlashAttention's running softmax (arXiv 2205.14135, 2307.08691) over
the tiles that the spans say are seen, once a stream.

Letters and terms: see `attention_tiles`.
"""

import triton
import triton.language as tl
from pyvlm.triton_kernels.attention_tiles import (
    INFINITY,
    LN2,
    PADDING,
    RUNTIME,
    extremes,
    load_positions,
    load_ranges,
    load_tile,
    lowest_bit,
    scores,
    store_tile,
    tile_sets,
    visible,
)
from pyvlm.triton_kernels.common import LOG2E, dot


@triton.jit
def softmax_step(x_MN, unit, max_M, sum_M, MASKED: tl.constexpr):
    """One step of the running softmax: scores x · unit in units of log 2, −inf where masked; unit > 0.

    Returns the tile's exponentials, by what earlier ones shrink, and the new maximum and sum.
    """
    new_max_M = tl.maximum(max_M, tl.max(x_MN, 1) * unit)
    # A row that has seen nothing yet would be −inf − (−inf).
    base_M = tl.where(new_max_M == -INFINITY, 0.0, new_max_M) if MASKED else new_max_M
    p_MN = tl.exp2(x_MN * unit - base_M[:, None])  # one instruction, where x · unit is not used again
    shrink_M = tl.exp2(max_M - base_M)
    return p_MN, shrink_M, new_max_M, sum_M * shrink_M + tl.sum(p_MN, 1)


@triton.jit
def add_values(acc_MD, p_MN, shrink_M, v_ND, PRECISION: tl.constexpr):
    """What a tile's exponentials add to the output."""
    return dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None], PRECISION)


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q,
    k,
    v,
    bounds,
    tile_classes,
    key_positions,
    sinks,
    out,
    stream_out,
    lse,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int64,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int64,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int64,
    heads: tl.int32,
    group: tl.int32,
    queries: tl.int32,
    keys: tl.int32,
    query_tiles: tl.int32,
    key_tiles: tl.int32,
    key_blocks: tl.int32,
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
    DESCRIPTORS: tl.constexpr,
    DEFERRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """out and stream_out [B, H, I, D], lse [B, H, S, I]. Program: a tile of queries of one row and head.

    With DEFERRED a tile's exponentials meet its values one tile later, behind the next tile's scores, as in
    FlashAttention-3 (arXiv 2407.08608): the tensor cores of Hopper and Blackwell work on their own, so that
    this product runs while the next softmax is computed. Otherwise both products wait for the softmax between
    them.
    """
    tl.static_assert(PADDING % BLOCK_N == 0)
    STREAMS: tl.constexpr = RANGES if SEPARATE else 1
    BOTH: tl.constexpr = RANGES == 2 and not SEPARATE  # two ranges under one softmax
    SHAPE: tl.constexpr = (D, BLOCK_D, ALIGN)
    k_at = (k, k_batch, k_head, k_row)
    v_at = (v, v_batch, v_head, v_row)
    program = tl.program_id(0)
    tile_m = query_tiles - 1 - program % query_tiles  # late queries see most: they start first
    first_query = tile_m * BLOCK_M
    head = program // query_tiles % heads
    batch = program // query_tiles // heads
    key_head = head // group
    query_M = first_query + tl.arange(0, BLOCK_M)
    q_at = (q, q_batch, q_head, q_row)
    q_MD = load_tile(q_at, batch, head, first_query, queries, BLOCK_M, SHAPE, False, True)
    classes = tile_classes + batch.to(tl.int64) * key_tiles
    # A sink is a key with this score and no value: a softmax starts with it.
    sink = -INFINITY
    NOTHING: tl.constexpr = 0.0 if sinks is None else 1.0
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E

    for stream in tl.range(STREAMS):
        ranges, idle_M = load_ranges(
            bounds, batch, query_M, queries, keys, stream, mask_0, mask_1, RANGES, BOTH
        )
        mask = ranges[2]
        edges = extremes(ranges[0], ranges[1], idle_M, 0)
        edges_1 = extremes(ranges[3], ranges[4], idle_M, 0)
        begin, end = tl.minimum(edges[0], edges_1[0]), tl.maximum(edges[3], edges_1[3])

        max_M = tl.zeros([BLOCK_M], tl.float32) + sink
        sum_M = tl.zeros([BLOCK_M], tl.float32) + NOTHING
        acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if DEFERRED:
            # What is still to be added: at first nothing, to the values beyond the last key, which are zeros.
            # In float32: wgmma reads its registers until it is waited for, and rounding gives it new ones.
            value_key = keys
            p_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            shrink_M = tl.zeros([BLOCK_M], tl.float32) + 1
        for first_tile in tl.range(begin // BLOCK_N, tl.cdiv(end, BLOCK_N), CHUNK):
            tile_T = first_tile + tl.arange(0, CHUNK)
            present_T = tl.load(classes + tile_T, mask=tile_T < key_tiles, other=0)
            begin_T = tile_T * BLOCK_N
            full, full_count, partial, partial_count = tile_sets(
                edges, edges_1, begin_T, begin_T + BLOCK_N, present_T, mask, mask_1, BOTH, CHUNK
            )
            for _ in tl.range(full_count, disable_licm=DESCRIPTORS):
                first_key = (first_tile + lowest_bit(full)) * BLOCK_N
                full = full & (full - 1)
                first_value = value_key if DEFERRED else first_key
                k_ND = load_tile(k_at, batch, key_head, first_key, keys, BLOCK_N, SHAPE, DESCRIPTORS, False)
                v_ND = load_tile(
                    v_at, batch, key_head, first_value, keys, BLOCK_N, SHAPE, DESCRIPTORS, DEFERRED
                )
                product_MN = dot(q_MD, k_ND.T, None, PRECISION)
                if DEFERRED:
                    acc_MD = add_values(acc_MD, p_MN, shrink_M, v_ND, PRECISION)
                    value_key = first_key
                x_MN, unit = scores(product_MN, factor, cap, SOFTCAP)
                p_MN, shrink_M, max_M, sum_M = softmax_step(x_MN, unit, max_M, sum_M, False)
                if not DEFERRED:
                    acc_MD = add_values(acc_MD, p_MN, shrink_M, v_ND, PRECISION)

            for _ in tl.range(partial_count, disable_licm=DESCRIPTORS):
                first_key = (first_tile + lowest_bit(partial)) * BLOCK_N
                partial = partial & (partial - 1)
                first_value = value_key if DEFERRED else first_key
                k_ND = load_tile(k_at, batch, key_head, first_key, keys, BLOCK_N, SHAPE, DESCRIPTORS, True)
                v_ND = load_tile(v_at, batch, key_head, first_value, keys, BLOCK_N, SHAPE, DESCRIPTORS, True)
                positions = load_positions(
                    key_positions, batch, stream, first_key, key_blocks, RANGES, BOTH, BLOCK_N
                )
                product_MN = dot(q_MD, k_ND.T, None, PRECISION)
                if DEFERRED:
                    acc_MD = add_values(acc_MD, p_MN, shrink_M, v_ND, PRECISION)
                    value_key = first_key
                x_MN, unit = scores(product_MN, factor, cap, SOFTCAP)
                x_MN = tl.where(visible(ranges, positions, BOTH), x_MN, -INFINITY)
                p_MN, shrink_M, max_M, sum_M = softmax_step(x_MN, unit, max_M, sum_M, True)
                if not DEFERRED:
                    acc_MD = add_values(acc_MD, p_MN, shrink_M, v_ND, PRECISION)

        if DEFERRED:
            v_ND = load_tile(v_at, batch, key_head, value_key, keys, BLOCK_N, SHAPE, DESCRIPTORS, True)
            acc_MD = add_values(acc_MD, p_MN, shrink_M, v_ND, PRECISION)

        # What a full tile gave to an idle query is dropped here.
        max_M = tl.where(idle_M, sink, max_M)
        sum_M = tl.where(idle_M, NOTHING, sum_M)
        weight_M = tl.where(idle_M | (sum_M == 0), 0.0, 1 / tl.where(sum_M == 0, 1.0, sum_M))
        lse_M = (max_M + tl.log2(tl.where(sum_M == 0, 1.0, sum_M))) * LN2
        lse_offset = ((batch.to(tl.int64) * heads + head) * STREAMS + stream) * queries
        tl.store(lse + lse_offset + query_M, lse_M, mask=query_M < queries)
        out_MD = acc_MD * weight_M[:, None]
        if STREAMS == 2:
            # The first stream's output waits in memory, not in registers, which the second one needs.
            stream_at = (stream_out, out_batch, out_head, out_row)
            if stream == 0:
                store_tile(stream_at, out_MD, batch, head, first_query, queries, BLOCK_M, SHAPE)
            else:
                tl.debug_barrier()
                out_MD += load_tile(stream_at, batch, head, first_query, queries, BLOCK_M, SHAPE, False, True)
        if stream == STREAMS - 1:
            out_at = (out, out_batch, out_head, out_row)
            store_tile(out_at, out_MD, batch, head, first_query, queries, BLOCK_M, SHAPE)

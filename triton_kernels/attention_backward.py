"""The backward kernels of span attention: FlashAttention-2's two passes (arXiv 2307.08691) over the
tiles that are seen.

    P_ij = exp(s_ij − lse_i)    dS_ij = P_ij (dO_i·v_j − delta_i)    delta_i = dO_i·o_i − dlse_i
    dQ_i = scale Σ_j dS_ij k_j    dK_j = scale Σ_i dS_ij q_i    dV_j = Σ_i P_ij dO_i

each summed over the streams, with the lse, delta and output of the stream. No atomics: every sum is made by
one program, in a fixed order. Letters and terms: see `attention_tiles`.
"""

import triton
import triton.language as tl
from pyvlm.triton_kernels.attention_tiles import (
    FAR,
    INFINITY,
    PADDING,
    RUNTIME,
    extremes,
    load_positions,
    load_ranges,
    load_tile,
    lowest_bit,
    padded_row,
    scores,
    slope,
    store_tile,
    tile_sets,
    visible,
    within_range,
)
from pyvlm.triton_kernels.common import LOG2E, dot


@triton.jit(do_not_specialize=RUNTIME)
def row_statistics(
    out,
    stream_out,
    grad_out,
    lse,
    grad_lse,
    bounds,
    delta,
    lse_2,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int64,
    grad_out_batch: tl.int64,
    grad_out_head: tl.int64,
    grad_out_row: tl.int64,
    heads: tl.int32,
    queries: tl.int32,
    keys: tl.int32,
    row_blocks: tl.int32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANGES: tl.constexpr,
    SEPARATE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta and lse_2, both [B, H, S, rows]: what the other two kernels need of each row.

    lse_2 is the lse in units of log 2, and +∞ where the row saw nothing: its P is exp2(s − ∞) = 0. So it is
    in the rows beyond the last query, up to a whole number of PADDING: no tile needs a mask to read them.
    Program: a tile of queries of one sample and head.
    """
    STREAMS: tl.constexpr = RANGES if SEPARATE else 1
    BOTH: tl.constexpr = RANGES == 2 and not SEPARATE
    SHAPE: tl.constexpr = (D, BLOCK_D, ALIGN)
    program = tl.program_id(0)
    tiles = row_blocks * (PADDING // BLOCK_M)
    first_query = program % tiles * BLOCK_M
    head = program // tiles % heads
    batch = program // tiles // heads
    query_M = first_query + tl.arange(0, BLOCK_M)
    out_at = (out, out_batch, out_head, out_row)
    grad_out_at = (grad_out, grad_out_batch, grad_out_head, grad_out_row)
    out_MD = load_tile(out_at, batch, head, first_query, queries, BLOCK_M, SHAPE, False, True).to(tl.float32)
    grad_MD = load_tile(grad_out_at, batch, head, first_query, queries, BLOCK_M, SHAPE, False, True)
    for stream in tl.static_range(STREAMS):
        if STREAMS == 2:
            stream_at = (stream_out, out_batch, out_head, out_row)
            first_MD = load_tile(stream_at, batch, head, first_query, queries, BLOCK_M, SHAPE, False, True)
            stream_MD = first_MD.to(tl.float32) if stream == 0 else out_MD - first_MD.to(tl.float32)
        else:
            stream_MD = out_MD
        row = (batch.to(tl.int64) * heads + head) * STREAMS + stream
        row_M = row * queries + query_M
        within_M = query_M < queries
        delta_M = tl.sum(grad_MD.to(tl.float32) * stream_MD, 1)
        if grad_lse is not None:
            delta_M -= tl.load(grad_lse + row_M, mask=within_M, other=0.0)
        lse_M = tl.load(lse + row_M, mask=within_M, other=-INFINITY)
        idle_M = load_ranges(bounds, batch, query_M, queries, keys, stream, 0, 0, RANGES, BOTH)[1]
        # An lse of −∞ has no gradient, whatever its cotangent is.
        to_M = padded_row(row, row_blocks) + query_M
        tl.store(delta + to_M, tl.where(lse_M == -INFINITY, 0.0, delta_M))
        tl.store(lse_2 + to_M, tl.where(idle_M | (lse_M == -INFINITY), INFINITY, lse_M * LOG2E))


@triton.jit(do_not_specialize=RUNTIME)
def grad_q_kernel(
    q,
    k,
    v,
    grad_out,
    bounds,
    tile_classes,
    key_positions,
    delta,
    lse_2,
    grad_q,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int64,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int64,
    grad_out_batch: tl.int64,
    grad_out_head: tl.int64,
    grad_out_row: tl.int64,
    grad_q_batch: tl.int64,
    grad_q_head: tl.int64,
    grad_q_row: tl.int64,
    heads: tl.int32,
    group: tl.int32,
    queries: tl.int32,
    keys: tl.int32,
    query_tiles: tl.int32,
    key_tiles: tl.int32,
    row_blocks: tl.int32,
    key_blocks: tl.int32,
    mask_0: tl.int32,
    mask_1: tl.int32,
    factor: tl.float32,
    cap: tl.float32,
    scale: tl.float32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANGES: tl.constexpr,
    SEPARATE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """grad_q [B, H, I, D]. Program: a tile of queries of one sample and head."""
    tl.static_assert(PADDING % BLOCK_M == 0 and PADDING % BLOCK_N == 0)
    STREAMS: tl.constexpr = RANGES if SEPARATE else 1
    BOTH: tl.constexpr = RANGES == 2 and not SEPARATE
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
    grad_out_at = (grad_out, grad_out_batch, grad_out_head, grad_out_row)
    q_MD = load_tile(q_at, batch, head, first_query, queries, BLOCK_M, SHAPE, False, True)
    grad_out_MD = load_tile(grad_out_at, batch, head, first_query, queries, BLOCK_M, SHAPE, False, True)
    classes = tile_classes + batch.to(tl.int64) * key_tiles

    grad_q_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for stream in tl.range(STREAMS):
        ranges, idle_M = load_ranges(
            bounds, batch, query_M, queries, keys, stream, mask_0, mask_1, RANGES, BOTH
        )
        mask = ranges[2]
        edges = extremes(ranges[0], ranges[1], idle_M, 0)
        edges_1 = extremes(ranges[3], ranges[4], idle_M, 0)
        begin, end = tl.minimum(edges[0], edges_1[0]), tl.maximum(edges[3], edges_1[3])
        row_M = padded_row((batch.to(tl.int64) * heads + head) * STREAMS + stream, row_blocks) + query_M
        delta_M, lse_M = tl.load(delta + row_M), tl.load(lse_2 + row_M)
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
                k_ND = load_tile(k_at, batch, key_head, first_key, keys, BLOCK_N, SHAPE, DESCRIPTORS, False)
                v_ND = load_tile(v_at, batch, key_head, first_key, keys, BLOCK_N, SHAPE, DESCRIPTORS, False)
                product_MN = dot(q_MD, k_ND.T, None, PRECISION)
                x_MN, unit = scores(product_MN, factor, cap, SOFTCAP)
                p_MN = tl.exp2(x_MN * unit - lse_M[:, None])
                grad_p_MN = dot(grad_out_MD, v_ND.T, None, PRECISION)
                grad_s_MN = p_MN * (grad_p_MN - delta_M[:, None]) * slope(x_MN, SOFTCAP)
                grad_q_MD = dot(grad_s_MN.to(k_ND.dtype), k_ND, grad_q_MD, PRECISION)

            for _ in tl.range(partial_count, disable_licm=DESCRIPTORS):
                first_key = (first_tile + lowest_bit(partial)) * BLOCK_N
                partial = partial & (partial - 1)
                k_ND = load_tile(k_at, batch, key_head, first_key, keys, BLOCK_N, SHAPE, DESCRIPTORS, True)
                v_ND = load_tile(v_at, batch, key_head, first_key, keys, BLOCK_N, SHAPE, DESCRIPTORS, True)
                positions = load_positions(
                    key_positions, batch, stream, first_key, key_blocks, RANGES, BOTH, BLOCK_N
                )
                product_MN = dot(q_MD, k_ND.T, None, PRECISION)
                x_MN, unit = scores(product_MN, factor, cap, SOFTCAP)
                seen_MN = visible(ranges, positions, BOTH)
                p_MN = tl.exp2(tl.where(seen_MN, x_MN * unit - lse_M[:, None], -INFINITY))
                grad_p_MN = dot(grad_out_MD, v_ND.T, None, PRECISION)
                grad_s_MN = p_MN * (grad_p_MN - delta_M[:, None]) * slope(x_MN, SOFTCAP)
                grad_q_MD = dot(grad_s_MN.to(k_ND.dtype), k_ND, grad_q_MD, PRECISION)
    grad_q_at = (grad_q, grad_q_batch, grad_q_head, grad_q_row)
    store_tile(grad_q_at, grad_q_MD * scale, batch, head, first_query, queries, BLOCK_M, SHAPE)


@triton.jit
def load_edges(tile_extremes, batch, index, tile_T, query_tiles, RANGES: tl.constexpr):
    """The `extremes` of some query tiles; beyond the last tile those of queries that see nothing."""
    pointers = tile_extremes + (batch.to(tl.int64) * RANGES + index) * 4 * query_tiles + tile_T
    within_T = tile_T < query_tiles
    lo_min_T = tl.load(pointers, mask=within_T, other=FAR)
    lo_max_T = tl.load(pointers + query_tiles, mask=within_T, other=FAR)
    hi_min_T = tl.load(pointers + 2 * query_tiles, mask=within_T, other=0)
    hi_max_T = tl.load(pointers + 3 * query_tiles, mask=within_T, other=0)
    return lo_min_T, lo_max_T, hi_min_T, hi_max_T


@triton.jit
def seen_by(range_M, row_blocks, positions, BOTH: tl.constexpr):
    """Which keys of a tile the queries of `row_ranges` see, [N, M]: one range after the other, because the
    registers that hold a range are many where a thread has parts of all queries."""
    lo_M, hi_M = tl.load(range_M), tl.load(range_M + row_blocks * PADDING)
    seen_NM = within_range(positions[0][:, None], lo_M[None, :], hi_M[None, :])
    if BOTH:
        range_1_M = range_M + 2 * row_blocks * PADDING
        lo_M, hi_M = tl.load(range_1_M), tl.load(range_1_M + row_blocks * PADDING)
        seen_NM = seen_NM | within_range(positions[1][:, None], lo_M[None, :], hi_M[None, :])
    return seen_NM


@triton.jit(do_not_specialize=RUNTIME)
def grad_kv_kernel(
    q,
    k,
    v,
    grad_out,
    tile_classes,
    key_positions,
    tile_extremes,
    row_ranges,
    delta,
    lse_2,
    grad_k,
    grad_v,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int64,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int64,
    grad_out_batch: tl.int64,
    grad_out_head: tl.int64,
    grad_out_row: tl.int64,
    grad_k_batch: tl.int64,
    grad_k_head: tl.int64,
    grad_k_row: tl.int64,
    grad_v_batch: tl.int64,
    grad_v_head: tl.int64,
    grad_v_row: tl.int64,
    heads: tl.int32,
    group: tl.int32,
    queries: tl.int32,
    keys: tl.int32,
    query_tiles: tl.int32,
    key_tiles: tl.int32,
    row_blocks: tl.int32,
    key_blocks: tl.int32,
    mask_0: tl.int32,
    mask_1: tl.int32,
    factor: tl.float32,
    cap: tl.float32,
    scale: tl.float32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANGES: tl.constexpr,
    SEPARATE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """grad_k, grad_v [B, G, J, D]. Program: a tile of keys of one sample and key head.

    Score tiles are transposed, [N, M]: as they stand they are the left operands of dV and dK. Ranges need not
    grow with the query (a token of an image may see only itself), so every query tile is looked at.

    The order is for wgmma, which works on its own: the exponentials are made while dO·v is, and dS while dV
    is. What is known of each query is read just before it is used: read earlier it would take registers that
    larger tiles need.
    """
    tl.static_assert(PADDING % BLOCK_M == 0 and PADDING % BLOCK_N == 0)
    STREAMS: tl.constexpr = RANGES if SEPARATE else 1
    BOTH: tl.constexpr = RANGES == 2 and not SEPARATE
    SHAPE: tl.constexpr = (D, BLOCK_D, ALIGN)
    q_at = (q, q_batch, q_head, q_row)
    grad_out_at = (grad_out, grad_out_batch, grad_out_head, grad_out_row)
    program = tl.program_id(0)
    tile_n = program % key_tiles  # early keys are seen by most: they start first
    first_key = tile_n * BLOCK_N
    key_heads = heads // group
    key_head = program // key_tiles % key_heads
    batch = program // key_tiles // key_heads
    k_at = (k, k_batch, k_head, k_row)
    v_at = (v, v_batch, v_head, v_row)
    k_ND = load_tile(k_at, batch, key_head, first_key, keys, BLOCK_N, SHAPE, False, True)
    v_ND = load_tile(v_at, batch, key_head, first_key, keys, BLOCK_N, SHAPE, False, True)
    present = tl.load(tile_classes + batch.to(tl.int64) * key_tiles + tile_n)

    grad_k_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for head_and_stream in tl.range(group * STREAMS):
        head = key_head * group + head_and_stream // STREAMS
        stream = head_and_stream % STREAMS
        mask = tl.where(stream == 0, mask_0, mask_1)
        positions = load_positions(key_positions, batch, stream, first_key, key_blocks, RANGES, BOTH, BLOCK_N)
        rows = padded_row((batch.to(tl.int64) * heads + head) * STREAMS + stream, row_blocks)
        for first_tile in tl.range(0, query_tiles, CHUNK):
            tile_T = first_tile + tl.arange(0, CHUNK)
            edges = load_edges(tile_extremes, batch, stream, tile_T, query_tiles, RANGES)
            edges_1 = edges
            if BOTH:
                edges_1 = load_edges(tile_extremes, batch, 1, tile_T, query_tiles, RANGES)
            full, full_count, partial, partial_count = tile_sets(
                edges, edges_1, first_key, first_key + BLOCK_N, present, mask, mask_1, BOTH, CHUNK
            )
            for _ in tl.range(full_count, disable_licm=DESCRIPTORS):
                first_query = (first_tile + lowest_bit(full)) * BLOCK_M
                full = full & (full - 1)
                q_MD = load_tile(q_at, batch, head, first_query, queries, BLOCK_M, SHAPE, DESCRIPTORS, True)
                grad_out_MD = load_tile(
                    grad_out_at, batch, head, first_query, queries, BLOCK_M, SHAPE, DESCRIPTORS, True
                )
                query_M = first_query + tl.arange(0, BLOCK_M)
                product_NM = dot(k_ND, q_MD.T, None, PRECISION)
                lse_M = tl.load(lse_2 + rows + query_M)
                grad_p_NM = dot(v_ND, grad_out_MD.T, None, PRECISION)
                x_NM, unit = scores(product_NM, factor, cap, SOFTCAP)
                p_NM = tl.exp2(x_NM * unit - lse_M[None, :])
                grad_v_ND = dot(p_NM.to(k_ND.dtype), grad_out_MD, grad_v_ND, PRECISION)
                delta_M = tl.load(delta + rows + query_M)
                grad_s_NM = p_NM * (grad_p_NM - delta_M[None, :]) * slope(x_NM, SOFTCAP)
                grad_k_ND = dot(grad_s_NM.to(k_ND.dtype), q_MD, grad_k_ND, PRECISION)

            for _ in tl.range(partial_count, disable_licm=DESCRIPTORS):
                first_query = (first_tile + lowest_bit(partial)) * BLOCK_M
                partial = partial & (partial - 1)
                q_MD = load_tile(q_at, batch, head, first_query, queries, BLOCK_M, SHAPE, DESCRIPTORS, True)
                grad_out_MD = load_tile(
                    grad_out_at, batch, head, first_query, queries, BLOCK_M, SHAPE, DESCRIPTORS, True
                )
                query_M = first_query + tl.arange(0, BLOCK_M)
                product_NM = dot(k_ND, q_MD.T, None, PRECISION)
                range_M = (
                    row_ranges + padded_row((batch.to(tl.int64) * RANGES + stream) * 2, row_blocks) + query_M
                )
                seen_NM = seen_by(range_M, row_blocks, positions, BOTH)
                lse_M = tl.load(lse_2 + rows + query_M)
                grad_p_NM = dot(v_ND, grad_out_MD.T, None, PRECISION)
                x_NM, unit = scores(product_NM, factor, cap, SOFTCAP)
                p_NM = tl.exp2(tl.where(seen_NM, x_NM * unit - lse_M[None, :], -INFINITY))
                grad_v_ND = dot(p_NM.to(k_ND.dtype), grad_out_MD, grad_v_ND, PRECISION)
                delta_M = tl.load(delta + rows + query_M)
                grad_s_NM = p_NM * (grad_p_NM - delta_M[None, :]) * slope(x_NM, SOFTCAP)
                grad_k_ND = dot(grad_s_NM.to(k_ND.dtype), q_MD, grad_k_ND, PRECISION)
    grad_k_at = (grad_k, grad_k_batch, grad_k_head, grad_k_row)
    grad_v_at = (grad_v, grad_v_batch, grad_v_head, grad_v_row)
    store_tile(grad_k_at, grad_k_ND * scale, batch, key_head, first_key, keys, BLOCK_N, SHAPE)
    store_tile(grad_v_at, grad_v_ND, batch, key_head, first_key, keys, BLOCK_N, SHAPE)

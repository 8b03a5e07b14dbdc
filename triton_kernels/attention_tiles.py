"""What the span attention kernels share: which tiles are seen, loads, and the arithmetic of scores.

A tile of scores is *empty* where no query of it sees any key of it, *full* where every query sees every key,
else *partial*. Which it is follows from O(1) numbers a tile: the extremes of its queries' ranges, and the
classes of its keys. A kernel looks at a chunk of up to 32 tiles at once, as vectors, and makes two bit sets
of it, the partial tiles and the full ones; its two inner loops then go over set bits, with no branch in them,
so that Triton can overlap their loads with the arithmetic. Where descriptors load, there is little to take
out of these loops, and they keep it inside (`disable_licm`): outside, the compiler holds where each product's
operands lie in shared memory, in up to 64 registers a thread, which then spills others.

Letters at the end of a name say the shape: M queries of a tile, N keys of a tile, D head dimension (padded to
a power of two), T tiles of a chunk. Sizes: B batch, H query heads, G key/value heads, I queries, J keys, R
ranges a query (1 or 2), S streams (softmaxes: R where separate, else 1).
"""

import triton
import triton.language as tl
from pyvlm.triton_kernels.common import tanh

LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
FAR = tl.constexpr(2**31 - 1)  # beyond every key

# Arguments that differ from call to call. Triton would compile anew where one of them becomes 1 or stops
# being a multiple of 16, so it is told not to look.
RUNTIME = (
    *("heads", "group", "queries", "keys", "query_tiles", "key_tiles", "row_blocks", "key_blocks"),
    *("splits", "split_tiles"),
    *("mask_0", "mask_1", "factor", "cap", "scale"),
    *(
        f"{tensor}_{axis}"
        for tensor in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
        for axis in ("batch", "head", "row")
    ),
)


# What is kept of each query or key is filled up to a multiple of it, so that no tile needs a mask to load it.
PADDING = tl.constexpr(128)


@triton.jit
def padded_row(row, blocks):
    """Where a row of a [rows, blocks · PADDING] tensor begins: a multiple of PADDING, and the compiler knows,
    so that it loads four numbers at a time."""
    return row * blocks * PADDING


# Loads and stores. A tensor comes as the tuple `at`: its pointer or descriptor, and the strides of batch,
# head and row in units of ALIGN elements, which tells the compiler that ALIGN elements may be loaded at once.
# `SHAPE` is (D, BLOCK_D, ALIGN).


@triton.jit
def tile_offsets(at, batch, head, first, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Offsets of the `ROWS` rows from `first` on, [ROWS, D]; in 64 bits, for tensors beyond 2^31 elements."""
    _, batch_stride, head_stride, row_stride = at
    start = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    start += tl.cast(first, tl.int64) * row_stride
    row = tl.arange(0, ROWS).to(tl.int64) * row_stride
    return (start + row)[:, None] * SHAPE[2] + tl.arange(0, SHAPE[1])[None, :]


@triton.jit
def load_tile(
    at, batch, head, first, size, ROWS: tl.constexpr, SHAPE: tl.constexpr, DESCRIPTOR: tl.constexpr,
    CHECK: tl.constexpr
):  # fmt: skip
    """Rows [first, first + ROWS) of one sample and head of a [B, H, size, D] tensor, and zeros outside it.

    With DESCRIPTOR the tensor is a descriptor of blocks [1, 1, ROWS, BLOCK_D], loaded by the GPU's tensor
    memory accelerator. With CHECK off the caller knows that all rows are within.
    """
    if DESCRIPTOR:
        tile = at[0].load([batch, head, first, 0]).reshape(ROWS, SHAPE[1])
    else:
        pointers = at[0] + tile_offsets(at, batch, head, first, ROWS, SHAPE)
        within_rows = (first + tl.arange(0, ROWS) < size)[:, None]
        within_dims = (tl.arange(0, SHAPE[1]) < SHAPE[0])[None, :]
        if CHECK and SHAPE[1] != SHAPE[0]:
            tile = tl.load(pointers, mask=within_rows & within_dims, other=0.0)
        elif CHECK:
            tile = tl.load(pointers, mask=within_rows, other=0.0)
        elif SHAPE[1] != SHAPE[0]:
            tile = tl.load(pointers, mask=within_dims, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(at, tile, batch, head, first, size, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Writes the rows of a tile that lie within a [B, H, size, D] tensor, in its dtype."""
    within = (first + tl.arange(0, ROWS) < size)[:, None]
    if SHAPE[1] != SHAPE[0]:
        within = within & (tl.arange(0, SHAPE[1]) < SHAPE[0])[None, :]
    pointers = at[0] + tile_offsets(at, batch, head, first, ROWS, SHAPE)
    tl.store(pointers, tile.to(at[0].dtype.element_ty), mask=within)


@triton.jit
def load_range(bounds, batch, query, queries, keys, index, RANGES: tl.constexpr):
    """Ranges [lo, hi) of some queries, within the keys; an empty one beyond the last query.

    Nobody has checked bounds that lie on a GPU: that would stall it. Clamped, they cannot make a kernel read
    outside the keys, and one that ends before it begins is empty.
    """
    within = query < queries
    pointers = bounds + ((batch.to(tl.int64) * queries + query) * RANGES + index) * 2
    lo = tl.maximum(tl.load(pointers, mask=within, other=0), 0)
    hi = tl.minimum(tl.load(pointers + 1, mask=within, other=0), keys)
    return lo, tl.maximum(hi, lo)


@triton.jit
def load_ranges(
    bounds, batch, query, queries, keys, stream, mask_0, mask_1, RANGES: tl.constexpr, BOTH: tl.constexpr
):
    """The ranges of a stream, as (lo, hi, mask) of the first and, with BOTH, of the second one; and which
    queries are idle: they see nothing in this softmax. Without BOTH the second is the first, and unused."""
    lo, hi = load_range(bounds, batch, query, queries, keys, stream, RANGES)
    mask = tl.where(stream == 0, mask_0, mask_1)
    if BOTH:
        lo_1, hi_1 = load_range(bounds, batch, query, queries, keys, 1, RANGES)
    else:
        lo_1, hi_1 = lo, hi
    return (lo, hi, mask, lo_1, hi_1, mask_1), (lo >= hi) & (lo_1 >= hi_1)


@triton.jit
def load_classes(key_class, batch, key_N, keys):
    """Classes of some keys; 0, padding, beyond the last key."""
    pointers = key_class + batch.to(tl.int64) * keys + key_N
    return tl.load(pointers, mask=key_N < keys, other=0).to(tl.int32)


@triton.jit
def load_positions(
    key_positions, batch, stream, first, key_blocks, RANGES: tl.constexpr, BOTH: tl.constexpr,
    SIZE: tl.constexpr
):  # fmt: skip
    """Positions of some keys as `summarise_keys` wrote them for the range of a stream and, with BOTH, for the
    second range. Without BOTH the second is the first, and unused."""
    offset = padded_row(batch.to(tl.int64) * RANGES + stream, key_blocks) + first
    pointers = key_positions + offset + tl.arange(0, SIZE)
    key_N = tl.load(pointers)
    key_1_N = key_N
    if BOTH:
        key_1_N = tl.load(pointers + key_blocks * PADDING)
    return key_N, key_1_N


# Which keys are seen, and which tiles


@triton.jit
def keys_of_classes(key, key_class, mask):
    """Positions of keys; −1, which no range has, for those of a class that is not in the mask."""
    return tl.where(((mask >> key_class) & 1) != 0, key, -1)


@triton.jit
def within_range(key, lo, hi):
    """lo <= key < hi as one comparison: without a sign, what is before lo is far behind hi. 0 <= lo <= hi."""
    return (key - lo).to(tl.uint32) < (hi - lo).to(tl.uint32)


@triton.jit
def visible(ranges, positions, BOTH: tl.constexpr):
    """Which query sees which key in a stream, [M, N]. See `load_positions`."""
    lo_M, hi_M, _, lo_1_M, hi_1_M, _ = ranges
    seen_MN = within_range(positions[0][None, :], lo_M[:, None], hi_M[:, None])
    if BOTH:
        seen_MN = seen_MN | within_range(positions[1][None, :], lo_1_M[:, None], hi_1_M[:, None])
    return seen_MN


@triton.jit
def extremes(lo, hi, idle, AXIS: tl.constexpr):
    """lo_min, lo_max, hi_min, hi_max of ranges.

    Empty ranges do not widen [lo_min, hi_max), in which somebody sees something. In [lo_max, hi_min) all see
    everything; an empty range leaves nothing of it (hi_min is 0), unless its query is idle: what a tile gives
    for that one is dropped.
    """
    seen = lo < hi
    lo_min = tl.min(tl.where(seen, lo, FAR), AXIS)
    hi_max = tl.max(tl.where(seen, hi, 0), AXIS)
    lo_max = tl.max(tl.where(seen, lo, 0), AXIS)
    hi_min = tl.min(tl.where(seen, hi, tl.where(idle, FAR, 0)), AXIS)
    return lo_min, lo_max, hi_min, hi_max


@triton.jit
def cover(extremes_of_range, begin, end, present, mask):
    """Whether any query sees a key of the tile [begin, end), and the classes of which each query sees all."""
    lo_min, lo_max, hi_min, hi_max = extremes_of_range
    some = (lo_min < end) & (begin < hi_max) & ((present & mask) != 0)
    return some, tl.where((lo_max <= begin) & (end <= hi_min), mask, 0)


@triton.jit
def tile_sets(
    edges, edges_1, begin_T, end_T, present_T, mask, mask_1, BOTH: tl.constexpr, CHUNK: tl.constexpr
):
    """The full and the partial tiles of a chunk, each as the bits of a uint32 and their number.

    edges: the `extremes` of the queries' ranges, and with BOTH those of their second ranges; [begin_T, end_T)
    the tiles' keys, present_T their classes. What lies beyond the last query or key is seen by
    nobody: its classes or its edges say so.
    """
    some_T, whole_T = cover(edges, begin_T, end_T, present_T, mask)
    if BOTH:
        some_1_T, whole_1_T = cover(edges_1, begin_T, end_T, present_T, mask_1)
        some_T = some_T | some_1_T
        whole_T = whole_T | whole_1_T
    full_T = (present_T & ~whole_T) == 0
    full, full_count = bit_set(some_T & full_T, CHUNK)
    partial, partial_count = bit_set(some_T & ~full_T, CHUNK)
    return full, full_count, partial, partial_count


@triton.jit
def bit_set(flag_T, CHUNK: tl.constexpr):
    bit_T = tl.full([CHUNK], 1, tl.uint32) << tl.arange(0, CHUNK).to(tl.uint32)
    return tl.sum(tl.where(flag_T, bit_T, 0), 0), tl.sum(flag_T.to(tl.int32), 0)


@triton.jit
def lowest_bit(bits):
    """Position of the lowest set bit: the exponent of that power of two as a float, which is exact."""
    power = (bits & (0 - bits)).to(tl.float32)
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit(do_not_specialize=RUNTIME)
def summarise_keys(
    key_class,
    tile_classes,
    key_positions,
    keys: tl.int32,
    key_tiles: tl.int32,
    key_blocks: tl.int32,
    mask_0: tl.int32,
    mask_1: tl.int32,
    RANGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """tile_classes int32 [B, key_tiles]: bit c says that the tile has keys of class c. key_positions int32
    [B, R, blocks · PADDING]: each key's position where a range sees its class, else −1.

    Program (b, chunk).
    """
    batch = tl.program_id(0)
    tile_T = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    key_TN = tile_T[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    class_TN = load_classes(key_class, batch, key_TN, keys)
    for r in tl.static_range(RANGES):
        position_TN = keys_of_classes(key_TN, class_TN, mask_0 if r == 0 else mask_1)
        to_TN = key_positions + padded_row(batch.to(tl.int64) * RANGES + r, key_blocks) + key_TN
        tl.store(to_TN, position_TN, mask=key_TN < key_blocks * PADDING)
    # One sum counts the keys of all classes: a byte of it is a class, and a tile has fewer than 256 keys.
    one_TN = tl.full([CHUNK, BLOCK_N], 1, tl.int64)
    count_T = tl.sum(tl.where(class_TN < 8, one_TN << (class_TN.to(tl.int64) * 8), 0), 1)
    present_T = tl.zeros([CHUNK], tl.int32)
    for c in tl.static_range(8):
        present_T += (((count_T >> (8 * c)) & 0xFF) != 0).to(tl.int32) << c
    tl.store(tile_classes + batch.to(tl.int64) * key_tiles + tile_T, present_T, mask=tile_T < key_tiles)


@triton.jit(do_not_specialize=RUNTIME)
def summarise_queries(
    bounds,
    tile_extremes,
    row_ranges,
    queries: tl.int32,
    keys: tl.int32,
    query_tiles: tl.int32,
    row_blocks: tl.int32,
    RANGES: tl.constexpr,
    SEPARATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """tile_extremes int32 [B, R, 4, query_tiles]: `extremes` of each tile's ranges. row_ranges int32
    [B, R, 2, blocks · PADDING]: lo and hi of each query's, from `load_range`. Program (b, chunk)."""
    batch = tl.program_id(0)
    tile_T = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    query_TM = tile_T[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    BOTH: tl.constexpr = RANGES == 2 and not SEPARATE
    for r in tl.static_range(RANGES):
        stream = r if SEPARATE else 0
        ranges, idle_TM = load_ranges(bounds, batch, query_TM, queries, keys, stream, 0, 0, RANGES, BOTH)
        if BOTH and r == 1:
            lo_TM, hi_TM = ranges[3], ranges[4]
        else:
            lo_TM, hi_TM = ranges[0], ranges[1]
        to_TM = row_ranges + padded_row((batch.to(tl.int64) * RANGES + r) * 2, row_blocks) + query_TM
        tl.store(to_TM, lo_TM, mask=query_TM < row_blocks * PADDING)
        tl.store(to_TM + row_blocks * PADDING, hi_TM, mask=query_TM < row_blocks * PADDING)
        lo_min_T, lo_max_T, hi_min_T, hi_max_T = extremes(lo_TM, hi_TM, idle_TM, 1)
        pointers = tile_extremes + (batch.to(tl.int64) * RANGES + r) * 4 * query_tiles + tile_T
        within = tile_T < query_tiles
        tl.store(pointers, lo_min_T, mask=within)
        tl.store(pointers + query_tiles, lo_max_T, mask=within)
        tl.store(pointers + 2 * query_tiles, hi_min_T, mask=within)
        tl.store(pointers + 3 * query_tiles, hi_max_T, mask=within)


# Scores


@triton.jit
def scores(product, factor, cap, SOFTCAP: tl.constexpr):
    """x and its unit: x · unit are scores in units of log 2, so that exp2 gives their exponentials.

    product: query times key. Scores are factor · product, or with a soft cap, cap · tanh(factor · product).
    """
    if SOFTCAP:
        x, unit = tanh(product * factor), cap
    else:
        x, unit = product, factor
    return x, unit


@triton.jit
def slope(x, SOFTCAP: tl.constexpr):
    """The slope of `scores` over factor · cap, or over factor."""
    return 1 - x * x if SOFTCAP else 1.0

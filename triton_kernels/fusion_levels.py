"""The kernels that merge normalised levels of one encoder, forward and backward; products are cuBLAS's.

    v̂_l = (v_l − mean_l) · rstd_l    m = Σ_l α_l (γ_l v̂_l + β_l)    over the levels of a group

A *group* is what one projection sees: all levels where they share it, else one level. Every sum is made by
one program, in a fixed order, without atomics.

The levels are tensors of their own, so kernels find them by a table: a row of ENTRIES integers a level, which
`table_kernel` makes of its own arguments. So the host copies nothing to the GPU (a CUDA graph can hold the
call), and how many levels there are is a run-time number; unrolled over a tuple of pointers, a kernel would
be compiled for each number of levels, and grow with it.

Letters at the end of a name say the shape: R rows (tokens of all images) of a tile, C channels, padded to a
power of two. Offsets among rows have 64 bits.
"""

import triton
import triton.language as tl

# Address, strides of images and of tokens in units of VECTOR elements, address of the gradient.
ENTRIES = tl.constexpr(4)
# Arguments that differ from call to call. Triton would compile anew where one of them becomes 1 or stops
# being a multiple of 16, so it is told not to look.
RUNTIME = ("entries", "rows", "tokens", "first", "depth", "tiles", "eps")


@triton.jit(do_not_specialize=RUNTIME)
def table_kernel(entries, table):
    """Writes numbers that the host knows into the memory of the GPU. One program."""
    for i in tl.static_range(len(entries)):
        tl.store(table + i, entries[i])


@triton.jit
def load_level(
    table, level, end, like, row_R, column_C, rows, tokens, SIZE_C: tl.constexpr, VECTOR: tl.constexpr
):
    """Rows of a level before `end`, of the dtype that `like` points to; 0 where there is nothing. Addresses
    are multiples of VECTOR elements."""
    BYTES: tl.constexpr = VECTOR * like.dtype.element_ty.primitive_bitwidth // 8
    entry = table + tl.minimum(level, end - 1) * ENTRIES
    source = tl.multiple_of(tl.load(entry).to(like.dtype), BYTES)
    offset_R = (row_R // tokens * tl.load(entry + 1) + row_R % tokens * tl.load(entry + 2)) * VECTOR
    within_R = row_R < tl.where(level < end, rows, 0)
    pointers = source + (offset_R[:, None] + column_C[None, :])
    return tl.load(pointers, mask=within_R[:, None] & (column_C < SIZE_C)[None, :], other=0.0)


@triton.jit
def load_channels(parameter, level, column_C, STRIDE: tl.constexpr, SIZE_C: tl.constexpr):
    """A level's row of γ; STRIDE 0 where the levels share it. 0 in channels that are not there."""
    pointers = parameter + level * STRIDE + column_C
    return tl.load(pointers, mask=column_C < SIZE_C, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=RUNTIME)
def merge_kernel(
    table,
    alpha,
    ln_weight,
    beta,
    merged,
    mean,
    rstd,
    rows: tl.int64,
    tokens: tl.int64,
    first: tl.int32,
    depth: tl.int32,
    eps: tl.float32,
    SIZE_C: tl.constexpr,
    LN_STRIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """merged [rows, groups, C]: m of groups of `depth` levels each, from level `first` on; and, where they
    are wanted, mean and rstd [L, rows]. beta fp32 [·, C]: Σ α_l β_l of every group. Program: a tile of rows,
    a group. The rows of the next level are loaded while those of one are worked on."""
    group = tl.program_id(1)
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_C = tl.arange(0, BLOCK_C)
    within_R = row_R < rows
    within_RC = within_R[:, None] & (column_C < SIZE_C)[None, :]
    begin = first + group * depth
    end = begin + depth
    next_RC = load_level(table, begin, end, alpha, row_R, column_C, rows, tokens, SIZE_C, VECTOR)
    merged_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for level in tl.range(begin, end):
        value_RC = next_RC.to(tl.float32)
        next_RC = load_level(table, level + 1, end, alpha, row_R, column_C, rows, tokens, SIZE_C, VECTOR)
        mean_R = tl.sum(value_RC, 1) / SIZE_C
        value_RC = tl.where(within_RC, value_RC - mean_R[:, None], 0.0)
        rstd_R = tl.rsqrt(tl.sum(value_RC * value_RC, 1) / SIZE_C + eps)
        if mean is not None:
            tl.store(mean + level * rows + row_R, mean_R, mask=within_R)
            tl.store(rstd + level * rows + row_R, rstd_R, mask=within_R)
        value_RC *= (rstd_R * tl.load(alpha + level).to(tl.float32))[:, None]
        if ln_weight is not None:
            value_RC *= load_channels(ln_weight, level, column_C, LN_STRIDE, SIZE_C)[None, :]
        merged_RC += value_RC
    if beta is not None:
        merged_RC += load_channels(beta, first + group, column_C, SIZE_C, SIZE_C)[None, :]
    pointers = merged + (row_R * tl.num_programs(1) + group)[:, None] * SIZE_C + column_C[None, :]
    tl.store(pointers, merged_RC.to(merged.dtype.element_ty), mask=within_RC)


@triton.jit(do_not_specialize=RUNTIME)
def merge_backward_kernel(
    table,
    alpha,
    ln_weight,
    beta,
    grad_merged,
    mean,
    rstd,
    merged,
    weight_parts,
    bias_parts,
    rows: tl.int64,
    tokens: tl.int64,
    first: tl.int32,
    depth: tl.int32,
    tiles: tl.int32,
    SIZE_C: tl.constexpr,
    LN_STRIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    GRAD_LEVELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From dm (grad_merged [groups, rows, C]), what is wanted of: the gradients of the levels; m itself, again
    [rows, groups, C]; and sums over each program's rows, weight_parts fp32 [programs, levels, C]: Σ dm ⊙ v̂_l,
    and bias_parts fp32 [programs, groups, C]: Σ dm. Program: `tiles` tiles of rows, a group.

    A program adds to its own part of weight_parts tile by tile: the L2 cache holds it, and what is left to
    add up afterwards is small.
    """
    program, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column_C = tl.arange(0, BLOCK_C)
    within_C = column_C < SIZE_C
    begin = first + group * depth
    end = begin + depth
    part = program.to(tl.int64) * groups + group
    bias_C = tl.zeros([BLOCK_C], tl.float32)
    for tile in tl.range(0, tiles):
        row_R = (program.to(tl.int64) * tiles + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        within_R = row_R < rows
        within_RC = within_R[:, None] & within_C[None, :]
        grad_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        if grad_merged is not None:
            pointers = grad_merged + (group * rows + row_R)[:, None] * SIZE_C + column_C[None, :]
            grad_RC = tl.load(pointers, mask=within_RC, other=0.0).to(tl.float32)
        if bias_parts is not None:
            bias_C += tl.sum(grad_RC, 0)
        next_RC = load_level(table, begin, end, alpha, row_R, column_C, rows, tokens, SIZE_C, VECTOR)
        merged_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for level in tl.range(begin, end):
            value_RC = next_RC.to(tl.float32)
            next_RC = load_level(table, level + 1, end, alpha, row_R, column_C, rows, tokens, SIZE_C, VECTOR)
            mean_R = tl.load(mean + level * rows + row_R, mask=within_R, other=0.0)
            rstd_R = tl.load(rstd + level * rows + row_R, mask=within_R, other=0.0)
            value_RC = (value_RC - mean_R[:, None]) * rstd_R[:, None]
            if weight_parts is not None:
                part_C = weight_parts + (part * depth + (level - begin)) * SIZE_C + column_C
                weight_C = tl.load(part_C, mask=column_C < tl.where(tile > 0, SIZE_C, 0), other=0.0)
                tl.store(part_C, weight_C + tl.sum(grad_RC * value_RC, 0), mask=within_C)
            gain_C = tl.full([BLOCK_C], tl.load(alpha + level), tl.float32)
            if ln_weight is not None:
                gain_C *= load_channels(ln_weight, level, column_C, LN_STRIDE, SIZE_C)
            if merged is not None:
                merged_RC += value_RC * gain_C[None, :]
            if GRAD_LEVELS:
                scaled_RC = grad_RC * gain_C[None, :]
                along_R = tl.sum(scaled_RC * value_RC, 1) / SIZE_C
                scaled_RC -= (tl.sum(scaled_RC, 1) / SIZE_C)[:, None]
                scaled_RC = (scaled_RC - value_RC * along_R[:, None]) * rstd_R[:, None]
                target = tl.multiple_of(tl.load(table + level * ENTRIES + 3).to(alpha.dtype), 16)
                pointers = target + row_R[:, None] * SIZE_C + column_C[None, :]
                tl.store(pointers, scaled_RC.to(alpha.dtype.element_ty), mask=within_RC)
        if merged is not None:
            if beta is not None:
                merged_RC += load_channels(beta, first + group, column_C, SIZE_C, SIZE_C)[None, :]
            pointers = merged + (row_R * groups + group)[:, None] * SIZE_C + column_C[None, :]
            tl.store(pointers, merged_RC.to(merged.dtype.element_ty), mask=within_RC)
        tl.debug_barrier()  # the part that another thread may have written is read in the next tile
    if bias_parts is not None:
        tl.store(bias_parts + part * SIZE_C + column_C, bias_C, mask=within_C)

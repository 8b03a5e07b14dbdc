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
    """Writes numbers n that the host knows, given as 2n + 3, into the memory of the GPU. One program.

    In a tuple, Triton compiles 1 and multiples of 16 in and cannot be told not to; none of these is one.
    """
    for i in tl.static_range(len(entries)):
        tl.store(table + i, entries[i] // 2 - 1)


@triton.jit
def load_level(
    table, level, end, like, image_R, token_R, row_R, column_C, rows, SIZE_C: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Rows of a level before `end`, of the dtype that `like` points to; 0 where there is nothing. Addresses
    are multiples of VECTOR elements."""
    BYTES: tl.constexpr = VECTOR * like.dtype.element_ty.primitive_bitwidth // 8
    entry = table + tl.minimum(level, end - 1) * ENTRIES
    source = tl.multiple_of(tl.load(entry).to(like.dtype), BYTES)
    offset_R = (image_R * tl.load(entry + 1) + token_R * tl.load(entry + 2)) * VECTOR
    within_R = row_R < tl.where(level < end, rows, 0)
    pointers = source + (offset_R[:, None] + column_C[None, :])
    return tl.load(pointers, mask=within_R[:, None] & (column_C < SIZE_C)[None, :], other=0.0)


@triton.jit
def load_channels(parameter, level, column_C, SIZE_C: tl.constexpr):
    """A row of a parameter [·, C] in float32; 0 in channels that are not there."""
    return tl.load(parameter + level * SIZE_C + column_C, mask=column_C < SIZE_C, other=0.0).to(tl.float32)


@triton.jit
def add_to_part(part, sum_C, tile, column_C, SIZE_C: tl.constexpr):
    """Adds to a row of a program's own sums, which its first tile begins."""
    before_C = tl.load(part + column_C, mask=column_C < tl.where(tile > 0, SIZE_C, 0), other=0.0)
    tl.store(part + column_C, before_C + sum_C, mask=column_C < SIZE_C)


@triton.jit
def store_group(
    merged, merged_RC, ln_weight, beta, first, row_R, within_RC, column_C, SIZE_C: tl.constexpr,
    GROUPS_HAVE_GAMMA: tl.constexpr,
):  # fmt: skip
    """Writes m of a group, given without the γ of the group and its β, into merged [rows, groups, C]."""
    index = first + tl.program_id(1)
    if ln_weight is not None:
        merged_RC *= load_channels(ln_weight, index * GROUPS_HAVE_GAMMA, column_C, SIZE_C)[None, :]
    if beta is not None:
        merged_RC += load_channels(beta, index, column_C, SIZE_C)[None, :]
    pointers = merged + (row_R * tl.num_programs(1) + tl.program_id(1))[:, None] * SIZE_C + column_C[None, :]
    tl.store(pointers, merged_RC.to(merged.dtype.element_ty), mask=within_RC)


@triton.jit(do_not_specialize=RUNTIME)
def merge_kernel(
    table,
    alpha,
    ln_weight,
    ln_weights,
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
    VECTOR: tl.constexpr,
    GROUPS_HAVE_GAMMA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """merged [rows, groups, C]: m of groups of `depth` levels each, from level `first` on; and, where they
    are wanted, mean and rstd [L, rows]. Program: a tile of rows, a group.

    γ is ln_weight [1, C], or [groups, C] where GROUPS_HAVE_GAMMA, or, of each level of the one group,
    ln_weights [L, C]; beta fp32 [·, C] is Σ α_l β_l of every group. The rows of the next level are loaded
    while those of one are worked on.
    """
    group = tl.program_id(1)
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_C = tl.arange(0, BLOCK_C)
    within_R = row_R < rows
    within_RC = within_R[:, None] & (column_C < SIZE_C)[None, :]
    image_R, token_R = row_R // tokens, row_R % tokens
    begin = first + group * depth
    end = begin + depth
    next_RC = load_level(table, begin, end, alpha, image_R, token_R, row_R, column_C, rows, SIZE_C, VECTOR)
    merged_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for level in tl.range(begin, end):
        value_RC = next_RC.to(tl.float32)
        next_RC = load_level(
            table, level + 1, end, alpha, image_R, token_R, row_R, column_C, rows, SIZE_C, VECTOR
        )
        mean_R = tl.sum(value_RC, 1) / SIZE_C
        value_RC -= mean_R[:, None]
        if BLOCK_C != SIZE_C:
            value_RC = tl.where((column_C < SIZE_C)[None, :], value_RC, 0.0)
        rstd_R = tl.rsqrt(tl.sum(value_RC * value_RC, 1) / SIZE_C + eps)
        if mean is not None:
            tl.store(mean + level * rows + row_R, mean_R, mask=within_R)
            tl.store(rstd + level * rows + row_R, rstd_R, mask=within_R)
        if ln_weights is not None:
            value_RC *= load_channels(ln_weights, level, column_C, SIZE_C)[None, :]
        merged_RC += value_RC * (rstd_R * tl.load(alpha + level).to(tl.float32))[:, None]
    store_group(
        merged, merged_RC, ln_weight, beta, first, row_R, within_RC, column_C, SIZE_C, GROUPS_HAVE_GAMMA
    )


@triton.jit(do_not_specialize=RUNTIME)
def merge_backward_kernel(
    table,
    alpha,
    ln_weight,
    ln_weights,
    beta,
    grad_merged,
    mean,
    rstd,
    merged,
    alpha_parts,
    weight_parts,
    bias_parts,
    rows: tl.int64,
    tokens: tl.int64,
    first: tl.int32,
    depth: tl.int32,
    tiles: tl.int32,
    SIZE_C: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS_HAVE_GAMMA: tl.constexpr,
    GRAD_LEVELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What is wanted of these, from dm (grad_merged [groups, rows, C]): the gradients of the levels; m, again
    [rows, groups, C]; and sums over each program's rows, in float32: alpha_parts [programs, levels]:
    Σ dm · γ_l v̂_l; weight_parts: Σ dm ⊙ Σ_l α_l v̂_l, [programs, groups, C], or with ln_weights those of each
    level, [programs, L, C]; bias_parts [programs, groups, C]: Σ dm. Program: `tiles` tiles of rows, a group.

    What is summed for each level, a program adds to its own part tile by tile: the L2 cache holds it, and
    what is left to add up afterwards is small.
    """
    program, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column_C = tl.arange(0, BLOCK_C)
    within_C = column_C < SIZE_C
    begin = first + group * depth
    end = begin + depth
    part = program.to(tl.int64) * groups + group
    weight_C = tl.zeros([BLOCK_C], tl.float32)
    bias_C = tl.zeros([BLOCK_C], tl.float32)
    for tile in tl.range(0, tiles):
        row_R = (program.to(tl.int64) * tiles + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        row_R1 = row_R[:, None]
        within_R1 = row_R1 < rows
        within_RC = within_R1 & within_C[None, :]
        image_R, token_R = row_R // tokens, row_R % tokens
        grad_pointers = grad_merged
        grad_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        if grad_merged is not None:
            grad_pointers = grad_merged + (group * rows + row_R1) * SIZE_C + column_C[None, :]
            grad_RC = tl.load(grad_pointers, mask=within_RC, other=0.0).to(tl.float32)
        if bias_parts is not None:
            bias_C += tl.sum(grad_RC, 0)
        scaled_RC = grad_RC
        if ln_weight is not None:
            row = (first + group) * GROUPS_HAVE_GAMMA
            scaled_RC *= load_channels(ln_weight, row, column_C, SIZE_C)[None, :]
        sum_R1 = tl.sum(scaled_RC, 1)[:, None] / SIZE_C
        next_RC = load_level(
            table, begin, end, alpha, image_R, token_R, row_R, column_C, rows, SIZE_C, VECTOR
        )
        merged_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for level in tl.range(begin, end):
            value_RC = next_RC.to(tl.float32)
            next_RC = load_level(
                table, level + 1, end, alpha, image_R, token_R, row_R, column_C, rows, SIZE_C, VECTOR
            )
            rstd_R1 = tl.load(rstd + level * rows + row_R1, mask=within_R1, other=0.0)
            value_RC -= tl.load(mean + level * rows + row_R1, mask=within_R1, other=0.0)
            value_RC *= rstd_R1
            scale = tl.load(alpha + level).to(tl.float32)
            level_part = part * depth + (level - begin)
            if ln_weights is not None:
                gamma_1C = load_channels(ln_weights, level, column_C, SIZE_C)[None, :]
                if weight_parts is not None:
                    sum_C = tl.sum(grad_RC * value_RC, 0) * scale
                    add_to_part(weight_parts + level_part * SIZE_C, sum_C, tile, column_C, SIZE_C)
                merged_RC += value_RC * gamma_1C * scale
                scaled_RC = grad_RC * gamma_1C
                sum_R1 = tl.sum(scaled_RC, 1)[:, None] / SIZE_C
            else:
                merged_RC += value_RC * scale
            along_R1 = tl.sum(scaled_RC * value_RC, 1)[:, None]
            if alpha_parts is not None:
                add_to_part(alpha_parts + level_part, tl.sum(along_R1, 0), tile, tl.arange(0, 1), 1)
            if GRAD_LEVELS:
                value_RC = ((scaled_RC - sum_R1) - value_RC * (along_R1 / SIZE_C)) * (rstd_R1 * scale)
                target = tl.multiple_of(tl.load(table + level * ENTRIES + 3).to(alpha.dtype), 16)
                pointers = target + row_R1 * SIZE_C + column_C[None, :]
                tl.store(pointers, value_RC.to(alpha.dtype.element_ty), mask=within_RC)
        if weight_parts is not None and ln_weight is not None:
            # Loaded again: kept, it would take registers from the loop.
            weight_C += tl.sum(tl.load(grad_pointers, mask=within_RC, other=0.0) * merged_RC, 0)
        if merged is not None:
            store_group(
                merged,
                merged_RC,
                ln_weight,
                beta,
                first,
                row_R,
                within_RC,
                column_C,
                SIZE_C,
                GROUPS_HAVE_GAMMA,
            )
        tl.debug_barrier()  # what one thread wrote of a part, another may read in the next tile
    if weight_parts is not None and ln_weight is not None:
        tl.store(weight_parts + part * SIZE_C + column_C, weight_C, mask=within_C)
    if bias_parts is not None:
        tl.store(bias_parts + part * SIZE_C + column_C, bias_C, mask=within_C)

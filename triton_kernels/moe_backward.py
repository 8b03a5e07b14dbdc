"""The backward kernels of the experts' MLP: from x and the pre-activation alone.

    G_s = W2_eᵀ dy_t    dweight_s = G_s·a_s + dy_t·b2_e    dh_s by the activation's slope from weight_s G_s
    dx_t = Σ_s W1_eᵀ dh_s    dW1_e = Σ_s dh_s x_tᵀ    dW2_e = Σ_s weight_s dy_t a_sᵀ
    db1_e = Σ_s dh_s    db2_e = Σ_s weight_s dy_t    for slot s of expert e and token t

No atomics: every sum is made by one program, in a fixed order. Letters and terms: see `moe_tiles`.
"""

import triton
import triton.language as tl
from pyvlm.triton_kernels.common import (
    activate,
    dot,
    halves,
    load_columns_within,
    load_rows_within,
    store_rows,
    tile_of,
)
from pyvlm.triton_kernels.moe_tiles import RUNTIME, load_index, product, slots_of, slots_of_tile


@triton.jit
def differentiate(
    grad_MN, weight_M, hidden, grad_hidden, weighted_act, slot_M, within_M, column_N, SIZE_I: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Writes what is wanted of dh and weight · a in some columns of a; returns their share in G·a."""
    SIZE_U: tl.constexpr = 2 * SIZE_I if GATED else SIZE_I
    within_N = column_N < SIZE_I
    hidden_MN = load_rows_within(hidden, slot_M, within_M, column_N, within_N, SIZE_U).to(tl.float32)
    act_MN, slope_MN = activate(hidden_MN, ACTIVATION)
    grad_act_MN = grad_MN * weight_M[:, None]
    if GATED:
        up_MN = load_rows_within(hidden + SIZE_I, slot_M, within_M, column_N, within_N, SIZE_U).to(tl.float32)
        if grad_hidden is not None:
            grad_up_MN = grad_act_MN * act_MN
            store_rows(grad_hidden + SIZE_I, grad_up_MN, slot_M, within_M, column_N, within_N, SIZE_U)
        act_MN *= up_MN
        slope_MN *= up_MN
    if grad_hidden is not None:
        store_rows(grad_hidden, grad_act_MN * slope_MN, slot_M, within_M, column_N, within_N, SIZE_U)
    if weighted_act is not None:
        store_rows(weighted_act, act_MN * weight_M[:, None], slot_M, within_M, column_N, within_N, SIZE_I)
    return tl.sum(grad_MN * act_MN, 1)


@triton.jit(do_not_specialize=RUNTIME)
def grad_hidden_kernel(
    grad_y,
    token,
    weight,
    down,
    hidden,
    expert_offsets,
    tile_expert,
    tile_slot,
    grad_hidden,
    weighted_act,
    weight_parts,
    tokens: tl.int32,
    slots: tl.int32,
    row_tiles: tl.int32,
    SIZE_H: tl.constexpr,
    SIZE_I: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What is wanted of dh [S, U], weight · a [S, I], and the share that each tile of columns has in G·a:
    weight_parts [column tiles, S]. Program: a row tile, some columns of a."""
    BLOCK: tl.constexpr = (BLOCK_M, BLOCK_N, BLOCK_K)
    tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(SIZE_I, BLOCK_N), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    _, slot_M, within_M = slots_of_tile(expert_offsets, tile_slot, tile, expert, slots, BLOCK_M)
    column = column_tile * BLOCK_N
    grad_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if grad_hidden is not None or weight_parts is not None:
        token_M = load_index(token, slot_M, within_M, tokens)
        grad_MN = product(
            grad_y, token_M, 0, down, expert, column, SIZE_H, SIZE_I, 0, False, BLOCK, PRECISION, False,
            DESCRIPTORS
        )[0]  # fmt: skip
    weight_M = tl.load(weight + slot_M, mask=within_M, other=0.0)
    part_M = tl.zeros([BLOCK_M], tl.float32)
    grad_halves = halves(grad_MN)
    for i in tl.static_range(2):
        column_N = column + i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        part_M += differentiate(
            grad_halves[i], weight_M, hidden, grad_hidden, weighted_act, slot_M, within_M, column_N, SIZE_I,
            ACTIVATION, GATED
        )  # fmt: skip
    if weight_parts is not None:
        tl.store(weight_parts + column_tile.to(tl.int64) * slots + slot_M, part_M, mask=within_M)


@triton.jit(do_not_specialize=RUNTIME)
def grad_weight_kernel(
    grad_y,
    token,
    down_bias,
    weight_parts,
    expert_offsets,
    tile_expert,
    tile_slot,
    grad_weight,
    tokens: tl.int32,
    slots: tl.int32,
    parts: tl.int32,
    SIZE_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_weight [S], of the router's weights. Program: a row tile."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    _, slot_M, within_M = slots_of_tile(expert_offsets, tile_slot, tile, expert, slots, BLOCK_M)
    grad_M = tl.zeros([BLOCK_M], tl.float32)
    part_M = weight_parts + slot_M
    for _ in tl.range(parts):
        grad_M += tl.load(part_M, mask=within_M, other=0.0)
        part_M += slots
    if down_bias is not None:
        token_M = load_index(token, slot_M, within_M, tokens)
        bias = down_bias + expert.to(tl.int64) * SIZE_H
        dot_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for column in tl.range(0, SIZE_H, BLOCK_N):
            column_N = column + tl.arange(0, BLOCK_N)
            bias_N = tl.load(bias + column_N, mask=column_N < SIZE_H, other=0.0).to(tl.float32)
            grad_y_MN = load_rows_within(grad_y, token_M, within_M, column_N, column_N < SIZE_H, SIZE_H)
            dot_MN += grad_y_MN.to(tl.float32) * bias_N[None, :]
        grad_M += tl.sum(dot_MN, 1)
    tl.store(grad_weight + slot_M, grad_M, mask=within_M)


@triton.jit(do_not_specialize=RUNTIME)
def grad_rows_kernel(
    grad_hidden,
    gate_up,
    expert_offsets,
    tile_expert,
    tile_slot,
    rows,
    slots: tl.int32,
    row_tiles: tl.int32,
    SIZE_H: tl.constexpr,
    SIZE_U: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """rows [S, H]: what each slot adds to the gradient of its token. Program: a row tile, some columns."""
    BLOCK: tl.constexpr = (BLOCK_M, BLOCK_N, BLOCK_K)
    tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(SIZE_H, BLOCK_N), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first_slot, slot_M, within_M = slots_of_tile(expert_offsets, tile_slot, tile, expert, slots, BLOCK_M)
    column = column_tile * BLOCK_N
    row_M = tl.minimum(slot_M, slots - 1)
    rows_MN = product(
        grad_hidden, row_M, first_slot, gate_up, expert, column, SIZE_U, SIZE_H, 0, False, BLOCK, PRECISION,
        DESCRIPTORS, DESCRIPTORS
    )[0]  # fmt: skip
    column_N = column + tl.arange(0, BLOCK_N)
    store_rows(rows, rows_MN, slot_M, within_M, column_N, column_N < SIZE_H, SIZE_H)


@triton.jit(do_not_specialize=RUNTIME)
def grad_matrix_kernel(
    left,
    right,
    token,
    expert_offsets,
    grad_matrix,
    tokens: tl.int32,
    slots: tl.int32,
    SIZE_M: tl.constexpr,
    SIZE_N: tl.constexpr,
    LEFT_OF_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """grad_matrix [E, SIZE_M, SIZE_N]: Σ_s left_sᵀ right_s over each expert's slots; zero without any.

    One of left [·, SIZE_M] and right [·, SIZE_N] has a row a token, the other a row a slot. Program: a tile
    of an expert's matrix.
    """
    ROW_TILES: tl.constexpr = (SIZE_M + BLOCK_M - 1) // BLOCK_M
    COLUMN_TILES: tl.constexpr = (SIZE_N + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // (ROW_TILES * COLUMN_TILES)
    tile, column_tile = tile_of(tl.program_id(0) % (ROW_TILES * COLUMN_TILES), ROW_TILES, COLUMN_TILES, GROUP)
    begin, end = slots_of(expert_offsets, expert, True, slots)
    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    slot_K = begin + tl.arange(0, BLOCK_K)
    token_K = load_index(token, slot_K, slot_K < end, tokens)
    for _ in tl.range(begin, end, BLOCK_K):
        within_K = slot_K < end
        left_K = token_K if LEFT_OF_TOKENS else slot_K
        right_K = slot_K if LEFT_OF_TOKENS else token_K
        left_MK = load_columns_within(left, left_K, within_K, row_M, row_M < SIZE_M, SIZE_M)
        right_KN = load_rows_within(right, right_K, within_K, column_N, column_N < SIZE_N, SIZE_N)
        acc_MN = dot(left_MK, right_KN, acc_MN, PRECISION)
        slot_K += BLOCK_K  # the next tokens are read ahead: rows that wait for them would not be
        token_K = load_index(token, slot_K, slot_K < end, tokens)
    first_row = expert.to(tl.int64) * SIZE_M
    store_rows(grad_matrix, acc_MN, first_row + row_M, row_M < SIZE_M, column_N, column_N < SIZE_N, SIZE_N)


@triton.jit(do_not_specialize=RUNTIME)
def grad_bias_kernel(
    rows,
    token,
    weight,
    expert_offsets,
    grad_bias,
    tokens: tl.int32,
    slots: tl.int32,
    SIZE_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_bias [E, SIZE_N]: the sum of the rows of each expert's slots; with `token`, of rows that belong to
    tokens, times the slots' weights. Program: some columns of an expert."""
    expert = tl.program_id(0) // tl.cdiv(SIZE_N, BLOCK_N)
    column_N = tl.program_id(0) % tl.cdiv(SIZE_N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    within_N = column_N < SIZE_N
    begin, end = slots_of(expert_offsets, expert, True, slots)
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(begin, end, BLOCK_M):
        slot_M = first + tl.arange(0, BLOCK_M)
        within_M = slot_M < end
        row_M = slot_M
        if token is not None:
            row_M = load_index(token, slot_M, within_M, tokens)
        row_MN = load_rows_within(rows, row_M, within_M, column_N, within_N, SIZE_N).to(tl.float32)
        if token is not None:
            row_MN *= tl.load(weight + slot_M, mask=within_M, other=0.0)[:, None]
        sum_MN += row_MN
    pointers = grad_bias + expert.to(tl.int64) * SIZE_N + column_N
    tl.store(pointers, tl.sum(sum_MN, 0).to(grad_bias.dtype.element_ty), mask=within_N)

"""The forward kernels of the experts' MLP: two grouped GEMMs, and the sum over each token's slots.

    h_s = W1_e x_t + b1_e    a_s = act(gate of h_s) ⊙ (up of h_s), or act(h_s)    o_s = W2_e a_s + b2_e
    y_t = Σ_s weight_s o_s    for slot s of expert e and token t

Letters and terms: see `moe_tiles`.
"""

import triton
import triton.language as tl
from pyvlm.triton_kernels.common import activate, halves, store_rows, tile_of
from pyvlm.triton_kernels.moe_tiles import RUNTIME, load_index, product, slots_of_tile


@triton.jit
def finish(
    up_MN, pair_MN, bias, act, hidden, slot_M, within_M, column_N, SIZE_I: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Writes some columns of act and, where there is one, hidden. The pair is that of `product`."""
    SIZE_U: tl.constexpr = 2 * SIZE_I if GATED else SIZE_I
    within_N = column_N < SIZE_I
    if bias is not None:
        up_MN += tl.load(bias + column_N, mask=within_N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            pair_MN += tl.load(bias + SIZE_I + column_N, mask=within_N, other=0.0).to(tl.float32)[None, :]
    if hidden is not None:
        store_rows(hidden, up_MN, slot_M, within_M, column_N, within_N, SIZE_U)
        if GATED:
            store_rows(hidden + SIZE_I, pair_MN, slot_M, within_M, column_N, within_N, SIZE_U)
    act_MN = activate(up_MN, ACTIVATION)[0]
    if GATED:
        act_MN *= pair_MN
    store_rows(act, act_MN, slot_M, within_M, column_N, within_N, SIZE_I)


@triton.jit(do_not_specialize=RUNTIME)
def up_kernel(
    x,
    token,
    gate_up,
    gate_up_bias,
    expert_offsets,
    tile_expert,
    tile_slot,
    act,
    hidden,
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
    """act [S, I] and, where there is one, hidden [S, U]. Program: a row tile, some columns of act."""
    SIZE_U: tl.constexpr = 2 * SIZE_I if GATED else SIZE_I
    PAIR: tl.constexpr = SIZE_I if GATED else 0
    BLOCK: tl.constexpr = (BLOCK_M, BLOCK_N, BLOCK_K)
    tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(SIZE_I, BLOCK_N), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    _, slot_M, within_M = slots_of_tile(expert_offsets, tile_slot, tile, expert, slots, BLOCK_M)
    token_M = load_index(token, slot_M, within_M, tokens)
    column = column_tile * BLOCK_N
    up_MN, pair_MN = product(
        x, token_M, 0, gate_up, expert, column, SIZE_H, SIZE_U, PAIR, True, BLOCK, PRECISION, False,
        DESCRIPTORS
    )  # fmt: skip
    bias = gate_up_bias
    if gate_up_bias is not None:
        bias = gate_up_bias + expert.to(tl.int64) * SIZE_U
    up_halves, pair_halves = halves(up_MN), halves(pair_MN)
    for i in tl.static_range(2):
        column_N = column + i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        finish(
            up_halves[i], pair_halves[i], bias, act, hidden, slot_M, within_M, column_N, SIZE_I, ACTIVATION,
            GATED
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def down_kernel(
    act,
    weight,
    down,
    down_bias,
    expert_offsets,
    tile_expert,
    tile_slot,
    rows,
    slots: tl.int32,
    row_tiles: tl.int32,
    SIZE_H: tl.constexpr,
    SIZE_I: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """rows [S, H]: what each slot adds to its token's output. Program: a row tile, some columns."""
    BLOCK: tl.constexpr = (BLOCK_M, BLOCK_N, BLOCK_K)
    tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(SIZE_H, BLOCK_N), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first_slot, slot_M, within_M = slots_of_tile(expert_offsets, tile_slot, tile, expert, slots, BLOCK_M)
    column = column_tile * BLOCK_N
    row_M = tl.minimum(slot_M, slots - 1)
    out_MN = product(
        act, row_M, first_slot, down, expert, column, SIZE_I, SIZE_H, 0, True, BLOCK, PRECISION, DESCRIPTORS,
        DESCRIPTORS
    )[0]  # fmt: skip
    column_N = column + tl.arange(0, BLOCK_N)
    within_N = column_N < SIZE_H
    if down_bias is not None:
        bias = down_bias + expert.to(tl.int64) * SIZE_H
        out_MN += tl.load(bias + column_N, mask=within_N, other=0.0).to(tl.float32)[None, :]
    out_MN *= tl.load(weight + slot_M, mask=within_M, other=0.0)[:, None]
    store_rows(rows, out_MN, slot_M, within_M, column_N, within_N, SIZE_H)


@triton.jit(do_not_specialize=RUNTIME)
def sum_slots_kernel(
    rows,
    slot,
    token_offsets,
    out,
    slots: tl.int32,
    SIZE_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [T, H]: the sum of each token's rows of [S, H], in the order of their slots. Program: a token, some
    columns."""
    token = tl.program_id(0) // tl.cdiv(SIZE_H, BLOCK_N)
    column_N = tl.program_id(0) % tl.cdiv(SIZE_H, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.maximum(tl.load(token_offsets + token), 0)
    end = tl.minimum(tl.load(token_offsets + token + 1), slots)
    sum_N = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.range(begin, end):
        row = load_index(slot, i, True, slots).to(tl.int64)
        sum_N += tl.load(rows + row * SIZE_H + column_N, mask=column_N < SIZE_H, other=0.0).to(tl.float32)
    tl.store(
        out + token.to(tl.int64) * SIZE_H + column_N, sum_N.to(out.dtype.element_ty), mask=column_N < SIZE_H
    )

"""What the kernels of the experts' MLP share: which rows a tile has, loads and stores, products, activations.

Slots are sorted by expert. A *row tile* is up to BLOCK_M consecutive slots of one expert; how many there are
depends on the routing, which only the GPU knows. The grid has as many as there can be, and `schedule_kernel`
writes which they are.

Letters at the end of a name say the shape: M rows (slots) of a tile, N columns of it, K of the dimension that
is summed over, X entries of a list. Sizes: T tokens, E experts, S slots, H hidden, I intermediate, U rows of
gate_up (2I where gated, else I). H, I and U are compiled in; what depends on the routing never is.
"""

import triton
import triton.language as tl
from pyvlm.triton_kernels.common import dot

# Arguments that differ from call to call. Triton would compile anew where one of them becomes 1 or stops
# being a multiple of 16, so it is told not to look.
RUNTIME = ("tokens", "experts", "slots", "row_tiles", "parts")


# Which rows and columns


@triton.jit
def slots_of(expert_offsets, expert, within, slots):
    """The slots [begin, end) of an expert; none where not `within`.

    Nobody has checked a routing that lies on a GPU: that would stall it. Clamped, no index in it can make a
    kernel read or write outside its tensors.
    """
    begin = tl.load(expert_offsets + expert, mask=within, other=0)
    end = tl.load(expert_offsets + expert + 1, mask=within, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), slots)
    return begin, tl.minimum(tl.maximum(end, begin), slots)


@triton.jit
def load_index(index, position, within, size):
    """Entries of a list of indices into `size` things; 0 where not `within`."""
    value = tl.load(index + position, mask=within, other=0)
    return tl.minimum(tl.maximum(value, 0), size - 1)


@triton.jit(do_not_specialize=RUNTIME)
def schedule_kernel(
    expert_offsets,
    tile_expert,
    tile_slot,
    experts: tl.int32,
    slots: tl.int32,
    row_tiles: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """tile_expert, tile_slot int32 [row_tiles]: the expert of a row tile and its first slot; expert −1 for
    the tiles that the routing does not need. Program: an expert, or (the last one) those tiles."""
    expert = tl.program_id(0)
    before_X = tl.zeros([BLOCK_X], tl.int32)
    for first in tl.range(0, expert, BLOCK_X):
        expert_X = first + tl.arange(0, BLOCK_X)
        begin_X, end_X = slots_of(expert_offsets, expert_X, expert_X < expert, slots)
        before_X += tl.cdiv(end_X - begin_X, BLOCK_M)
    before = tl.sum(before_X, 0)
    begin, end = slots_of(expert_offsets, expert, expert < experts, slots)
    own = tl.where(expert < experts, tl.cdiv(end - begin, BLOCK_M), row_tiles - before)
    for first in tl.range(0, own, BLOCK_X):
        i_X = first + tl.arange(0, BLOCK_X)
        within_X = (i_X < own) & (before + i_X < row_tiles)
        tl.store(tile_expert + before + i_X, tl.where(expert < experts, expert, -1), mask=within_X)
        tl.store(tile_slot + before + i_X, begin + i_X * BLOCK_M, mask=within_X)


@triton.jit
def slots_of_tile(expert_offsets, tile_slot, tile, expert, slots, BLOCK_M: tl.constexpr):
    """First slot of a row tile, its slots, and which of them are the expert's."""
    first_slot = tl.load(tile_slot + tile)
    end = slots_of(expert_offsets, expert, True, slots)[1]
    slot_M = first_slot + tl.arange(0, BLOCK_M)
    return first_slot, slot_M, slot_M < end


# Loads and stores


@triton.jit
def load_rows(
    rows, row_M, first_row, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTOR: tl.constexpr
):
    """Columns [column, column + BLOCK) of some rows of a [·, WIDTH] tensor, and zeros beyond its last column.

    With DESCRIPTOR it is a tensor descriptor, and the rows are those from first_row on.
    """
    if DESCRIPTOR:
        tile = rows.load([first_row, column])
    else:
        column_N = column + tl.arange(0, BLOCK)
        pointers = rows + row_M.to(tl.int64)[:, None] * WIDTH + column_N[None, :]
        if WIDTH % BLOCK == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(column_N < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def load_matrix(
    matrices, expert, first, column, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, DESCRIPTOR: tl.constexpr, BEGIN: tl.constexpr = 0,
):  # fmt: skip
    """A block of an expert's matrix, of an [E, ROWS, WIDTH] tensor, and zeros outside the matrix.

    Blocks begin at whole multiples of their sides; of rows, behind row BEGIN.
    """
    if DESCRIPTOR:
        tile = matrices.load([expert, first, column]).reshape(BLOCK_R, BLOCK_C)
    else:
        row_R = first + tl.arange(0, BLOCK_R)
        column_C = column + tl.arange(0, BLOCK_C)
        pointers = matrices + expert.to(tl.int64) * (ROWS * WIDTH)
        pointers = pointers + row_R.to(tl.int64)[:, None] * WIDTH + column_C[None, :]
        if (ROWS - BEGIN) % BLOCK_R == 0 and WIDTH % BLOCK_C == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(row_R < ROWS)[:, None] & (column_C < WIDTH)[None, :], other=0.0)
    return tile


# Arithmetic


@triton.jit
def product(
    rows, row_M, first_row, matrices, expert, column, SIZE_K: tl.constexpr, SIZE_N: tl.constexpr,
    PAIR: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    ROW_DESCRIPTOR: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Some rows of a [·, SIZE_K] tensor times an expert's matrix, from a column of it on: float32 [M, N].

    The matrix is [SIZE_K, SIZE_N]; TRANSPOSED, it lies as [SIZE_N, SIZE_K]. PAIR: also the product with the
    columns that lie so far behind those, or 0; the second result is then the first. `BLOCK` is (BLOCK_M,
    BLOCK_N, BLOCK_K).
    """
    acc_MN = tl.zeros([BLOCK[0], BLOCK[1]], tl.float32)
    pair_MN = acc_MN
    for k in tl.range(0, SIZE_K, BLOCK[2]):
        row_MK = load_rows(rows, row_M, first_row, k, SIZE_K, BLOCK[2], ROW_DESCRIPTOR)
        if TRANSPOSED:
            matrix_NK = load_matrix(
                matrices, expert, column, k, SIZE_N, SIZE_K, BLOCK[1], BLOCK[2], DESCRIPTOR
            )
            acc_MN = dot(row_MK, matrix_NK.T, acc_MN, PRECISION)
        else:
            matrix_KN = load_matrix(
                matrices, expert, k, column, SIZE_K, SIZE_N, BLOCK[2], BLOCK[1], DESCRIPTOR
            )
            acc_MN = dot(row_MK, matrix_KN, acc_MN, PRECISION)
        if PAIR:
            other_NK = load_matrix(
                matrices, expert, column + PAIR, k, SIZE_N, SIZE_K, BLOCK[1], BLOCK[2], DESCRIPTOR, PAIR
            )
            pair_MN = dot(row_MK, other_NK.T, pair_MN, PRECISION)
    return acc_MN, pair_MN

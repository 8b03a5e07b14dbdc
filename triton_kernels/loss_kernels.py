"""The kernels of the language-model head and its loss: logits by tiles, never whole.

    x = cap(H Wᵀ + b)    loss = lse − (1 − ε) x_label − ε/V Σ x + z lse²    lse = log Σ exp x
    G = softmax(x) (1 + 2 z lse) − (1 − ε) onehot − ε/V, times the cap's slope
    dH = G W    dW = Gᵀ H    db = Σ G    times the gradient of the loss

Rows that have a label come first in `rows`; `count` of them there are, which only the GPU knows: programs
beyond return at once. No atomics: every sum is made by one program, in a fixed order. The gradient of the
loss comes in with the sums: in float16 G times that would vanish.

G is written for a block of the vocabulary at a time, the wider the fewer rows have a label (`block_of`), so
that it fits the same memory; launches for blocks that there are not return at once. It is read and written up
to the block's width, a multiple of UNIT, not up to its words: a mask by a number of which the compiler knows
nothing would load one element at a time.

dH adds up in float32 over the blocks. For these sums there is room at the end of dW, which is not written
yet (`sums_begin`). Blocks whose words lie there wait: G of theirs is made again when dH is done (`waits`).

Letters at the end of a name: M rows of a tile, N columns of it, K of the dimension that is summed over.
Sizes: T tokens, R of them with a label, H features, V words. H and V are compiled in.
"""

import triton
import triton.language as tl
from pyvlm.triton_kernels.common import (
    LOG2E,
    dot,
    halves,
    load_columns_within,
    load_rows_within,
    store_rows,
    tanh,
    tile_of,
)

# Arguments that differ from call to call: Triton is told not to compile anew for some of them.
RUNTIME = ("tokens", "row_tiles", "index", "room", "in_weight", "again", "features", "smoothing", "z_loss")
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def rows_of_tile(rows, count, tile, BLOCK_M: tl.constexpr):
    """Places of a tile's rows among those with a label, whether there are such, and which rows they are."""
    place_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    within_M = place_M < count
    return place_M, within_M, tl.load(rows + place_M, mask=within_M, other=0)


@triton.jit
def block_of(index, labeled, room, SIZE_V: tl.constexpr, UNIT: tl.constexpr, BLOCK_V: tl.constexpr):
    """Of a block of words the width, its first word and how many there are, none where it does not exist;
    a negative index counts from the end. There is room for `room` times UNIT numbers of G."""
    width = tl.minimum(room // tl.maximum(labeled, 1), BLOCK_V // UNIT) * UNIT
    if index < 0:
        index += tl.cdiv(SIZE_V, width)
    first_word = index * width
    words = tl.minimum(tl.maximum(SIZE_V - first_word, 0), width)
    return width, first_word, tl.where(index < 0, 0, words)


@triton.jit
def sums_begin(labeled, in_weight, SIZE_H: tl.constexpr, SIZE_V: tl.constexpr):
    """The place, in numbers of float32, of the sums: at the end of grad_weight, of whose numbers `in_weight`
    take the place of one, or (0) in memory of their own."""
    from_end = SIZE_H * SIZE_V // tl.maximum(in_weight, 1).to(tl.int64) - labeled.to(tl.int64) * SIZE_H
    return tl.where(in_weight > 0, from_end // 8 * 8, 0)


@triton.jit
def waits(first_word, words, labeled, in_weight, SIZE_H: tl.constexpr, SIZE_V: tl.constexpr):
    """Whether a block's grad_weight lies where the sums are, and they are not done with this block."""
    end = first_word + words
    begin = sums_begin(labeled, in_weight, SIZE_H, SIZE_V) * in_weight
    return (in_weight > 0) & (end < SIZE_V) & (end.to(tl.int64) * SIZE_H > begin)


@triton.jit
def products_of_tile(
    hidden, row_M, weight, word_N, features, SIZE_H: tl.constexpr, SIZE_V: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """H Wᵀ, float32, as two halves [M, N/2]; beyond the vocabulary those of its last word."""
    word_N = tl.minimum(word_N, SIZE_V - 1)
    column_K = tl.arange(0, BLOCK_K)
    hidden_MK = hidden + row_M.to(tl.int64)[:, None] * SIZE_H + column_K[None, :]
    weight_KN = weight + word_N.to(tl.int64)[None, :] * SIZE_H + column_K[:, None]
    product_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, features, BLOCK_K):  # SIZE_H of them: known, all steps would be written out
        if SIZE_H % BLOCK_K == 0:
            left, right = tl.load(hidden_MK + k), tl.load(weight_KN + k)
        else:
            within_K = k + column_K < SIZE_H
            left = tl.load(hidden_MK + k, mask=within_K[None, :], other=0.0)
            right = tl.load(weight_KN + k, mask=within_K[:, None], other=0.0)
        product_MN = dot(left, right, product_MN, PRECISION)
    return halves(product_MN)


@triton.jit
def logits(product_MN, bias, word_N, SIZE_V: tl.constexpr, SOFTCAP: tl.constexpr):
    """x of some words, from H Wᵀ."""
    logit_MN = product_MN
    if bias is not None:
        logit_MN += tl.load(bias + tl.minimum(word_N, SIZE_V - 1)).to(tl.float32)[None, :]
    if SOFTCAP > 0:
        logit_MN = SOFTCAP * tanh(logit_MN / SOFTCAP)
    return logit_MN


@triton.jit(do_not_specialize=RUNTIME)
def statistics_kernel(
    hidden,
    weight,
    bias,
    labels,
    rows,
    count,
    largest,
    exponentials,
    logit_sums,
    targets,
    tokens: tl.int32,
    features: tl.int32,
    row_tiles: tl.int32,
    SIZE_H: tl.constexpr,
    SIZE_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What half a tile of words leaves of each row, [half tiles, T]: the largest logit, the sum of
    exponentials and, where it is wanted, of the logits; and the label's logit, targets [T].

    Program: a tile.
    """
    tile, word_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(SIZE_V, BLOCK_N), GROUP)
    labeled = tl.load(count)
    if tile * BLOCK_M >= labeled:
        return
    place_M, within_M, row_M = rows_of_tile(rows, labeled, tile, BLOCK_M)
    label_M = tl.load(labels + row_M, mask=within_M, other=-1)
    first_word = word_tile * BLOCK_N
    product_halves = products_of_tile(
        hidden, row_M, weight, first_word + tl.arange(0, BLOCK_N), features, SIZE_H, SIZE_V, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    for i in tl.static_range(2):
        word_N = first_word + i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        within_N = (word_N < SIZE_V)[None, :]
        logit_MN = logits(product_halves[i], bias, word_N, SIZE_V, SOFTCAP)
        to_M = (2 * word_tile + i).to(tl.int64) * tokens + place_M
        if logit_sums is not None:
            tl.store(logit_sums + to_M, tl.sum(tl.where(within_N, logit_MN, 0.0), 1), mask=within_M)
        target_M = tl.sum(tl.where(word_N[None, :] == label_M[:, None], logit_MN, 0.0), 1)
        place_of_label_M = label_M - first_word - i * (BLOCK_N // 2)
        here_M = (place_of_label_M >= 0) & (place_of_label_M < BLOCK_N // 2)
        tl.store(targets + place_M, target_M, mask=within_M & here_M)
        logit_MN = tl.where(within_N, logit_MN, float("-inf"))
        largest_M = tl.maximum(tl.max(logit_MN, 1), LOWEST)
        tl.store(largest + to_M, largest_M, mask=within_M)
        sum_M = tl.sum(tl.exp2((logit_MN - largest_M[:, None]) * LOG2E), 1)
        tl.store(exponentials + to_M, sum_M, mask=within_M)


@triton.jit(do_not_specialize=RUNTIME)
def combine_kernel(
    rows,
    count,
    largest,
    exponentials,
    logit_sums,
    targets,
    lse,
    losses,
    tokens: tl.int32,
    smoothing: tl.float32,
    z_loss: tl.float32,
    HALF_TILES: tl.constexpr,
    SIZE_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """lse [T], by row, and losses [T], those with a label first. Program: some rows."""
    labeled = tl.load(count)
    if tl.program_id(0) * BLOCK_M >= labeled:
        return
    place_M, within_M, row_M = rows_of_tile(rows, labeled, tl.program_id(0), BLOCK_M)
    largest_M = tl.full([BLOCK_M], LOWEST, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    of_all_M = tl.zeros([BLOCK_M], tl.float32)
    from_M = place_M.to(tl.int64)
    for _ in tl.range(HALF_TILES):
        new_M = tl.load(largest + from_M, mask=within_M, other=LOWEST)
        both_M = tl.maximum(largest_M, new_M)
        part_M = tl.load(exponentials + from_M, mask=within_M, other=0.0)
        sum_M *= tl.exp2((largest_M - both_M) * LOG2E)
        sum_M += part_M * tl.exp2((new_M - both_M) * LOG2E)
        largest_M = both_M
        if logit_sums is not None:
            of_all_M += tl.load(logit_sums + from_M, mask=within_M, other=0.0)
        from_M += tokens
    lse_M = largest_M + tl.log2(sum_M) / LOG2E
    target_M = tl.load(targets + place_M, mask=within_M, other=0.0)
    loss_M = lse_M - (1 - smoothing) * target_M + z_loss * lse_M * lse_M
    if logit_sums is not None:
        loss_M -= smoothing / SIZE_V * of_all_M
    tl.store(lse + row_M, lse_M, mask=within_M)
    tl.store(losses + place_M, loss_M, mask=within_M)


@triton.jit(do_not_specialize=RUNTIME)
def grad_logits_kernel(
    hidden,
    weight,
    bias,
    labels,
    rows,
    count,
    lse,
    grads,
    features: tl.int32,
    index: tl.int32,
    room: tl.int32,
    in_weight: tl.int32,
    again: tl.int32,
    smoothing: tl.float32,
    z_loss: tl.float32,
    BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE_H: tl.constexpr,
    SIZE_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """G of a block of words: grads [R, its width]; beyond the last word, as far as its tile goes, something
    finite: it meets rows of 0 in the weight. `again` if it waits. Program: a tile."""
    labeled = tl.load(count)
    width, first_word, words = block_of(index, labeled, room, SIZE_V, UNIT, BLOCK_V)
    row_tiles, word_tiles = tl.cdiv(labeled, BLOCK_M), tl.cdiv(words, BLOCK_N)
    is_done = (again > 0) & (not waits(first_word, words, labeled, in_weight, SIZE_H, SIZE_V))
    if (tl.program_id(0) >= row_tiles * word_tiles) | is_done:
        return
    tile, word_tile = tile_of(tl.program_id(0), row_tiles, word_tiles, GROUP)
    place_M, within_M, row_M = rows_of_tile(rows, labeled, tile, BLOCK_M)
    lse_M = tl.load(lse + row_M, mask=within_M, other=0.0)
    label_M = tl.load(labels + row_M, mask=within_M, other=-1)
    first_column = word_tile * BLOCK_N
    product_halves = products_of_tile(
        hidden, row_M, weight, first_word + first_column + tl.arange(0, BLOCK_N), features, SIZE_H, SIZE_V,
        PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    for i in tl.static_range(2):
        column_N = first_column + i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        word_N = first_word + column_N
        logit_MN = logits(product_halves[i], bias, word_N, SIZE_V, SOFTCAP)
        grad_MN = tl.exp2((logit_MN - lse_M[:, None]) * LOG2E) * (1 + 2 * z_loss * lse_M)[:, None]
        grad_MN -= tl.where(word_N[None, :] == label_M[:, None], 1 - smoothing, 0.0) + smoothing / SIZE_V
        if SOFTCAP > 0:
            bent_MN = logit_MN / SOFTCAP
            grad_MN *= 1 - bent_MN * bent_MN
        store_rows(grads, grad_MN, place_M, within_M, column_N, column_N < width, width)


@triton.jit(do_not_specialize=RUNTIME)
def grad_hidden_kernel(
    grads,
    weight,
    rows,
    count,
    scale,
    sums,
    grad_hidden,
    row_tiles: tl.int32,
    index: tl.int32,
    room: tl.int32,
    in_weight: tl.int32,
    BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE_H: tl.constexpr,
    SIZE_V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """sums [R, H], float32: G·W of all blocks so far. After the last block grad_hidden [T, H]. Program: a
    tile."""
    tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(SIZE_H, BLOCK_N), GROUP)
    labeled = tl.load(count)
    width, first_word, words = block_of(index, labeled, room, SIZE_V, UNIT, BLOCK_V)
    if (tile * BLOCK_M >= labeled) | (words == 0):
        return
    place_M, within_M, row_M = rows_of_tile(rows, labeled, tile, BLOCK_M)
    column_N = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    within_N = column_N < SIZE_H
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, words, BLOCK_K):
        word_K = k + tl.arange(0, BLOCK_K)
        grad_MK = load_rows_within(grads, place_M, within_M, word_K, word_K < width, width)
        weight_KN = load_rows_within(weight, first_word + word_K, word_K < words, column_N, within_N, SIZE_H)
        sum_MN = dot(grad_MK, weight_KN, sum_MN, PRECISION)
    sum_halves, begin = halves(sum_MN), sums + sums_begin(labeled, in_weight, SIZE_H, SIZE_V)
    for i in tl.static_range(2):
        half_N = column_tile * BLOCK_N + i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        half_MN = sum_halves[i]
        if first_word > 0:
            half_MN += load_rows_within(begin, place_M, within_M, half_N, half_N < SIZE_H, SIZE_H)
        if first_word + words < SIZE_V:
            store_rows(begin, half_MN, place_M, within_M, half_N, half_N < SIZE_H, SIZE_H)
        else:
            half_MN *= tl.load(scale)
            store_rows(grad_hidden, half_MN, row_M, within_M, half_N, half_N < SIZE_H, SIZE_H)


@triton.jit(do_not_specialize=RUNTIME)
def grad_weight_kernel(
    grads,
    hidden,
    rows,
    count,
    scale,
    grad_weight,
    index: tl.int32,
    room: tl.int32,
    in_weight: tl.int32,
    again: tl.int32,
    BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE_H: tl.constexpr,
    SIZE_V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """grad_weight [V, H] of the words of a block: Gᵀ·H, if it does not wait, and `again` if it does. Program:
    a tile."""
    labeled = tl.load(count)
    width, first_word, words = block_of(index, labeled, room, SIZE_V, UNIT, BLOCK_V)
    word_tiles, column_tiles = tl.cdiv(words, BLOCK_M), tl.cdiv(SIZE_H, BLOCK_N)
    is_other = waits(first_word, words, labeled, in_weight, SIZE_H, SIZE_V) != (again > 0)
    if (tl.program_id(0) >= word_tiles * column_tiles) | is_other:
        return
    tile, column_tile = tile_of(tl.program_id(0), word_tiles, column_tiles, GROUP)
    word_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    within_M, within_N = word_M < words, column_N < SIZE_H
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    place_K = tl.arange(0, BLOCK_K)
    row_K = tl.load(rows + place_K, mask=place_K < labeled, other=0)
    for _ in tl.range(0, labeled, BLOCK_K):
        within_K = place_K < labeled
        grad_MK = load_columns_within(grads, place_K, within_K, word_M, word_M < width, width)
        hidden_KN = load_rows_within(hidden, row_K, within_K, column_N, within_N, SIZE_H)
        sum_MN = dot(grad_MK, hidden_KN, sum_MN, PRECISION)
        place_K += BLOCK_K  # the next rows are read ahead: loads that wait for them would not be
        row_K = tl.load(rows + place_K, mask=place_K < labeled, other=0)
    sum_MN *= tl.load(scale)
    store_rows(grad_weight, sum_MN, first_word + word_M, within_M, column_N, within_N, SIZE_H)


@triton.jit(do_not_specialize=RUNTIME)
def grad_bias_kernel(
    grads,
    count,
    scale,
    grad_bias,
    index: tl.int32,
    room: tl.int32,
    BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_bias [V] of the words of a block: the sum of G's rows. Program: some words."""
    labeled = tl.load(count)
    width, first_word, words = block_of(index, labeled, room, SIZE_V, UNIT, BLOCK_V)
    column_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within_N = column_N < words
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, labeled, BLOCK_M):
        place_M = first + tl.arange(0, BLOCK_M)
        within_M = place_M < labeled
        grad_MN = load_rows_within(grads, place_M, within_M, column_N, column_N < width, width)
        sum_MN += grad_MN.to(tl.float32)
    sum_N = tl.sum(sum_MN, 0) * tl.load(scale)
    tl.store(grad_bias + first_word + column_N, sum_N.to(grad_bias.dtype.element_ty), mask=within_N)

"""Attention of a grid's queries to their windows of several maps, on NVIDIA GPUs: kernels and launchers.

A program is one query of one image and head: it reads the query's windows of all maps, a tile of keys at a
time, under one softmax that is carried from tile to tile. The maps come as tuples, and how many they are and
the sides of their windows are compiled in: so one launch does them all, and no state of a softmax goes
through memory, as it would with a launch a map. A key belongs to the window of one query: the backward writes
its gradients once, and nothing is summed over programs.

Letters at the end of a name say the shape: W keys of a tile, D head features (padded to a power of two).
Sizes: N images, A attention heads, Q queries, T tokens of a map.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from pyvlm.triton_kernels.common import DTYPES, LOG2E, launch, next_power_of_2
from torch import Tensor

# Arguments that differ from call to call: Triton must not compile anew for some of their values. Strides it
# may look at: a model's are all multiples of 16 or none is, and where they are 16 bytes are loaded at once.
RUNTIME = ("heads", "queries", "columns", "scale")


@dataclass(frozen=True)
class Tiles:
    """How many elements a tile of keys has at most, and the warps of a program."""

    elements: int = 1024
    warps: int = 1
    stages: int = 1


# With these no registers spill (tests/fusion/cross_attention_triton_aot.json); not yet measured on a GPU.
TILES = Tiles()


def local_cross_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: int,
    columns: int,
    masks: Sequence[Tensor],
    scale: float,
    tiles: Tiles = TILES,
) -> tuple[Tensor, Tensor]:
    """The op `pyvlm::local_cross_attention`, of arguments that `pyvlm.ops.cross_attention` has checked.

    Args:
        query: `[N, A, Q, D]`, fp32, bf16 or fp16.
        keys, values: a map each, `[N, A, T, D]`; they are read in place where D is contiguous.
        rows, columns: of the grid of queries.
        masks: bool `[N, T]`, or empty.
        scale: of the scores.
        tiles: other than the default ones, for tests and measurements.

    Returns:
        out `[N, A, Q, D]`, which lies as `[N, Q, A, D]`, and lse, fp32 `[N, A, Q]`.

    Raises:
        TypeError: a dtype that the kernels do not have (float64).
    """
    p = _Problem(query, keys, values, columns, masks, scale, tiles)
    out = _empty_tokens(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    p.launch(forward_kernel, {"out": out, "out_strides": out.stride()[:3], "lse": lse})
    return out, lse


def local_cross_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: int,
    columns: int,
    masks: Sequence[Tensor],
    scale: float,
    out: Tensor,
    lse: Tensor,
    tiles: Tiles = TILES,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The op `pyvlm::local_cross_attention_backward`: gradients for a cotangent of out; deterministic.

    The further arguments are those of the forward, and its results.

    Returns:
        Gradients of the query, the keys and the values, which lie as `[N, tokens, A, D]`.
    """
    p = _Problem(query, keys, values, columns, masks, scale, tiles)
    grad_out, out = _with_contiguous_rows(grad_out.to(query.dtype)), _with_contiguous_rows(out)
    grad_query = _empty_tokens(query)
    grad_keys = [_empty_tokens(key) for key in keys]
    grad_values = [_empty_tokens(value) for value in values]
    tensors = {
        "grad_out": grad_out,
        "grad_out_strides": grad_out.stride()[:3],
        "out": out,
        "out_strides": out.stride()[:3],
        "lse": lse.contiguous(),
        "grad_query": grad_query,
        "grad_query_strides": grad_query.stride()[:3],
        "grad_keys": tuple(grad_keys),
        "grad_values": tuple(grad_values),
        "grad_strides": tuple(grad.stride()[:3] for grad in grad_keys),
    }
    p.launch(backward_kernel, tensors)
    return grad_query, grad_keys, grad_values


class _Problem:
    """The inputs that forward and backward share, and what kernels are told about them."""

    def __init__(
        self,
        query: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        columns: int,
        masks: Sequence[Tensor],
        scale: float,
        tiles: Tiles,
    ) -> None:
        if query.dtype not in DTYPES:
            raise TypeError(
                f"the Triton kernels of local_cross_attention take {', '.join(map(str, DTYPES))}; query is "
                f'{query.dtype}: use backend="reference"'
            )
        query = _with_contiguous_rows(query)
        keys, values = ([_with_contiguous_rows(x) for x in maps] for maps in (keys, values))
        images, heads, queries, dim = query.shape
        self.tiles, self.device, self.grid = tiles, query.device, images * queries * heads
        block_d = next_power_of_2(dim)
        sides = tuple(math.isqrt(key.shape[2] // queries) for key in keys)
        most = max(1, tiles.elements // block_d)
        self.arguments: dict[str, Any] = {
            "query": query,
            "query_strides": query.stride()[:3],
            "keys": tuple(keys),
            "key_strides": tuple(key.stride()[:3] for key in keys),
            "values": tuple(values),
            "value_strides": tuple(value.stride()[:3] for value in values),
            "masks": tuple(mask.contiguous().view(torch.uint8) for mask in masks) if masks else None,
            "heads": heads,
            "queries": queries,
            "columns": columns,
            "scale": scale,
            "D": dim,
            "BLOCK_D": block_d,
            "SIDES": sides,
            "BLOCKS": tuple(min(most, next_power_of_2(side**2)) for side in sides),
        }

    def launch(self, kernel: Any, tensors: dict[str, Any]) -> None:
        with torch.cuda.device_of(self.arguments["query"]):
            launch(kernel, (self.grid,), self.tiles, self.arguments | tensors)


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _empty_tokens(x: Tensor) -> Tensor:
    """A result like x, [N, A, tokens, D], that lies as [N, tokens, A, D]: joining heads copies nothing."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@triton.jit
def place_of(heads, queries):
    """Image, head and query of this program: heads that lie side by side are read at the same time."""
    program = tl.program_id(0)
    return program // heads // queries, program % heads, program // heads % queries


@triton.jit
def offset_of(strides, image, head, token):
    """Where a token's head begins, in elements; in 64 bits, for tensors beyond 2^31 of them."""
    return image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]


@triton.jit
def load_row(tensor, strides, image, head, token, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dim_D = tl.arange(0, BLOCK_D)
    row = tensor + offset_of(strides, image, head, token)
    return tl.load(row + dim_D, mask=dim_D < D, other=0.0).to(tl.float32)


@triton.jit
def store_row(tensor, row_D, strides, image, head, token, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dim_D = tl.arange(0, BLOCK_D)
    row = tensor + offset_of(strides, image, head, token)
    tl.store(row + dim_D, row_D.to(tensor.dtype.element_ty), mask=dim_D < D)


@triton.jit
def window_keys(masks, i, image, query, queries, columns, first, SIDE: tl.constexpr, BLOCK_W: tl.constexpr):
    """Of the keys of a query's window of map i, BLOCK_W from the `first` on: their tokens, which of them are
    within the window, and which are also visible."""
    key_W = first + tl.arange(0, BLOCK_W)
    row_W = query // columns * SIDE + key_W // SIDE
    token_W = (row_W * columns + query % columns) * SIDE + key_W % SIDE
    within_W = key_W < SIDE * SIDE
    seen_W = within_W
    if masks is not None:
        mask = masks[i] + image.to(tl.int64) * queries * (SIDE * SIDE)
        seen_W = tl.load(mask + token_W, mask=within_W, other=0) != 0
    return token_W, within_W, seen_W


@triton.jit
def load_tokens(tensor, strides, image, head, token_W, seen_W, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of some tokens, and zeros for those that are not seen."""
    dim_D = tl.arange(0, BLOCK_D)
    row_W = offset_of(strides, image, head, token_W)
    within_WD = seen_W[:, None] & (dim_D < D)[None, :]
    return tl.load(tensor + row_W[:, None] + dim_D[None, :], mask=within_WD, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(
    tensor, tile_WD, strides, image, head, token_W, within_W, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    dim_D = tl.arange(0, BLOCK_D)
    row_W = offset_of(strides, image, head, token_W)
    within_WD = within_W[:, None] & (dim_D < D)[None, :]
    tl.store(tensor + row_W[:, None] + dim_D[None, :], tile_WD.to(tensor.dtype.element_ty), mask=within_WD)


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    query,
    query_strides,
    keys,
    key_strides,
    values,
    value_strides,
    masks,
    out,
    out_strides,
    lse,
    heads: tl.int32,
    queries: tl.int32,
    columns: tl.int32,
    scale: tl.float32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SIDES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out [N, A, Q, D] and lse [N, A, Q]; both as 0 and −∞ where a query sees nothing."""
    image, head, place = place_of(heads, queries)
    q_D = load_row(query, query_strides, image, head, place, D, BLOCK_D)
    # Powers over the largest score so far. Differences come before log2(e): large scores and an lse, each
    # multiplied by it, would round apart.
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc_D = tl.zeros([BLOCK_D], tl.float32)
    for i in tl.static_range(len(SIDES)):
        for first in tl.range(0, SIDES[i] * SIDES[i], BLOCKS[i]):
            token_W, _, seen_W = window_keys(
                masks, i, image, place, queries, columns, first, SIDES[i], BLOCKS[i]
            )
            k_WD = load_tokens(keys[i], key_strides[i], image, head, token_W, seen_W, D, BLOCK_D)
            v_WD = load_tokens(values[i], value_strides[i], image, head, token_W, seen_W, D, BLOCK_D)
            s_W = tl.sum(q_D[None, :] * k_WD, 1) * scale
            s_W = tl.where(seen_W, s_W, float("-inf"))
            new_top = tl.maximum(top, tl.max(s_W, 0))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp2((top - base) * LOG2E)
            p_W = tl.exp2((s_W - base) * LOG2E)
            total = total * shrink + tl.sum(p_W, 0)
            acc_D = acc_D * shrink + tl.sum(p_W[:, None] * v_WD, 0)
            top = new_top
    sees_nothing = total == 0
    total = tl.where(sees_nothing, 1.0, total)
    store_row(out, acc_D / total, out_strides, image, head, place, D, BLOCK_D)
    value = tl.where(sees_nothing, float("-inf"), top + tl.log2(total) / LOG2E)
    tl.store(lse + (image.to(tl.int64) * heads + head) * queries + place, value)


@triton.jit(do_not_specialize=RUNTIME)
def backward_kernel(
    grad_out,
    grad_out_strides,
    query,
    query_strides,
    keys,
    key_strides,
    values,
    value_strides,
    masks,
    out,
    out_strides,
    lse,
    grad_query,
    grad_query_strides,
    grad_keys,
    grad_values,
    grad_strides,
    heads: tl.int32,
    queries: tl.int32,
    columns: tl.int32,
    scale: tl.float32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SIDES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Gradients of the query [N, A, Q, D] and of the keys and values of all maps [N, A, T, D]."""
    image, head, place = place_of(heads, queries)
    q_D = load_row(query, query_strides, image, head, place, D, BLOCK_D)
    grad_D = load_row(grad_out, grad_out_strides, image, head, place, D, BLOCK_D)
    delta = tl.sum(grad_D * load_row(out, out_strides, image, head, place, D, BLOCK_D), 0)
    base = tl.load(lse + (image.to(tl.int64) * heads + head) * queries + place)
    grad_q_D = tl.zeros([BLOCK_D], tl.float32)
    for i in tl.static_range(len(SIDES)):
        for first in tl.range(0, SIDES[i] * SIDES[i], BLOCKS[i]):
            token_W, within_W, seen_W = window_keys(
                masks, i, image, place, queries, columns, first, SIDES[i], BLOCKS[i]
            )
            k_WD = load_tokens(keys[i], key_strides[i], image, head, token_W, seen_W, D, BLOCK_D)
            v_WD = load_tokens(values[i], value_strides[i], image, head, token_W, seen_W, D, BLOCK_D)
            s_W = tl.sum(q_D[None, :] * k_WD, 1) * scale
            p_W = tl.where(seen_W, tl.exp2((s_W - base) * LOG2E), 0.0)
            grad_s_W = p_W * (tl.sum(grad_D[None, :] * v_WD, 1) - delta) * scale
            grad_q_D += tl.sum(grad_s_W[:, None] * k_WD, 0)
            at = grad_strides[i]
            grad_k_WD = grad_s_W[:, None] * q_D[None, :]
            store_tokens(grad_keys[i], grad_k_WD, at, image, head, token_W, within_W, D, BLOCK_D)
            grad_v_WD = p_W[:, None] * grad_D[None, :]
            store_tokens(grad_values[i], grad_v_WD, at, image, head, token_W, within_W, D, BLOCK_D)
    store_row(grad_query, grad_q_D, grad_query_strides, image, head, place, D, BLOCK_D)

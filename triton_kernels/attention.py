"""Span attention on NVIDIA GPUs: prepares tensors, chooses tiles and launches the Triton kernels.

Shapes: B batch, H query heads, G key/value heads, I queries, J keys, D head dimension, R ranges a query (1 or
2), S streams (softmaxes: R where separate, else 1).

Everything about the spans is data: lengths, ranges, bitmasks of classes and strides are run-time arguments,
and new ones compile nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyvlm.triton_kernels.attention_backward import grad_kv_kernel, grad_q_kernel, row_statistics
from pyvlm.triton_kernels.attention_decode import combine_kernel, decode_kernel
from pyvlm.triton_kernels.attention_forward import forward_kernel
from pyvlm.triton_kernels.attention_tiles import PADDING, summarise_keys, summarise_queries
from pyvlm.triton_kernels.common import (
    DTYPES,
    PRECISION,
    capability,
    cdiv,
    launch,
    multiprocessors,
    next_power_of_2,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

MAX_HEAD_DIM = 256
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """A tile of scores, and how many warps work on it with how many loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ForwardTiles(Tiles):
    """Those of the forward, which may add a tile's values one tile later: see `forward_kernel`."""

    deferred: bool = False


@dataclass(frozen=True)
class Config:
    """Which tiles each kernel takes.

    Attributes:
        forward, grad_q, grad_kv: their tiles, of at most 128 queries and keys.
        decode_keys: keys of a tile of the decode kernel.
        decode_rows: up to so many rows (streams · heads of a group · queries) are decoded with split keys.
        splits: at most so many; a power of two.
        descriptors: load by tensor descriptors, which the hardware knows from compute capability 9.0 on.
        chunk: tiles whose visibility is looked at together; a power of two, at most 32.
    """

    forward: ForwardTiles
    grad_q: Tiles
    grad_kv: Tiles
    decode_keys: int = 64
    decode_rows: int = 64
    splits: int = 64
    descriptors: bool = False
    chunk: int = 32


# Chosen so that ahead-of-time compilation spills no registers in a main loop, but in float32 above a head
# dimension of 128, where a product is three of tf32 (tests/attention/triton_aot.json shows what each takes),
# and among those for the fewest instructions a score; not yet measured on a GPU. By GPU, then by the largest
# padded head dimension: forward, grad_q, grad_kv.
#
# On Hopper exponentials are made while a product runs (the table counts them), and a tile is loaded two tiles
# before it is used: Triton asks for the next one at the end of a round, where that would be awaited at once.
# (In the forward of 256 there is no room for it.)
#
# On Blackwell the forward has four warps, so that a thread has a row: eight exchange their accumulators by
# shared memory in every full tile, between 34 barriers (as that of 256 does). Not deferred, four warps would
# spill. Two programs share a processor.
_BLACKWELL = {
    64: Config(
        ForwardTiles(128, 64, 4, 3, deferred=True),
        Tiles(128, 128, 8, 2),
        Tiles(64, 128, 8, 2),
        descriptors=True,
    ),
    128: Config(
        ForwardTiles(128, 64, 4, 2, deferred=True),
        Tiles(128, 64, 8, 2),
        Tiles(64, 128, 8, 2),
        descriptors=True,
    ),
    256: Config(
        ForwardTiles(128, 64, 8, 1),
        Tiles(128, 64, 8, 1),
        Tiles(64, 64, 8, 1),
        decode_rows=32,
        descriptors=True,
    ),
}
_HOPPER = {
    64: Config(
        ForwardTiles(128, 128, 8, 3, deferred=True),
        Tiles(128, 128, 8, 3),
        Tiles(64, 128, 8, 3),
        descriptors=True,
    ),
    128: Config(
        ForwardTiles(128, 64, 8, 3, deferred=True),
        Tiles(128, 64, 8, 3),
        Tiles(64, 128, 8, 3),
        descriptors=True,
    ),
    256: Config(
        ForwardTiles(128, 64, 8, 2, deferred=True),
        Tiles(128, 32, 8, 3),
        Tiles(32, 64, 8, 3),
        decode_rows=32,
        descriptors=True,
    ),
}
_OTHER = {  # within the 99 KiB of shared memory that 8.6 and 8.9 have
    64: Config(ForwardTiles(128, 128, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2)),
    # 32 by 128 spill in grad_kv where a head dimension is filled up, as 72 is.
    128: Config(ForwardTiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(64, 64, 8, 2)),
    256: Config(
        ForwardTiles(64, 64, 8, 1), Tiles(64, 32, 8, 1), Tiles(32, 32, 4, 1), decode_keys=32, decode_rows=32
    ),
}
_FLOAT32 = {
    64: Config(ForwardTiles(32, 32, 8, 1), Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1), decode_keys=32),
    128: Config(
        ForwardTiles(16, 32, 4, 1),
        Tiles(16, 16, 4, 1),
        Tiles(16, 16, 4, 1),
        decode_keys=16,
        decode_rows=32,
    ),
    256: Config(
        ForwardTiles(16, 16, 4, 1),
        Tiles(16, 16, 4, 1),
        Tiles(32, 16, 8, 1),
        decode_keys=16,
        decode_rows=16,
    ),
}
_INTERPRETER = Config(
    ForwardTiles(64, 64, 4, 1, deferred=True), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), descriptors=True
)


def default_config(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Config:
    """The tiles for a head dimension, a dtype and a compute capability (None: Triton's interpreter)."""
    if capability is None:
        return _INTERPRETER
    table = {9: _HOPPER, 10: _BLACKWELL, 11: _BLACKWELL}.get(capability[0], _OTHER)
    if dtype == torch.float32:
        table = _FLOAT32
    return next(config for dims, config in table.items() if head_dim <= dims)


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    key_class: Tensor,
    range_classes: Sequence[int],
    separate: bool,
    scale: float,
    softcap: float,
    sinks: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `pyvlm::span_attention`, of arguments that `pyvlm.ops.span_attention` has checked.

    Args:
        q: `[B, H, I, D]`, fp32, bf16 or fp16, D up to 256.
        k: `[B, G, J, D]`.
        v: `[B, G, J, D]`.
        bounds: int32 `[B, I, R, 2]`. Not read by the host; ranges are clamped to the keys.
        key_class: uint8 `[B, J]`.
        range_classes: R bitmasks.
        separate: one softmax a range.
        scale: multiplies the scores.
        softcap: 0 for none.
        sinks: `[H]`, floating, or None.
        config: tiles other than the default ones, for tests and measurements.

    Returns:
        out `[B, H, I, D]`; the first of two streams' share of it, else an empty tensor; and lse fp32
        `[B, H, S, I]`.

    Raises:
        TypeError: a dtype that the kernels do not have (float64).
        ValueError: a head dimension above 256.
    """
    out = torch.empty_like(q)
    if scale < 0:  # the kernels take the greatest product for that of the greatest score
        q, scale = -q, -scale
    p = _Problem(q, k, v, bounds, key_class, range_classes, separate, scale, softcap, config)
    stream_out = torch.empty_like(q) if p.streams == 2 else q.new_empty(0)
    lse = q.new_empty((p.batch, p.heads, p.streams, p.queries), dtype=torch.float32)
    out_rows = _rows_to_write(out)
    stream_rows = _rows_to_write(stream_out) if p.streams == 2 else None
    others = {"stream_out": stream_rows, "lse": lse, "sinks": None if sinks is None else sinks.contiguous()}
    if out.numel() == 0:
        return out, stream_out, lse
    with torch.cuda.device_of(q):
        if p.streams * p.group * p.queries <= p.config.decode_rows:
            _decode(p, out_rows, others)
        else:
            tiles = p.config.forward
            arguments = p.arguments(tiles, {"q": p.q, "out": out_rows}, {"k": p.k, "v": p.v}, tiles.keys)
            arguments |= others | _keys_seen(p, tiles) | {"DEFERRED": tiles.deferred}
            launch(forward_kernel, (p.batch * p.heads * arguments["query_tiles"],), tiles, arguments)
    _copy_back((out, out_rows), (stream_out, stream_rows))
    return out, stream_out, lse


def _decode(p: "_Problem", out: Tensor, others: dict[str, Any]) -> None:
    """Splits the keys over programs, enough for two a multiprocessor, and puts the parts together."""
    rows = p.streams * p.group * p.queries
    tiles = Tiles(max(16, next_power_of_2(rows)), p.config.decode_keys, 4, 3)
    key_tiles = max(1, cdiv(p.keys, tiles.keys))
    wanted = cdiv(2 * multiprocessors(out.device), max(1, p.batch * p.key_heads))
    split_tiles = cdiv(key_tiles, min(wanted, p.config.splits))
    splits = cdiv(key_tiles, split_tiles)
    parts = (p.batch, p.key_heads, splits, rows)
    others = others | {
        "part_acc": out.new_empty((*parts, p.head_dim), dtype=torch.float32),
        "part_max": out.new_empty(parts, dtype=torch.float32),
        "part_sum": out.new_empty(parts, dtype=torch.float32),
        "splits": splits,
        "split_tiles": split_tiles,
        "STREAMS": p.streams,
        "BLOCK_X": p.config.splits,
    }
    arguments = p.arguments(tiles, {"q": p.q, "k": p.k, "v": p.v}) | others
    launch(decode_kernel, (p.batch * p.key_heads * splits,), tiles, arguments)
    if p.head_dim > 128:  # the parts of a row are held at once: with 4 warps they would spill
        tiles = replace(tiles, warps=8)
    arguments = p.arguments(tiles, {"out": out}) | others
    launch(combine_kernel, (p.batch * p.heads * p.queries,), tiles, arguments)


def span_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    key_class: Tensor,
    range_classes: Sequence[int],
    separate: bool,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    out: Tensor,
    stream_out: Tensor,
    lse: Tensor,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `pyvlm::span_attention_backward`: gradients of `span_attention` for cotangents of out and lse.

    The further arguments are those of the forward, and its results. Bitwise deterministic.

    Returns:
        grad_q, grad_k, grad_v, shaped and laid out like q, k and v; grad_sinks `[H]`, empty without sinks.
    """
    p = _Problem(q, k, v, bounds, key_class, range_classes, separate, scale, softcap, config)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_q, grad_k, grad_v = (_rows_to_write(grad) for grad in grads)
    lse = lse.contiguous()
    row_blocks = cdiv(p.queries, PADDING.value)
    delta, lse_2 = (lse.new_empty(*lse.shape[:3], row_blocks * PADDING.value) for _ in range(2))
    grad_out = torch.zeros_like(q) if grad_out is None else grad_out.to(q.dtype)
    grad_out, out = _rows(grad_out), _rows(out)
    stream_out = _rows(stream_out) if p.streams == 2 else None
    if stream_out is not None and stream_out.stride() != out.stride():
        out, stream_out = out.contiguous(), stream_out.contiguous()
    others: dict[str, Any] = {"delta": delta, "lse_2": lse_2, "row_blocks": row_blocks, "lse": lse}
    others["stream_out"] = stream_out
    others["grad_lse"] = None if grad_lse is None else grad_lse.float().contiguous()
    with torch.cuda.device_of(q):
        tiles = Tiles(32, 16, 4, 1)
        arguments = p.arguments(tiles, {"out": out, "grad_out": grad_out}) | others
        programs = p.batch * p.heads * row_blocks * (PADDING.value // tiles.queries)
        launch(row_statistics, (programs,), tiles, arguments)

        tiles = p.config.grad_q
        plain = {"q": p.q, "grad_out": grad_out, "grad_q": grad_q}
        arguments = p.arguments(tiles, plain, {"k": p.k, "v": p.v}, tiles.keys) | others
        arguments |= _keys_seen(p, tiles)
        launch(grad_q_kernel, (p.batch * p.heads * arguments["query_tiles"],), tiles, arguments)

        tiles = p.config.grad_kv
        plain = {"k": p.k, "v": p.v, "grad_k": grad_k, "grad_v": grad_v}
        arguments = p.arguments(tiles, plain, {"q": p.q, "grad_out": grad_out}, tiles.queries) | others
        arguments |= _keys_seen(p, tiles) | _query_ranges(p, tiles, row_blocks)
        launch(grad_kv_kernel, (p.batch * p.key_heads * arguments["key_tiles"],), tiles, arguments)
    _copy_back(*zip(grads, (grad_q, grad_k, grad_v), strict=True))
    if sinks is None:
        return *grads, q.new_empty(0)
    # d lse / d sink = exp(sink − lse), and delta holds −dlse.
    share = torch.exp(sinks.float()[:, None, None] - lse)
    return *grads, -(share * delta[..., : p.queries]).sum((0, 2, 3)).to(sinks.dtype)


class _Problem:
    """The inputs that forward and backward share, and what kernels are told about them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: Tensor,
        key_class: Tensor,
        range_classes: Sequence[int],
        separate: bool,
        scale: float,
        softcap: float,
        config: Config | None,
    ) -> None:
        if q.dtype not in DTYPES:
            raise TypeError(
                f"the Triton kernels of span_attention take {', '.join(map(str, DTYPES))}; q, k, v are "
                f'{q.dtype}: use backend="reference"'
            )
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.key_heads, self.keys = k.shape[1:3]
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"the Triton kernels of span_attention take a head_dim up to {MAX_HEAD_DIM}; q has "
                f'{self.head_dim}: use backend="reference"'
            )
        self.group = self.heads // self.key_heads
        self.q, self.k, self.v = _rows(q), _rows(k), _rows(v)
        self.bounds, self.key_class = bounds.contiguous(), key_class.contiguous()
        self.ranges = len(range_classes)
        self.streams = self.ranges if separate else 1
        self.config = config or default_config(self.head_dim, q.dtype, capability(q.device))
        mask_0, mask_1 = (*range_classes, 0)[:2]
        self.padded = max(16, next_power_of_2(self.head_dim))
        self.common: dict[str, Any] = {
            "bounds": self.bounds,
            "key_class": self.key_class,
            "heads": self.heads,
            "group": self.group,
            "queries": self.queries,
            "keys": self.keys,
            "mask_0": mask_0,
            "mask_1": mask_1,
            # Not 0: times −∞, a masked score, that would be no number.
            "factor": (scale / softcap if softcap else scale * LOG2E) or 1e-30,
            "cap": softcap * LOG2E,
            "scale": scale,
            "D": self.head_dim,
            "BLOCK_D": self.padded,
            "RANGES": self.ranges,
            "SEPARATE": separate,
            "SOFTCAP": softcap > 0,
            "PRECISION": PRECISION,
            "CHUNK": self.config.chunk,
        }

    def of_tiles(self, tiles: Tiles) -> dict[str, Any]:
        """What is known of the problem but its tensors, under the names that kernels have for it."""
        return self.common | {
            "query_tiles": cdiv(self.queries, tiles.queries),
            "key_tiles": cdiv(self.keys, tiles.keys),
            "BLOCK_M": tiles.queries,
            "BLOCK_N": tiles.keys,
        }

    def arguments(
        self, tiles: Tiles, plain: dict[str, Tensor], streamed: dict[str, Tensor] | None = None, rows: int = 0
    ) -> dict[str, Any]:
        """The same with tensors and their strides.

        Args:
            tiles: the kernel's.
            plain: `[B, heads, tokens, D]` tensors that the kernel reads or writes by pointers.
            streamed: the same that it reads in its inner loop, by descriptors where there are any.
            rows: the rows of a tile of the streamed tensors.
        """
        streamed = streamed or {}
        tensors = plain | streamed
        strides = {name: _strides(x) for name, x in tensors.items()}
        align = 16 // self.q.element_size()
        if any(stride % align for of_tensor in strides.values() for stride in of_tensor):
            align = 1
        # The hardware's descriptors want 16-byte strides and addresses, and no empty or expanded dimension.
        descriptors = (
            self.config.descriptors
            and align > 1
            and all(
                x.data_ptr() % 16 == 0 and min(*x.shape, *strides[name]) > 0 for name, x in streamed.items()
            )
        )
        arguments = self.of_tiles(tiles) | tensors
        arguments |= {"ALIGN": align, "DESCRIPTORS": descriptors}
        if descriptors:
            block = [1, 1, rows, self.padded]
            for name, x in streamed.items():
                arguments[name] = TensorDescriptor(x, list(x.shape), [*strides[name], 1], block)
        for name, (batch, head, row) in strides.items():
            arguments[name + "_batch"] = batch // align
            arguments[name + "_head"] = head // align
            arguments[name + "_row"] = row // align
        return arguments


def _keys_seen(p: _Problem, tiles: Tiles) -> dict[str, Any]:
    """What kernels know of the keys: the classes in each tile, and which keys each range sees."""
    arguments = p.of_tiles(tiles)
    key_blocks = cdiv(p.keys, PADDING.value)
    made = {
        "tile_classes": p.bounds.new_empty((p.batch, arguments["key_tiles"])),
        "key_positions": p.bounds.new_empty((p.batch, p.ranges, key_blocks * PADDING.value)),
        "key_blocks": key_blocks,
    }
    grid = (p.batch, cdiv(key_blocks * (PADDING.value // tiles.keys), p.config.chunk))
    launch(summarise_keys, grid, Tiles(1, 1, 4, 1), arguments | made)
    return made


def _query_ranges(p: _Problem, tiles: Tiles, row_blocks: int) -> dict[str, Tensor]:
    """What grad_kv knows of the queries' ranges: the extremes of each tile's, and each query's."""
    arguments = p.of_tiles(tiles) | {"row_blocks": row_blocks}
    made = {
        "tile_extremes": p.bounds.new_empty((p.batch, p.ranges, 4, arguments["query_tiles"])),
        "row_ranges": p.bounds.new_empty((p.batch, p.ranges, 2, row_blocks * PADDING.value)),
    }
    grid = (p.batch, cdiv(row_blocks * (PADDING.value // tiles.queries), p.config.chunk))
    launch(summarise_queries, grid, Tiles(1, 1, 4, 1), arguments | made)
    return made


def _rows(x: Tensor) -> Tensor:
    """x with rows that are contiguous, which the kernels rely on; its other strides stay as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows_to_write(x: Tensor) -> Tensor:
    """x, or where its rows are not contiguous something to write in its stead (see `_copy_back`)."""
    return (
        x
        if x.stride(-1) == 1 or x.shape[-1] == 1
        else torch.empty_like(x, memory_format=torch.contiguous_format)
    )


def _copy_back(*pairs: tuple[Tensor, Tensor | None]) -> None:
    for x, written in pairs:
        if written is not None and written is not x:
            x.copy_(written)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and row. Where there is only one of them, any number will do."""
    if 1 not in x.shape:
        return x.stride()[:3]
    longest = max(
        (size * stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1), default=16
    )
    return tuple(
        stride if size > 1 else longest for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    )

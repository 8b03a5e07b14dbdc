"""Queries that read image maps: Cambrian-1's windows and Qwen-VL's resampler. The public functions.

Shapes: N images · T tokens of a map, row-major, without CLS · Q queries · E embedding · A attention heads ·
D head features. A grid is (rows, columns).
Every function raises TypeError for a wrong dtype and ValueError for a wrong shape, device or option, naming
the argument. `backend` is "auto" or a name in `pyvlm.ops._backends`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyvlm import _native
from pyvlm._autocast import without_autocast
from pyvlm.ops._backends import refuse_second_derivative, resolve, triton_function
from pyvlm.ops._checks import Shapes, as_grid, as_list
from pyvlm.reference import cross_attention as reference
from pyvlm.reference.fusion import accumulator


def local_cross_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    query_grid: tuple[int, int],
    masks: Sequence[Tensor] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Each query of a grid attends to its window of every encoder's map, with one softmax over all of them.

    Source: "Cambrian-1" (arXiv 2406.16860), spatial vision aggregator. A map that is r_i times as fine as the
    query grid on each side gives a query a window of r_i × r_i keys. The maps are read where they lie:
    nothing is rearranged by the caller.

    Args:
        query: [N, A, Q, D], Q = rows·columns of `query_grid`, row-major.
        keys, values: one [N, A, T_i, D] an encoder, T_i = Q·r_i², row-major over the map of rows·r_i ×
            columns·r_i.
        query_grid: (rows, columns).
        masks: one bool [N, T_i] an encoder, True where visible; all visible where None. A query that sees
            nothing gets 0.
        scale: of the scores; 1/√D where None.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        [N, A, Q, D]; of the kernels it lies as [N, Q, A, D], so that joining the heads copies nothing.
    """
    op = "local_cross_attention"
    keys, values = as_list(op, "keys", keys), as_list(op, "values", values)
    for name, given in (("values", values), ("masks", masks)):
        if given is not None and len(given) != len(keys):
            raise ValueError(f"{op}: {len(keys)} keys but {len(given)} {name}; give one an encoder")
    query_grid = as_grid(op, "query_grid", query_grid)
    num_queries = query_grid[0] * query_grid[1]
    shapes = Shapes(op).check("query", query, "NAQD")
    if query.shape[2] != num_queries:
        raise ValueError(
            f"{op}: query has {query.shape[2]} queries, but query_grid {query_grid} has {num_queries}"
        )
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        shapes.check(f"keys[{i}]", key, "NATD").check(f"values[{i}]", value, "NATD")
        tokens = key.shape[2]
        side = 1
        while num_queries * side**2 < tokens:  # math.isqrt is not traced where sizes are symbols
            side += 1
        if tokens != num_queries * side**2:
            raise ValueError(
                f"{op}: keys[{i}] has {tokens} tokens, which is not {num_queries} queries times a square "
                "window; resize the map to a whole multiple of the query grid"
            )
        if masks is not None:
            shapes.check(f"masks[{i}]", masks[i], "NT", dtypes=(torch.bool,))
        shapes.forget("T")
    implementation = resolve(op, backend, query.device, query.dtype)
    if implementation == "reference":
        return reference.local_cross_attention(query, keys, values, query_grid, masks, scale)
    masks = [] if masks is None else list(masks)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if implementation == "triton" and query.device.type == "cpu":
        out, _ = _InterpretedTriton.apply(query, *keys, *values, query_grid, masks, scale)
        return out
    out, _ = torch.ops.pyvlm.local_cross_attention(query, keys, values, *query_grid, masks, scale)
    return out


def resample(
    features: Tensor,
    query: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    in_proj_weight: Tensor,
    out_proj_weight: Tensor,
    num_heads: int,
    in_proj_bias: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One cross-attention of learned queries to a map, with positions on queries and keys but not on values.

    Source: "Qwen-VL" (arXiv 2308.12966), the position-aware adapter. `features` and `query` come normalised;
    the query projection is the same for every image, and made once. The native op is made of `linear`
    and `span_attention`, on CUDA of torch's own products and `span_attention`.

    Args:
        features: [N, T, E].
        query: [Q, E]; query_position: [Q, E]; key_position: [T, E].
        in_proj_weight, in_proj_bias: [3E, E] and [3E], rows ordered query, key, value (as
            `nn.MultiheadAttention`).
        out_proj_weight, out_proj_bias: [E, E] and [E].
        num_heads: divides E.

    Returns:
        [N, Q, E].
    """
    shapes = Shapes("resample").check("features", features, "NTE").check("query", query, "QE")
    shapes.check("query_position", query_position, "QE").check("key_position", key_position, "TE")
    embed_dim = features.shape[2]
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            f"resample: num_heads is {num_heads}, which does not divide the embedding of {embed_dim}"
        )
    shapes.sizes["3E"] = 3 * embed_dim
    shapes.check("in_proj_weight", in_proj_weight, ("3E", "E")).check("in_proj_bias", in_proj_bias, ("3E",))
    shapes.check("out_proj_weight", out_proj_weight, ("E", "E")).check("out_proj_bias", out_proj_bias, "E")
    native = resolve("resample", backend, features.device) == "native"
    if features.is_cuda:  # there attention is Triton's
        native = native and resolve("span_attention", "auto", features.device) != "reference"
    run = torch.ops.pyvlm.resample if native else reference.resample
    y: Tensor = run(
        features,
        query,
        query_position,
        key_position,
        in_proj_weight,
        out_proj_weight,
        num_heads,
        in_proj_bias,
        out_proj_bias,
    )
    return y


def sincos_positions(grid: tuple[int, int], embed_dim: int) -> Tensor:
    """The fixed 2-D sine-cosine table of a grid, float32 [rows·columns, E], row-major.

    The first half of the channels encodes the column, the second the row; each half is sines and then cosines
    of position · 10000^(−i/(E/4)). `embed_dim` must be a multiple of 4. Source: MAE (arXiv 2111.06377), used
    by Qwen-VL.
    """
    if embed_dim < 4 or embed_dim % 4:
        raise ValueError(f"sincos_positions: embed_dim is {embed_dim}, expected a positive multiple of 4")
    rows, columns = as_grid("sincos_positions", "grid", grid)
    frequency = 10000.0 ** (-torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))

    def encode(position: Tensor) -> Tensor:
        angle = position.flatten()[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    return torch.cat([encode(x), encode(y)], dim=1).float()


def resize_positions(table: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A position table [rows·columns, E] of `grid` resampled to `target`, as Qwen-VL does.

    Bicubic, without antialiasing. It is resampled when it is enlarged too, and passes untouched where the
    grids agree. Computed in float32 (float64 for a float64 table) and returned in the table's dtype.
    """
    grid, target = as_grid("resize_positions", "grid", grid), as_grid("resize_positions", "target", target)
    Shapes("resize_positions").check("table", table, "TE")
    if table.shape[0] != grid[0] * grid[1]:
        raise ValueError(
            f"resize_positions: table has {table.shape[0]} rows, but grid {grid} has {grid[0] * grid[1]}"
        )
    if grid == target:
        return table
    x = table.to(accumulator(table.dtype))
    rows, columns = (_bicubic(a, b, x) for a, b in zip(grid, target, strict=True))
    # Two small products: torch's kernel took a fifth of a bf16 resampler's time for 4,096 channels.
    with without_autocast(table.device):
        by_row = (rows @ x.reshape(grid[0], -1)).view(target[0], grid[1], -1)
        return (columns @ by_row).flatten(0, 1).to(table.dtype)


def _bicubic(size: int, target: int, like: Tensor) -> Tensor:
    """[target, size]: what each of `target` points takes from each of `size`."""
    unit = torch.eye(size, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(unit, size=(target, size), mode="bicubic", align_corners=False)[0, 0]


# The ops behind `local_cross_attention`: `csrc/bindings/cross_attention.cpp` has the schemas.


def _empty_tokens(x: Tensor) -> Tensor:
    """A result like x, [N, A, tokens, D], that lies as [N, tokens, A, D]."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _fake_local(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_tokens(query), query.new_empty(query.shape[:3], dtype=accumulator(query.dtype))


def _fake_local_backward(
    grad_out: Tensor, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *args: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return _empty_tokens(query), [_empty_tokens(k) for k in keys], [_empty_tokens(v) for v in values]


def _local_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, values, ctx.rows, ctx.columns, masks, ctx.scale = inputs
    ctx.num_maps = len(keys)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, *output, *keys, *values, *masks)


def _local_gradients(
    op: Callable[..., tuple[Tensor, list[Tensor], list[Tensor]]], ctx: Any, grad_out: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    query, out, lse, *lists = ctx.saved_tensors
    maps = ctx.num_maps
    keys, values, masks = lists[:maps], lists[maps : 2 * maps], lists[2 * maps :]
    return op(grad_out, query, keys, values, ctx.rows, ctx.columns, masks, ctx.scale, out, lse)


def _local_backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
    nothing = [None] * ctx.num_maps
    grads: tuple[Any, ...] = (None, nothing, nothing)
    if grad_out is not None:
        grads = _local_gradients(torch.ops.pyvlm.local_cross_attention_backward, ctx, grad_out)
    no_masks = [None] * (len(ctx.saved_tensors) - 3 - 2 * ctx.num_maps)
    return (*grads, None, None, no_masks, None)


_local_triton = triton_function("cross_attention", "local_cross_attention")
_local_triton_backward = triton_function("cross_attention", "local_cross_attention_backward")


class _InterpretedTriton(torch.autograd.Function):
    """The Triton kernels on CPU tensors, in Triton's interpreter: torch's CPU kernels are the native ones.

    Inputs: query, the keys, the values, query_grid, masks, scale. Autograd sees no tensors in a list.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _local_triton(*_InterpretedTriton.arguments(args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _local_setup_context(ctx, _InterpretedTriton.arguments(inputs), output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
        grad_query, grad_keys, grad_values = _local_gradients(_local_triton_backward, ctx, grad_out)
        return grad_query, *grad_keys, *grad_values, None, None, None

    @staticmethod
    def arguments(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        query, *maps, query_grid, masks, scale = inputs
        half = len(maps) // 2
        return query, maps[:half], maps[half:], *query_grid, masks, scale


if _native.C is not None:  # it defines the schemas
    torch.library.impl("pyvlm::local_cross_attention", "CUDA", _local_triton)
    torch.library.impl("pyvlm::local_cross_attention_backward", "CUDA", _local_triton_backward)
    torch.library.register_fake("pyvlm::local_cross_attention", _fake_local)
    torch.library.register_fake("pyvlm::local_cross_attention_backward", _fake_local_backward)
    torch.library.register_autograd(
        "pyvlm::local_cross_attention", _local_backward, setup_context=_local_setup_context
    )
    refuse_second_derivative("local_cross_attention")

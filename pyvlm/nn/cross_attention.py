"""Modules in which queries read image maps: Qwen-VL's resampler and Cambrian-1's local cross-attention.

Shapes: N images · T tokens of a map, row-major, without CLS · C channels of a map · Q queries · E embedding.
A grid is (rows, columns). `backend` goes to every op (`pyvlm.ops`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyvlm.nn.linear import Linear
from pyvlm.ops.cross_attention import local_cross_attention, resample, resize_positions, sincos_positions


class Resampler(nn.Module):
    """Compresses a map of any grid to grid² tokens by one cross-attention of learned queries.

    Source: "Qwen-VL" (arXiv 2308.12966).
    Parameter names are those of the original, so that its checkpoints load.

    Args:
        grid_size: √Q; Qwen-VL has 16.
        embed_dim: E, a multiple of 4 and of `num_heads`.
        num_heads: attention heads.
        kv_dim: C of the map; `embed_dim` where None, and then there is no input projection.
        eps: LayerNorm's ε.
    """

    pos_embed: Tensor

    def __init__(
        self,
        grid_size: int,
        embed_dim: int,
        num_heads: int,
        kv_dim: int | None = None,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.grid_size, self.backend = grid_size, backend
        kv_dim = embed_dim if kv_dim is None else kv_dim
        self.query = nn.Parameter(torch.empty(grid_size**2, embed_dim))
        self.kv_proj = nn.Identity() if kv_dim == embed_dim else Linear(kv_dim, embed_dim, bias=False)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads)
        self.ln_q = nn.LayerNorm(embed_dim, eps)
        self.ln_kv = nn.LayerNorm(embed_dim, eps)
        self.register_buffer("pos_embed", sincos_positions((grid_size, grid_size), embed_dim))
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Resamples a map [N, T, C] of `grid` (square where None) to [N, grid_size², E]."""
        if grid is None:
            grid = (math.isqrt(features.shape[1]),) * 2
        if math.prod(grid) != features.shape[1]:
            raise ValueError(
                f"Resampler: features have {features.shape[1]} tokens, but the grid {tuple(grid)} has "
                f"{math.prod(grid)}; drop CLS, or name the grid"
            )
        return resample(
            self.ln_kv(self.kv_proj(features)),
            self.ln_q(self.query),
            self.pos_embed,
            resize_positions(self.pos_embed, (self.grid_size, self.grid_size), grid),
            self.attn.in_proj_weight,
            self.attn.out_proj.weight,
            self.attn.num_heads,
            self.attn.in_proj_bias,
            self.attn.out_proj.bias,
            self.backend,
        )


class LocalCrossAttention(nn.Module):
    """One layer of spatial vision aggregation: a query of a grid sees its window of each map.

    Source: "Cambrian-1" (arXiv 2406.16860).

    Args:
        query_dim: features of a query, and of the output.
        context_dim: features of the context that is laid beside each query.
        map_dims: C_i of each encoder's map.
        window_sides: r_i, side of a query's window in each map; where it is above 1, C_i must be
            `hidden_dim`.
        hidden_dim: features inside, a multiple of `num_heads`.
        num_heads: attention heads.
        separate: attend to each encoder apart and weigh the results by a softmax of the query ("sep" of the
            original), in place of one softmax over all encoders' keys ("joint").
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        map_dims: Sequence[int],
        window_sides: Sequence[int],
        hidden_dim: int = 1024,
        num_heads: int = 16,
        separate: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(
                f"LocalCrossAttention: num_heads {num_heads} does not divide hidden_dim {hidden_dim}"
            )
        for dim, side in zip(map_dims, window_sides, strict=True):
            if side > 1 and dim != hidden_dim:
                raise ValueError(
                    f"LocalCrossAttention: a map with windows of side {side} has {dim} channels, expected "
                    f"hidden_dim = {hidden_dim}, since its positions are added to it; project the map first"
                )
        self.num_heads, self.separate, self.backend = num_heads, separate, backend
        self.window_sides = tuple(window_sides)
        joined_dim = query_dim + hidden_dim
        self.proj_context = Linear(context_dim, hidden_dim, bias=False)
        self.proj_in = Linear(joined_dim, hidden_dim, bias=False)
        self.norm = nn.LayerNorm(hidden_dim)
        self.proj_out = _mlp(hidden_dim, hidden_dim, query_dim)
        self.pos_embed = nn.ParameterList(
            nn.Parameter(torch.randn(side**2, hidden_dim)) if side > 1 else None for side in window_sides
        )
        if separate:
            encoders = zip(map_dims, window_sides, strict=True)
            self.attentions = nn.ModuleList(
                _WindowAttention(hidden_dim, [dim], num_heads, backend)
                if side > 1
                else _mlp(dim, hidden_dim, hidden_dim)
                for dim, side in encoders
            )
            self.encoder_weights = _mlp(joined_dim, hidden_dim, len(map_dims)) if len(map_dims) > 1 else None
        else:
            self.attention = _WindowAttention(hidden_dim, map_dims, num_heads, backend)

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        maps: Sequence[Tensor],
        query_grid: tuple[int, int],
        masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Updates the queries of a grid from the maps of all encoders.

        Args:
            query: [N, Q, query_dim], Q = rows·columns of `query_grid`.
            context: [N, Q, context_dim].
            maps: one [N, T_i, C_i] an encoder, row-major over the map of rows·r_i × columns·r_i.
            query_grid: (rows, columns).
            masks: one bool [N, T_i] an encoder, True where visible (`pyvlm.ops.letterbox_masks`). As in the
                original a 1 × 1 window is always visible where `separate`.

        Returns:
            [N, Q, query_dim].
        """
        self._check_maps(maps, query_grid)
        joined = torch.cat([query, self.proj_context(context)], dim=-1)
        hidden = self.proj_in(joined)
        maps = [
            x if pos is None else x + _tile_windows(pos, query_grid)
            for x, pos in zip(maps, self.pos_embed, strict=True)
        ]
        if self.separate:
            attended = self._attend_separately(joined, hidden, maps, query_grid, masks)
        else:
            attended = self.attention(hidden, maps, query_grid, masks)
        return query + self.proj_out(self.norm(hidden + attended))

    def _attend_separately(
        self,
        joined: Tensor,
        hidden: Tensor,
        maps: Sequence[Tensor],
        query_grid: tuple[int, int],
        masks: Sequence[Tensor] | None,
    ) -> Tensor:
        results = [
            attention(hidden, [x], query_grid, None if masks is None else [masks[i]])
            if side > 1
            else attention(x)
            for i, (attention, side, x) in enumerate(
                zip(self.attentions, self.window_sides, maps, strict=True)
            )
        ]
        if self.encoder_weights is None:
            return results[0]
        weights = self.encoder_weights(joined).softmax(-1)
        return (torch.stack(results, dim=-1) * weights.unsqueeze(-2)).sum(-1)

    def _check_maps(self, maps: Sequence[Tensor], query_grid: tuple[int, int]) -> None:
        if len(maps) != len(self.window_sides):
            raise ValueError(f"LocalCrossAttention: got {len(maps)} maps, expected {len(self.window_sides)}")
        for i, (x, side) in enumerate(zip(maps, self.window_sides, strict=True)):
            if x.shape[1] != math.prod(query_grid) * side**2:
                raise ValueError(
                    f"LocalCrossAttention: maps[{i}] has {x.shape[1]} tokens, expected "
                    f"{math.prod(query_grid) * side**2} for windows of side {side} on the query grid "
                    f"{tuple(query_grid)}"
                )


class _WindowAttention(nn.Module):
    """Normalised projections around `local_cross_attention`; each encoder has its own for keys and values."""

    def __init__(self, hidden_dim: int, map_dims: Sequence[int], num_heads: int, backend: str) -> None:
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.q_proj = _normed_linear(hidden_dim, hidden_dim)
        self.k_proj = nn.ModuleList(_normed_linear(dim, hidden_dim) for dim in map_dims)
        self.v_proj = nn.ModuleList(_normed_linear(dim, hidden_dim) for dim in map_dims)
        self.o_proj = Linear(hidden_dim, hidden_dim, bias=False)

    def forward(
        self,
        hidden: Tensor,
        maps: Sequence[Tensor],
        query_grid: tuple[int, int],
        masks: Sequence[Tensor] | None,
    ) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query = heads(self.q_proj(hidden))
        keys = [heads(project(x)) for project, x in zip(self.k_proj, maps, strict=True)]
        values = [heads(project(x)) for project, x in zip(self.v_proj, maps, strict=True)]
        out = local_cross_attention(query, keys, values, query_grid, masks, backend=self.backend)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _normed_linear(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_dim), Linear(in_dim, out_dim, bias=False))


def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        Linear(in_dim, hidden_dim, bias=False), nn.GELU(), Linear(hidden_dim, out_dim, bias=False)
    )


def _tile_windows(pos_embed: Tensor, query_grid: tuple[int, int]) -> Tensor:
    """A table [r·r, C] of positions inside a window, repeated over the map of every query's window."""
    side = math.isqrt(pos_embed.shape[0])
    return pos_embed.view(side, side, -1).repeat(*query_grid, 1).flatten(0, 1)

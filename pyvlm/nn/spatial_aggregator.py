"""Cambrian-1's spatial vision aggregator: a grid of learned queries reads the maps of several encoders.

Shapes: N images · Q queries, row-major · T tokens of a map, row-major, without CLS · C channels of a map ·
E embedding. A grid is (rows, columns).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyvlm.nn.cross_attention import LocalCrossAttention
from pyvlm.nn.linear import Linear
from pyvlm.ops.grids import fuse_grids


class SpatialVisionAggregator(nn.Module):
    """Compresses the maps of encoders to one token a cell of a grid, which looks at its own window of each.

    One learned query starts at every cell; the mean of the first map is laid beside it as its context. Each
    map is resized to a whole number of cells a query and projected. The original also lets tokens read the
    maps again between layers of the language model, which is no part of this.

    Source: "Cambrian-1" (arXiv 2406.16860) and its released code, with one group of queries.

    Args:
        channels: C of each encoder's map.
        grids: (rows, columns) of each.
        query_grid: Q = rows · columns.
        window_sides: cells of each resized map that a query sees, on each side.
        hidden_dim: E, a multiple of `num_heads`.
        num_layers, num_heads: of `LocalCrossAttention`.
        separate: see `LocalCrossAttention`.

    Raises:
        ValueError: as `LocalCrossAttention`, or not one entry an encoder.
    """

    def __init__(
        self,
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        query_grid: tuple[int, int],
        window_sides: Sequence[int],
        hidden_dim: int = 1024,
        num_layers: int = 3,
        num_heads: int = 16,
        separate: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not len(channels) == len(grids) == len(window_sides):
            raise ValueError(
                f"SpatialVisionAggregator: {len(channels)} channels, {len(grids)} grids and "
                f"{len(window_sides)} window_sides; give one an encoder"
            )
        rows, columns = self.query_grid = query_grid
        self.grids, self.backend = list(grids), backend
        self.targets = [(rows * side, columns * side) for side in window_sides]
        self.query = nn.Parameter(torch.randn(hidden_dim) * hidden_dim**-0.5)
        self.projections = nn.ModuleList(
            nn.Sequential(
                Linear(dim, hidden_dim), nn.GELU(), Linear(hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim)
            )
            for dim in channels
        )
        self.layers = nn.ModuleList(
            LocalCrossAttention(
                hidden_dim,
                hidden_dim,
                [hidden_dim] * len(channels),
                window_sides,
                hidden_dim,
                num_heads,
                separate,
                backend,
            )
            for _ in range(num_layers)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Reads one map [N, T_i, C_i] an encoder into [N, Q, E].

        Raises:
            ValueError: maps other than those the module was made for.
        """
        if len(maps) != len(self.grids):
            raise ValueError(f"SpatialVisionAggregator: got {len(maps)} maps, expected {len(self.grids)}")
        maps = [
            project(x if grid == target else fuse_grids([x], [grid], target, backend=self.backend))
            for project, x, grid, target in zip(self.projections, maps, self.grids, self.targets, strict=True)
        ]
        num_queries = self.query_grid[0] * self.query_grid[1]
        context = maps[0].mean(1, keepdim=True).expand(-1, num_queries, -1)
        tokens = self.query.expand_as(context)
        for layer in self.layers:
            tokens = layer(tokens, context, maps, self.query_grid)
        return tokens

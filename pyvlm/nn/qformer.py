"""Q-Former fusion: learned queries read the map of each encoder, and their tokens follow one another.

Source: "MouSi" (arXiv 2401.17221), Q-Former fusion; no code was released. The Q-Former is that of BLIP-2
(arXiv 2301.12597).

Shapes: N images · Q queries · T tokens of a map · C channels of a map · E embedding · H output features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention, then a norm over the sum with its input, as in BERT."""

    def __init__(self, hidden_dim: int, num_heads: int, kv_dim: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_dim, hidden_dim)
        self.key = nn.Linear(kv_dim, hidden_dim)
        self.value = nn.Linear(kv_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, eps)

    def forward(self, x_NQE: Tensor, context_NTC: Tensor) -> Tensor:
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.query(x_NQE), self.key(context_NTC), self.value(context_NTC))
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(x_NQE + self.out(attended))


class QFormerLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the map (unless `kv_dim` is None), and an MLP."""

    def __init__(
        self, hidden_dim: int, num_heads: int, intermediate_dim: int, kv_dim: int | None, eps: float
    ) -> None:
        super().__init__()
        self.attention = Attention(hidden_dim, num_heads, hidden_dim, eps)
        self.cross_attention = None if kv_dim is None else Attention(hidden_dim, num_heads, kv_dim, eps)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, intermediate_dim), nn.GELU(), nn.Linear(intermediate_dim, hidden_dim)
        )
        self.norm = nn.LayerNorm(hidden_dim, eps)

    def forward(self, x_NQE: Tensor, map_NTC: Tensor) -> Tensor:
        x_NQE = self.attention(x_NQE, x_NQE)
        if self.cross_attention is not None:
            x_NQE = self.cross_attention(x_NQE, map_NTC)
        return self.norm(x_NQE + self.mlp(x_NQE))


class QFormer(nn.Module):
    """Learned queries that read one map through a stack of layers.

    Args:
        num_queries: Q.
        hidden_dim: E, a multiple of `num_heads`.
        kv_dim: C.
        num_layers, num_heads: BLIP-2 has 12 of each.
        intermediate_dim: width of the MLPs; 4 · hidden_dim where None.
        cross_attention_frequency: each so-manieth layer, from the first on, reads the map.
        eps: LayerNorm's ε.
    """

    def __init__(
        self,
        num_queries: int,
        hidden_dim: int,
        kv_dim: int,
        num_layers: int,
        num_heads: int,
        intermediate_dim: int | None = None,
        cross_attention_frequency: int = 2,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"QFormer: num_heads {num_heads} does not divide hidden_dim {hidden_dim}")
        self.queries = nn.Parameter(torch.empty(num_queries, hidden_dim))
        self.norm = nn.LayerNorm(hidden_dim, eps)
        self.layers = nn.ModuleList(
            QFormerLayer(
                hidden_dim,
                num_heads,
                intermediate_dim or 4 * hidden_dim,
                None if i % cross_attention_frequency else kv_dim,
                eps,
            )
            for i in range(num_layers)
        )
        nn.init.normal_(self.queries, std=0.02)

    def forward(self, map_NTC: Tensor) -> Tensor:
        """Reads a map [N, T, C] into [N, Q, E]."""
        x_NQE = self.norm(self.queries).expand(len(map_NTC), -1, -1)
        for layer in self.layers:
            x_NQE = layer(x_NQE, map_NTC)
        return x_NQE


class QFormerFusion(nn.Module):
    """A Q-Former an expert, one layer that all share, and the experts' tokens one after another.

    Args:
        channels: C_i of each expert, in the order of its tokens.
        out_dim: H.
        queries: Q_i of each expert.
        hidden_dim, num_layers, num_heads, intermediate_dim, cross_attention_frequency: see `QFormer`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_dim: int,
        queries: Sequence[int],
        hidden_dim: int = 768,
        num_layers: int = 2,
        num_heads: int = 12,
        intermediate_dim: int | None = None,
        cross_attention_frequency: int = 2,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            QFormer(q, hidden_dim, c, num_layers, num_heads, intermediate_dim, cross_attention_frequency)
            for c, q in zip(channels, queries, strict=True)
        )
        self.projection = nn.Linear(hidden_dim, out_dim)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Reads one map [N, T_i, C_i] an expert into [N, ΣQ_i, H]."""
        tokens = [expert(x_NTC) for expert, x_NTC in zip(self.experts, features, strict=True)]
        return self.projection(torch.cat(tokens, dim=1))

"""Modules that bring the features of one or several vision encoders into one token sequence.

Shapes: N images · T tokens of a map, row-major, without CLS · C channels of a map · H output features.
A grid is (rows, columns). `backend` goes to every op (`pyvlm.ops`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvlm.nn.linear import Linear
from pyvlm.ops.fusion import fuse_grids, merge_levels, patches_to_token


@dataclass(frozen=True)
class EncoderFeatures:
    """What one encoder hands to `FeatureFusion`.

    Attributes:
        channels: C of every level.
        grid: (rows, columns) of every level.
        levels: how many levels (layers) it hands over.
        merge: several levels become one map as a weighted sum of projections ("layer_scale", COMM), or stay
            side by side in the channels ("concat", ViP-LLaVA). A single level passes as it is.
        align_dim: width of a two-layer MLP that the map passes before it is fused (COMM aligns DINOv2 to CLIP
            so); none where None.
        patches: patches of this encoder that make one token; only for method "sequence".
    """

    channels: int
    grid: tuple[int, int]
    levels: int = 1
    merge: Literal["layer_scale", "concat"] = "layer_scale"
    align_dim: int | None = None
    patches: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _pair(self.grid))
        if self.merge not in ("layer_scale", "concat"):
            raise ValueError(f'merge={self.merge!r} is unknown; expected "layer_scale" or "concat"')
        for name in ("channels", "levels", "patches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def fused_channels(self) -> int:
        """Channels that this encoder brings to the fusion."""
        if self.align_dim is not None:
            return self.align_dim
        return self.channels * (self.levels if self.merge == "concat" else 1)


class FeatureFusion(nn.Module):
    """Fuses the features of named encoders into one sequence of image tokens.

    The levels of each encoder are merged (`MergeLevels`), aligned where asked for, and fused by `method`:

    - "channel_concat" (COMM, Eagle, Prismatic): every map on `grid`, channels side by side, and one
      projection to `out_dim`.
    - "sequence" (MouSi): each encoder's patches become tokens of `out_dim`, one encoder after another.

    The order of `encoders` is the order of channels, or of tokens.

    Args:
        encoders: name -> `EncoderFeatures` or a mapping of its attributes, such as
            {"channels": 1024, "grid": (24, 24), "levels": 24}.
        out_dim: H. None (for "channel_concat" only) leaves the concatenation unprojected.
        method: "channel_concat" or "sequence".
        grid: the target grid of "channel_concat"; the first encoder's where None.
        mode, align_corners: how maps are resized, see `pyvlm.ops.fuse_grids`.
        merge_weights, shared_projection: see `MergeLevels`.
        hidden_dim: for "sequence", width of the first of two layers, see `PatchesToToken`; one layer where
            None.

    Attributes:
        num_tokens: T of the output. out_dim: H of the output.
    """

    def __init__(
        self,
        encoders: Mapping[str, EncoderFeatures | Mapping[str, Any]],
        out_dim: int | None = None,
        *,
        method: Literal["channel_concat", "sequence"] = "channel_concat",
        grid: tuple[int, int] | None = None,
        mode: str = "bilinear",
        align_corners: bool = False,
        merge_weights: Literal["softmax", "free", "fixed"] = "softmax",
        shared_projection: bool = True,
        hidden_dim: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("FeatureFusion: encoders is empty; name at least one")
        if method not in ("channel_concat", "sequence"):
            raise ValueError(
                f'FeatureFusion: method={method!r} is unknown; expected "channel_concat" or "sequence"'
            )
        self.encoders = {name: _encoder_features(name, entry) for name, entry in encoders.items()}
        self.method, self.mode, self.align_corners, self.backend = method, mode, align_corners, backend
        self.merges, self.aligns = nn.ModuleDict(), nn.ModuleDict()
        for name, encoder in self.encoders.items():
            if encoder.levels > 1 and encoder.merge == "layer_scale":
                self.merges[name] = MergeLevels(
                    encoder.levels,
                    encoder.channels,
                    encoder.channels,
                    weights=merge_weights,
                    shared_projection=shared_projection,
                    backend=backend,
                )
            if encoder.align_dim is not None:
                merged = dataclasses.replace(encoder, align_dim=None).fused_channels
                self.aligns[name] = nn.Sequential(
                    Linear(merged, encoder.align_dim),
                    nn.GELU(),
                    Linear(encoder.align_dim, encoder.align_dim),
                )
        channels = [encoder.fused_channels for encoder in self.encoders.values()]
        if method == "sequence":
            if out_dim is None:
                raise ValueError(
                    'FeatureFusion: method "sequence" needs an out_dim; give the width of a token'
                )
            self.num_tokens = sum(_tokens_in_sequence(name, e) for name, e in self.encoders.items())
            patches = [encoder.patches for encoder in self.encoders.values()]
            self.to_tokens = PatchesToToken(channels, out_dim, patches, hidden_dim, backend)
        else:
            self.grid = _pair(grid) if grid is not None else next(iter(self.encoders.values())).grid
            self.num_tokens = math.prod(self.grid)
            self.projection = None if out_dim is None else nn.Linear(sum(channels), out_dim)
        self.out_dim = sum(channels) if out_dim is None else out_dim

    def forward(self, features: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Fuses `features` into [N, num_tokens, out_dim].

        Args:
            features: name -> its levels, each [N, T, C] or [N, C, rows, columns].

        Raises:
            ValueError: names or numbers of levels other than those the module was made with, or a wrong
                shape.
        """
        if features.keys() != self.encoders.keys():
            raise ValueError(
                f"FeatureFusion: features are of {sorted(features)}, expected {sorted(self.encoders)}"
            )
        maps = [self._encoder_map(name, features[name]) for name in self.encoders]
        if self.method == "sequence":
            return self.to_tokens(maps)
        weight, bias = (
            (None, None) if self.projection is None else (self.projection.weight, self.projection.bias)
        )
        grids = [encoder.grid for encoder in self.encoders.values()]
        return fuse_grids(maps, grids, self.grid, weight, bias, self.mode, self.align_corners, self.backend)

    def _encoder_map(self, name: str, levels: Sequence[Tensor]) -> Tensor:
        encoder = self.encoders[name]
        if len(levels) != encoder.levels:
            raise ValueError(f"FeatureFusion: {name} gave {len(levels)} levels, expected {encoder.levels}")
        tokens = math.prod(encoder.grid)
        for i, level in enumerate(levels):
            shape = (encoder.channels, *encoder.grid) if level.dim() == 4 else (tokens, encoder.channels)
            if level.shape[1:] != shape:
                raise ValueError(
                    f"FeatureFusion: level {i} of {name} has shape {list(level.shape)}, expected "
                    f"[N, {', '.join(map(str, shape))}] for its grid {encoder.grid}"
                )
        levels = [level.flatten(2).transpose(1, 2) if level.dim() == 4 else level for level in levels]
        if name in self.merges:
            merged = self.merges[name](levels)
        else:
            merged = levels[0] if len(levels) == 1 else torch.cat(levels, dim=-1)
        return self.aligns[name](merged) if name in self.aligns else merged


def _pair(grid: Sequence[int]) -> tuple[int, int]:
    rows, columns = grid
    return rows, columns


def _tokens_in_sequence(name: str, encoder: EncoderFeatures) -> int:
    tokens = math.prod(encoder.grid)
    if tokens % encoder.patches:
        raise ValueError(
            f"FeatureFusion: encoder {name!r} has {tokens} tokens, which {encoder.patches} patches a token "
            "do not divide"
        )
    return tokens // encoder.patches


def _encoder_features(name: str, entry: EncoderFeatures | Mapping[str, Any]) -> EncoderFeatures:
    if isinstance(entry, EncoderFeatures):
        return entry
    known = [field.name for field in dataclasses.fields(EncoderFeatures)]
    unknown = sorted(set(entry) - set(known))
    missing = sorted({"channels", "grid"} - set(entry))
    if unknown or missing:
        raise ValueError(
            f"FeatureFusion: encoder {name!r} has unknown keys {unknown} and lacks {missing}; "
            f"known are {known}"
        )
    try:
        return EncoderFeatures(**entry)
    except ValueError as error:
        raise ValueError(f"FeatureFusion: encoder {name!r}: {error}") from None


class MergeLevels(nn.Module):
    """Merges the levels of one encoder: Σ_l α_l (W · LN(v_l) + b), COMM (arXiv 2310.08825).

    Args:
        num_levels, in_dim, out_dim: L, C, H.
        weights: α is a softmax over learned logits ("softmax"), learned as it is ("free"), or not learned
            ("fixed"). It starts at 1/L each.
        shared_projection: one W, b, γ and β for all levels (which costs one product), or one each.
        alpha: with "free" and "fixed", the α to start from.
        eps: LayerNorm's ε.
    """

    def __init__(
        self,
        num_levels: int,
        in_dim: int,
        out_dim: int,
        *,
        weights: Literal["softmax", "free", "fixed"] = "softmax",
        shared_projection: bool = True,
        alpha: Sequence[float] | None = None,
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if weights not in ("softmax", "free", "fixed"):
            raise ValueError(
                f'MergeLevels: weights={weights!r} is unknown; expected "softmax", "free" or "fixed"'
            )
        if alpha is not None and (weights == "softmax" or len(alpha) != num_levels):
            raise ValueError(
                f'MergeLevels: alpha takes {num_levels} numbers, one a level, and weights "free" or "fixed"; '
                f"got {len(alpha)} numbers with weights={weights!r}"
            )
        self.weights, self.eps, self.backend = weights, eps, backend
        start = (
            torch.full((num_levels,), 1 / num_levels)
            if alpha is None
            else torch.tensor(alpha, dtype=torch.float)
        )
        if weights == "fixed":
            self.register_buffer("level_weights", start)
        else:
            self.level_weights = nn.Parameter(torch.zeros(num_levels) if weights == "softmax" else start)
        each = () if shared_projection else (num_levels,)
        self.weight = nn.Parameter(torch.empty(*each, out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(*each, out_dim))
        self.ln_weight = nn.Parameter(torch.ones(*each, in_dim))
        self.ln_bias = nn.Parameter(torch.zeros(*each, in_dim))
        nn.init.uniform_(self.weight, -(in_dim**-0.5), in_dim**-0.5)

    @property
    def alpha(self) -> Tensor:
        """[L], the weight of each level as it is used."""
        return self.level_weights.softmax(0) if self.weights == "softmax" else self.level_weights

    def forward(self, levels: Sequence[Tensor] | Tensor) -> Tensor:
        """Merges L maps [N, T, C] (or one [L, N, T, C]) into [N, T, H]."""
        return merge_levels(
            levels, self.alpha, self.weight, self.bias, self.ln_weight, self.ln_bias, self.eps, self.backend
        )


class PatchesToToken(nn.Module):
    """m patches of each expert become one token; the experts' tokens follow one another.

    Source: "MouSi" (arXiv 2401.17221).

    Args:
        channels: C_i of each expert, in the order of its tokens.
        out_dim: H.
        patches: m_i of each expert.
        hidden_dim: with it, each expert has its own first layer to this width, then GELU and a second layer
            that all share (MouSi's MLP fusion); without it each expert has one layer.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_dim: int,
        patches: Sequence[int],
        hidden_dim: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.patches, self.backend = tuple(patches), backend
        width = out_dim if hidden_dim is None else hidden_dim
        self.experts = nn.ModuleList(nn.Linear(m * c, width) for c, m in zip(channels, patches, strict=True))
        self.shared = None if hidden_dim is None else Linear(hidden_dim, out_dim)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Projects one map [N, T_i, C_i] an expert to [N, ΣT_i/m_i, H]."""
        weights = [expert.get_parameter("weight") for expert in self.experts]
        biases = [expert.get_parameter("bias") for expert in self.experts]
        tokens = patches_to_token(features, weights, self.patches, biases, self.backend)
        return tokens if self.shared is None else self.shared(F.gelu(tokens))

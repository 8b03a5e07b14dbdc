"""Modules that bring the features of one or several vision encoders into one token sequence.

Shapes: N images · T tokens of a map, row-major, without CLS · C channels of a map · H output features.
A grid is (rows, columns). `backend` goes to every op (`pyvlm.ops`).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvlm.nn.linear import Linear
from pyvlm.nn.projector import Projector, build_projector
from pyvlm.nn.qformer import QFormerFusion
from pyvlm.ops.fusion import merge_levels
from pyvlm.ops.grids import fuse_grids, patches_to_token

Merge = Literal["layer_scale", "concat", "gated"]
Method = Literal["channel_concat", "sequence", "qformer"]


@dataclass(frozen=True)
class EncoderFeatures:
    """What one encoder hands to `FeatureFusion`.

    Attributes:
        channels: C of every level.
        grid: (rows, columns) of every level.
        levels: how many levels (layers) it hands over.
        merge: several levels become one map as a weighted sum of projections ("layer_scale", COMM), or as the
            first plus the others times a learned number each that starts at 0 ("gated", DeepSeek-VL), or they
            stay side by side in the channels ("concat", ViP-LLaVA). A single level passes as it is.
        downsample: the map is brought to 2^downsample times the target grid and passes so many convolutions
            that halve it and double its channels (DeepSeek-VL: 2 for SAM); only for "channel_concat".
        align_dim: width of the projector that the map passes before it is fused; none where None.
        align: the projector's kind, see `build_projector`: COMM aligns DINOv2 to CLIP by "mlp2x_gelu",
            DeepSeek-VL each encoder by "linear".
        patches: patches of this encoder that make one token; only for method "sequence".
        queries: tokens that its map is read into; only for method "qformer".
    """

    channels: int
    grid: tuple[int, int]
    levels: int = 1
    merge: Merge = "layer_scale"
    downsample: int = 0
    align_dim: int | None = None
    align: Projector = "mlp2x_gelu"
    patches: int = 1
    queries: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _pair(self.grid))
        if self.merge not in get_args(Merge):
            raise ValueError(f"merge={self.merge!r} is unknown; expected one of {', '.join(get_args(Merge))}")
        for name in ("channels", "levels", "patches", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.downsample < 0:
            raise ValueError(f"downsample is {self.downsample}, expected at least 0")

    @property
    def merged_channels(self) -> int:
        """Channels once the levels are one map."""
        return self.channels * (self.levels if self.merge == "concat" else 1)

    @property
    def fused_channels(self) -> int:
        """Channels that this encoder brings to the fusion."""
        return self.merged_channels * 2**self.downsample if self.align_dim is None else self.align_dim


class FeatureFusion(nn.Module):
    """Fuses the features of named encoders into one sequence of image tokens.

    The levels of each encoder are merged (`MergeLevels`), aligned where asked for, and fused by `method`:

    - "channel_concat": every map on `grid`, channels side by side, a norm where asked for, and a projector to
      `out_dim`. So do Eagle (arXiv 2408.15998; `align_corners`), Prismatic (2402.07865; its projector),
      ViP-LLaVA (2312.00784; levels "concat", a norm), COMM (2310.08825; levels "layer_scale", an aligned
      DINOv2) and DeepSeek-VL (2403.05525; levels "gated", downsampled, aligned linearly, "gelu_linear").
    - "sequence" (MouSi, 2401.17221): each encoder's patches become tokens of `out_dim`, one encoder after
      another.
    - "qformer" (MouSi): each encoder's map is read into `queries` tokens of `out_dim`, see `QFormerFusion`.

    The order of `encoders` is the order of channels, or of tokens.

    Args:
        encoders: name -> `EncoderFeatures` or a mapping of its attributes, such as
            {"channels": 1024, "grid": (24, 24), "levels": 24}.
        out_dim: H. None (for "channel_concat" only) leaves the concatenation without a projector.
        method: "channel_concat", "sequence" or "qformer".
        grid: the target grid of "channel_concat"; the first encoder's where None.
        mode, align_corners: how maps are resized, see `pyvlm.ops.fuse_grids`.
        norm: "layernorm" normalises the channels side by side (ViP-LLaVA), for "channel_concat" only.
        projector: see `build_projector`; for "channel_concat" only.
        merge_weights, shared_projection: see `MergeLevels`.
        hidden_dim: for "sequence", width of the first of two layers, see `PatchesToToken`; one layer where
            None.
        qformer: for "qformer", the options of `QFormerFusion`, such as {"hidden_dim": 768, "num_layers": 2}.

    Attributes:
        num_tokens: T of the output. out_dim: H of the output.
    """

    def __init__(
        self,
        encoders: Mapping[str, EncoderFeatures | Mapping[str, Any]],
        out_dim: int | None = None,
        *,
        method: Method = "channel_concat",
        grid: tuple[int, int] | None = None,
        mode: str = "bilinear",
        align_corners: bool = False,
        norm: Literal["none", "layernorm"] = "none",
        projector: Projector = "linear",
        merge_weights: Literal["softmax", "free", "fixed"] = "softmax",
        shared_projection: bool = True,
        hidden_dim: int | None = None,
        qformer: Mapping[str, int] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("FeatureFusion: encoders is empty; name at least one")
        if method not in get_args(Method):
            raise ValueError(
                f"FeatureFusion: method={method!r} is unknown; expected one of {', '.join(get_args(Method))}"
            )
        self.encoders = {name: _encoder_features(name, entry) for name, entry in encoders.items()}
        self.method, self.mode, self.align_corners, self.backend = method, mode, align_corners, backend
        self.merges, self.downsamples, self.aligns = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
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
            if encoder.levels > 1 and encoder.merge == "gated":
                self.merges[name] = GatedSum(encoder.levels)
            if encoder.downsample:
                self.downsamples[name] = Downsample(encoder.merged_channels, encoder.downsample, backend)
            if encoder.align_dim is not None:
                merged = dataclasses.replace(encoder, align_dim=None).fused_channels
                self.aligns[name] = build_projector(encoder.align, merged, encoder.align_dim)
        channels = [encoder.fused_channels for encoder in self.encoders.values()]
        if method != "channel_concat":
            if out_dim is None:
                raise ValueError(
                    f'FeatureFusion: method "{method}" needs an out_dim; give the width of a token'
                )
            if norm != "none" or projector != "linear" or self.downsamples:
                raise ValueError(
                    'FeatureFusion: norm, projector and downsample belong to method "channel_concat"'
                )
            self.to_tokens: nn.Module
            if method == "qformer":
                queries = [encoder.queries for encoder in self.encoders.values()]
                self.num_tokens = sum(queries)
                self.to_tokens = QFormerFusion(channels, out_dim, queries, **(qformer or {}))
            else:
                self.num_tokens = sum(_tokens_in_sequence(name, e) for name, e in self.encoders.items())
                patches = [encoder.patches for encoder in self.encoders.values()]
                self.to_tokens = PatchesToToken(channels, out_dim, patches, hidden_dim, backend)
        else:
            self.grid = _pair(grid) if grid is not None else next(iter(self.encoders.values())).grid
            self.num_tokens = math.prod(self.grid)
            self.norm = nn.LayerNorm(sum(channels)) if norm == "layernorm" else None
            self.projection = None if out_dim is None else build_projector(projector, sum(channels), out_dim)
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
        if self.method != "channel_concat":
            return self.to_tokens(maps)
        grids = [self.grid if e.downsample else e.grid for e in self.encoders.values()]
        layers = [] if self.projection is None else list(_layers(self.projection))
        weight: Tensor | None = None
        bias: Tensor | None = None
        if self.norm is None and layers and isinstance(layers[0], nn.Linear):
            # The op projects without making the concatenation.
            weight, bias, layers = layers[0].weight, layers[0].bias, layers[1:]
        fused = fuse_grids(maps, grids, self.grid, weight, bias, self.mode, self.align_corners, self.backend)
        for layer in layers if self.norm is None else [self.norm, *layers]:
            fused = layer(fused)
        return fused

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
        if name in self.downsamples:
            merged = self.downsamples[name](merged, encoder.grid, self.grid)
        return self.aligns[name](merged) if name in self.aligns else merged


def _layers(projector: nn.Module) -> Iterable[nn.Module]:
    return projector if isinstance(projector, nn.Sequential) else [projector]


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


class GatedSum(nn.Module):
    """v_1 + Σ_l α_l v_l over the further levels, α learned from 0; DeepSeek-VL (arXiv 2403.05525)."""

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(num_levels - 1))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Adds L maps of one shape."""
        merged, *further = levels
        for alpha, level in zip(self.alpha, further, strict=True):
            merged = merged + alpha * level
        return merged


class Downsample(nn.Module):
    """A map brought to 2^steps times the target grid, then halved by so many convolutions.

    Each convolution is 3 × 3 of stride 2 without a bias, and doubles the channels. So DeepSeek-VL (arXiv
    2403.05525) brings SAM's map to the grid of SigLIP.
    """

    def __init__(self, channels: int, steps: int, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.convs = nn.Sequential(
            *(
                nn.Conv2d(channels * 2**i, channels * 2 ** (i + 1), 3, stride=2, padding=1, bias=False)
                for i in range(steps)
            )
        )

    def forward(self, x_NTC: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
        """A map [N, T, C] of `grid` as [N, target, C · 2^steps]."""
        rows, columns = (side * 2 ** len(self.convs) for side in target)
        resized = fuse_grids([x_NTC], [grid], (rows, columns), backend=self.backend)
        return self.convs(resized.transpose(1, 2).unflatten(2, (rows, columns))).flatten(2).transpose(1, 2)


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

"""The configurations of connectors: what stands between the fused features and the language model."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from pyvlm.models.encoders import Pair
from pyvlm.models.tower_config import Config, Size
from pyvlm.nn.projector import Projector


class QFormerConfig(Config):
    """See `pyvlm.nn.QFormerFusion`; the queries are each tower's."""

    hidden_dim: Size = 768
    num_layers: Size = 2
    num_heads: Size = 12
    intermediate_dim: Size | None = None
    cross_attention_frequency: Size = 2

    @model_validator(mode="after")
    def _heads_divide(self) -> "QFormerConfig":
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_dim {self.hidden_dim}")
        return self


class QFormerConnectorConfig(QFormerConfig):
    """BLIP-2's (arXiv 2301.12597): queries read the fused tokens, and a linear layer widens what they found.

    See `pyvlm.nn.QFormer`; BLIP-2 has 12 layers.
    """

    type: Literal["qformer"] = "qformer"
    queries: Size = 32

    @property
    def grid(self) -> Pair:
        return 1, self.queries


class ResamplerConfig(Config):
    """Qwen-VL's (arXiv 2308.12966): a grid of queries reads the fused map, whatever the map's own grid.

    See `pyvlm.nn.Resampler`. A norm and a square linear layer without bias follow, as in the released code.
    """

    type: Literal["resampler"] = "resampler"
    queries: Size = 256
    num_heads: Size | None = None  # None: one for each 128 channels of the language model

    @property
    def grid(self) -> Pair:
        return _square(self.queries)

    def heads(self, hidden_size: int) -> int:
        """Attention heads for tokens of so many channels."""
        heads = self.num_heads or max(1, hidden_size // 128)
        if hidden_size % heads or hidden_size % 4:
            raise ValueError(
                f"connector: the hidden_size {hidden_size} of the language model must be a "
                f"multiple of 4 and of num_heads {heads}"
            )
        return heads

    @model_validator(mode="after")
    def _is_a_grid(self) -> "ResamplerConfig":
        _square(self.queries)
        return self


class SVAConfig(Config):
    """Cambrian-1's (arXiv 2406.16860): a grid of queries reads each tower's map where it lies.

    See `pyvlm.nn.SpatialVisionAggregator`; its tokens pass "mlp2x_gelu". It takes the place of the fusion.

    Attributes:
        windows: side of a query's window in the map of each tower; None: the nearest to the map's own size.
            Maps are resized to so many cells a query.
    """

    type: Literal["sva"] = "sva"
    queries: Size = 576
    hidden_dim: Size = 1024
    num_layers: Size = 3
    num_heads: Size = 16
    windows: list[Size] | None = None
    separate: bool = False

    @property
    def grid(self) -> Pair:
        return _square(self.queries)

    def windows_of(self, grids: list[Pair]) -> list[int]:
        """The side of a query's window in each of these maps."""
        if self.windows is None:
            return [max(1, round(rows / self.grid[0])) for rows, _ in grids]
        if len(self.windows) != len(grids):
            raise ValueError(
                f"connector: {len(self.windows)} windows for {len(grids)} towers; give one a tower"
            )
        return self.windows

    @model_validator(mode="after")
    def _heads_divide(self) -> "SVAConfig":
        _square(self.queries)
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_dim {self.hidden_dim}")
        return self


def _square(queries: int) -> Pair:
    side = math.isqrt(queries)
    if side**2 != queries:
        raise ValueError(
            f"queries is {queries}, and must be a square, such as {side**2} or {(side + 1) ** 2}"
        )
    return side, side


def _kind(connector: Any) -> str | None:
    """The `type` of a mapping; every other value can only be a projector's name."""
    if isinstance(connector, Mapping):
        kind = connector.get("type")
        return kind if isinstance(kind, str) else None
    return getattr(connector, "type", "projector")


Connector = Annotated[
    Annotated[Literal[Projector, "none"], Tag("projector")]
    | Annotated[ResamplerConfig, Tag("resampler")]
    | Annotated[QFormerConnectorConfig, Tag("qformer")]
    | Annotated[SVAConfig, Tag("sva")],
    Discriminator(
        _kind,
        custom_error_type="connector_type",
        custom_error_message="expected a projector's name, or a mapping whose type is "
        '"resampler", "qformer" or "sva"',
    ),
]

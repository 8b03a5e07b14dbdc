"""From the levels of the vision towers to tokens of the language model's width."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pyvlm.models.config import VLMConfig
from pyvlm.models.connector_config import QFormerConnectorConfig, ResamplerConfig, SVAConfig
from pyvlm.nn.cross_attention import Resampler
from pyvlm.nn.fusion import EncoderFeatures, FeatureFusion
from pyvlm.nn.linear import Linear
from pyvlm.nn.projector import build_projector
from pyvlm.nn.qformer import QFormer
from pyvlm.nn.spatial_aggregator import SpatialVisionAggregator


def build_fusion(config: VLMConfig) -> FeatureFusion:
    """The fusion of a configuration's towers: from name -> levels to [N, T, fusion.out_dim].

    For connector "sva", which fuses by itself, to the towers' maps.
    """
    fusion = config.fusion
    kind = EncoderMaps if isinstance(config.connector, SVAConfig) else FeatureFusion
    return kind(
        _encoders(config),
        fusion.hidden_size,
        method=fusion.method,
        grid=None if fusion.grid is None else (fusion.grid, fusion.grid),
        mode=fusion.mode,
        align_corners=fusion.align_corners,
        norm=fusion.norm,
        projector=fusion.projector,
        merge_weights=fusion.merge_weights,
        shared_projection=fusion.shared_projection,
        qformer=None if fusion.qformer is None else fusion.qformer.model_dump(),
        backend=config.backend,
    )


def _encoders(config: VLMConfig) -> dict[str, EncoderFeatures]:
    return {
        tower.name: EncoderFeatures(
            channels=tower.channels_out,
            grid=tower.grid(config.image.size),
            levels=len(tower.levels),
            merge=tower.merge,
            downsample=tower.downsample,
            align_dim=tower.align_dim,
            align=tower.align,
            patches=tower.patches,
            queries=tower.queries,
        )
        for tower in config.vision_towers
    }


class EncoderMaps(FeatureFusion):
    """The map of each encoder, merged and aligned, for a connector that fuses them itself."""

    def forward(self, features: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:  # type: ignore[override]
        """One [N, T, C] an encoder, in the order of the encoders; `features` as in `FeatureFusion`."""
        return [self._encoder_map(name, features[name]) for name in self.encoders]


def build_connector(config: VLMConfig, in_size: int) -> nn.Module:
    """From what the fusion gives, [N, T, in_size], to tokens of the language model's width.

    There are `config.tokens_per_image` of them. Projectors are those of `pyvlm.nn.build_projector`.
    """
    connector, hidden_size = config.connector, config.language.hidden_size
    if isinstance(connector, ResamplerConfig):
        heads = connector.heads(hidden_size)
        return nn.Sequential(
            Resampler(connector.grid[0], hidden_size, heads, in_size, backend=config.backend),
            nn.LayerNorm(hidden_size, eps=1e-6),
            Linear(hidden_size, hidden_size, bias=False),
        )
    if isinstance(connector, QFormerConnectorConfig):
        options = connector.model_dump(exclude={"type", "queries"})
        qformer = QFormer(connector.queries, kv_dim=in_size, **options)
        return nn.Sequential(qformer, Linear(connector.hidden_dim, hidden_size))
    if isinstance(connector, SVAConfig):
        return _build_aggregator(config, connector)
    if connector == "none":
        return nn.Identity()
    return build_projector(connector, in_size, hidden_size)


def _build_aggregator(config: VLMConfig, connector: SVAConfig) -> nn.Module:
    encoders = _encoders(config)
    grids = [encoder.grid for encoder in encoders.values()]
    aggregator = SpatialVisionAggregator(
        [encoder.fused_channels for encoder in encoders.values()],
        grids,
        connector.grid,
        connector.windows_of(grids),
        connector.hidden_dim,
        connector.num_layers,
        connector.num_heads,
        connector.separate,
        config.backend,
    )
    return nn.Sequential(
        aggregator, build_projector("mlp2x_gelu", connector.hidden_dim, config.language.hidden_size)
    )

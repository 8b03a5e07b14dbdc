"""From the levels of the vision towers to tokens of the language model's width."""

from torch import nn

from pyvlm.models.config import VLMConfig
from pyvlm.nn.fusion import EncoderFeatures, FeatureFusion
from pyvlm.nn.projector import build_projector


def build_fusion(config: VLMConfig) -> FeatureFusion:
    """The fusion of a configuration's towers: from name -> levels to [N, tokens_per_image, hidden_size]."""
    encoders = {
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
    fusion = config.fusion
    return FeatureFusion(
        encoders,
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


def build_connector(config: VLMConfig, in_size: int) -> nn.Module:
    """From [..., in_size] to [..., hidden size of the language model]; see `pyvlm.nn.build_projector`."""
    if config.connector == "none":
        return nn.Identity()
    return build_projector(config.connector, in_size, config.language.hidden_size)

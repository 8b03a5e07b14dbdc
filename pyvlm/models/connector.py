"""From the levels of the vision towers to tokens of the language model's width."""

from torch import nn

from pyvlm.models.config import VLMConfig
from pyvlm.nn.fusion import EncoderFeatures, FeatureFusion


def build_fusion(config: VLMConfig) -> FeatureFusion:
    """The fusion of a configuration's towers: from name -> levels to [N, tokens_per_image, hidden_size]."""
    encoders = {
        tower.name: EncoderFeatures(
            channels=tower.channels_out,
            grid=tower.grid(config.image.size),
            levels=len(tower.levels),
            merge=tower.merge,
            align_dim=tower.align_dim,
            patches=tower.patches,
        )
        for tower in config.vision_towers
    }
    fusion = config.fusion
    return FeatureFusion(
        encoders,
        fusion.hidden_size,
        method=fusion.method,
        grid=None if fusion.grid is None else (fusion.grid, fusion.grid),
        merge_weights=fusion.merge_weights,
        shared_projection=fusion.shared_projection,
        backend=config.backend,
    )


def build_connector(kind: str, in_size: int, out_size: int) -> nn.Module:
    """From [..., in_size] to [..., out_size].

    "linear" is the connector of LLaVA (arXiv 2304.08485), "mlp2x_gelu" that of LLaVA 1.5 (arXiv 2310.03744).

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "linear":
        return nn.Linear(in_size, out_size)
    if kind == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(in_size, out_size), nn.GELU(), nn.Linear(out_size, out_size))
    raise ValueError(f'connector {kind!r} is unknown; expected "linear" or "mlp2x_gelu"')

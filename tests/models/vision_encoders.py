"""Small encoders of every family that transformers has, and what it says of them itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyvlm.models import ImageConfig, TransformersConfig
from pyvlm.models.encoders import FAMILIES, read_encoder
from pyvlm.models.pretrained_vision import TransformersTower

transformers = pytest.importorskip("transformers")

VIT = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
CONVNEXT = {"depths": [1, 2, 1], "hidden_sizes": [4, 6, 8], "num_stages": 3}
SMALL = {"image_size": 12, "patch_size": 4}
ENCODERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": VIT | SMALL,
    "siglip_vision_model": VIT | SMALL,
    "siglip2_vision_model": VIT | {"patch_size": 4, "num_patches": 9},
    "aimv2_vision_model": VIT | SMALL,
    "dinov2": VIT | SMALL,
    "dinov2_with_registers": VIT | SMALL | {"num_register_tokens": 2},
    "dinov3_vit": VIT | SMALL | {"num_register_tokens": 2},
    "dinov3_convnext": {"depths": [1, 2, 1], "hidden_sizes": [4, 6, 8], "image_size": 32},
    "convnext": CONVNEXT | {"patch_size": 4, "image_size": 32},
    "convnextv2": CONVNEXT | {"patch_size": 4, "image_size": 32},
    "sam_vision_model": {
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "output_channels": 6,
        "mlp_dim": 12,
        "image_size": 24,
        "patch_size": 4,
        "window_size": 4,
        "global_attn_indexes": [1],
    },
    "layoutlmv3": VIT | {"input_size": 12, "patch_size": 4, "coordinate_size": 1, "shape_size": 2},
    "vit": VIT | SMALL,
    "vit_mae": VIT | SMALL,
}
LEADING = {"clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 3, "dinov3_vit": 3, "layoutlmv3": 1}
LEADING |= {"vit": 1, "vit_mae": 1}


def config(model_type: str, **options: Any) -> TransformersConfig:
    entry = {"model_type": model_type, **ENCODERS[model_type]}
    return TransformersConfig.model_validate({"name": "tower", "encoder": entry} | options)


def whole_encoder(model_type: str, **changes: Any) -> nn.Module:
    """The whole model as transformers makes it, every parameter away from its start."""
    torch.manual_seed(5)
    source = read_encoder({"model_type": model_type, **ENCODERS[model_type], **changes})
    model = transformers.AutoModel.from_config(source.config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def same_weights(tower: TransformersTower, whole: nn.Module) -> TransformersTower:
    kept = tower.encoder.state_dict().keys()
    tower.encoder.load_state_dict({name: x for name, x in whole.state_dict().items() if name in kept})
    return tower.eval()


def shared_pixels(tower: TransformersConfig) -> ImageConfig:
    """Pixels that are normalised as the encoder wants them already."""
    return ImageConfig(size=tower.image_size[0], mean=tower.mean, std=tower.std)


def build(model_type: str, **options: Any) -> tuple[TransformersTower, nn.Module, TransformersConfig]:
    given = config(model_type, **options)
    whole = whole_encoder(model_type)
    return same_weights(TransformersTower(given, shared_pixels(given)), whole), whole, given


def pictures(size: tuple[int, int], count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size)


def hidden_states(whole: nn.Module, model_type: str, images: Tensor) -> tuple[Tensor, ...]:
    """As transformers gives them."""
    arguments: dict[str, Any] = {"pixel_values": images}
    size = tuple(images.shape[2:])
    if model_type == "siglip2_vision_model":
        from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

        as_patches = [convert_image_to_patches(x.float().numpy(), 4) for x in images]
        patches = torch.stack([torch.from_numpy(x) for x in as_patches]).to(images.dtype)
        arguments = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32),
            "spatial_shapes": torch.tensor([[size[0] // 4, size[1] // 4]] * len(images)),
        }
    if FAMILIES[model_type].positions == "interpolated":
        arguments["interpolate_pos_encoding"] = size != (12, 12)
    if model_type == "vit_mae":
        count = size[0] // 4 * (size[1] // 4)
        arguments["noise"] = torch.arange(count).float().expand(len(images), -1)
    return whole(**arguments, output_hidden_states=True).hidden_states


def tokens(level: Tensor, model_type: str) -> Tensor:
    """A hidden state as the tower hands it on: patches row by row."""
    if FAMILIES[model_type].form == "map":
        return level.flatten(2).transpose(1, 2)
    if level.dim() == 4:
        return level.flatten(1, 2)
    return level[:, LEADING.get(model_type, 0) :]


def levels_of(model_type: str) -> list[int]:
    """Every level that can stand alone; those of a ConvNeXt have unlike shapes."""
    return list(range(config(model_type).num_levels))

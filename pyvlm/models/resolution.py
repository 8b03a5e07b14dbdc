"""Images of another size for a model that is trained already: its positions are interpolated.

Qwen-VL (arXiv 2308.12966) goes from 224 to 448 pixels between its stages, PaLI-3 (arXiv 2310.09199) further.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyvlm.models.adapters import shallow_copy
from pyvlm.models.config import VLMConfig
from pyvlm.models.connector import build_connector, build_fusion
from pyvlm.models.connector_config import SVAConfig
from pyvlm.models.encoders import Pair
from pyvlm.models.pretrained_vision import TransformersTower
from pyvlm.models.tower_config import TransformersConfig
from pyvlm.models.vision import ViTTower, build_tower

if TYPE_CHECKING:
    from pyvlm.models.vlm import VLM


def with_image_size(config: VLMConfig, size: int) -> VLMConfig:
    """The configuration of a model that sees images of size × size pixels.

    A tower of transformers that takes the model's images as they are takes the larger ones; one that resizes
    them to a size of its own keeps it. Where no queries read them, more pixels are more tokens an image.

    Raises:
        ValueError: with tiling, whose tiles have one size; a tower that cannot take the size, or none that
            follows; a connector or scheme of positions with a weight for each window or column, whose number
            would be another.
    """
    if size == config.image.size:
        return config
    what = f"images of {size} pixels in place of {config.image.size}"
    if config.tiling is not None:
        raise ValueError(
            f"{what}: with tiling every tile has the size that it begins with; leave out one of them"
        )
    towers = [_with_size(tower, config.image.size, size) for tower in config.vision_towers]
    if all(isinstance(tower, TransformersConfig) for tower in towers) and towers == config.vision_towers:
        sizes = ", ".join(f"{tower.name} {tower.image_size[0]}" for tower in towers)
        raise ValueError(
            f"{what}: every tower resizes images to a size of its own ({sizes}), and would see the same"
        )
    changes = {"image": config.image.model_copy(update={"size": size}), "vision_towers": towers}
    try:
        new = VLMConfig.model_validate(dict(config) | changes)
    except ValueError as error:
        raise ValueError(f"{what}: {_reason(error)}") from error
    if config.position_scheme == "share-by-row-and-column" and _columns(config) != _columns(new):
        raise ValueError(
            f'{what}: position_scheme "share-by-row-and-column" has learned embeddings of {_columns(config)} '
            f"columns, and there would be {_columns(new)}"
        )
    if isinstance(config.connector, SVAConfig) and _windows(config) != _windows(new):
        raise ValueError(
            f"{what}: connector sva has weights for windows of {_windows(config)} cells, and they would be "
            f"of {_windows(new)}: give connector.windows, which keeps them"
        )
    return new


def change_image_size(model: "VLM", size: int) -> "VLM":
    """A model of the same weights that sees images of size × size pixels, its positions interpolated.

    Tables of towers of transformers are interpolated by the encoder's own `interpolate_pos_encoding`, so that
    the tower computes what the encoder makes of images of this size; encoders that interpolate in every pass
    by themselves (DINOv2, SigLIP 2) or have no table keep all their weights. Those of our own ("vit") are
    interpolated in the same way (bicubic, without antialiasing).

    Returns:
        A new model whose `config` says what it is. Everything but these tables is `model`'s very tensors.

    Raises:
        ValueError: as `with_image_size`.
    """
    config = with_image_size(model.config, size)
    new = shallow_copy(model)
    new.config = config
    if config is model.config:
        return new
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # what is drawn for new modules is replaced
        new.vision_towers = nn.ModuleDict()
        for tower in config.vision_towers:
            fresh = build_tower(tower, config.image, config.backend)
            old = model.vision_towers[tower.name]
            tensors = old.state_dict(keep_vars=True)
            tables = {
                name for name, tensor in fresh.state_dict().items() if tensor.shape != tensors[name].shape
            }
            for name in tables:
                shape = fresh.state_dict()[name].shape
                table = _interpolated(old, tower.grid(model.config.image.size), tower.grid(size), shape[-1])
                tensors[name] = nn.Parameter(table.reshape(shape).contiguous())
            fresh.load_state_dict(tensors, assign=True)
            new.vision_towers[tower.name] = fresh
        new.fusion = build_fusion(config)
        new.fusion.load_state_dict(model.fusion.state_dict(keep_vars=True), assign=True)
        new.connector = build_connector(config, new.fusion.out_dim)
        new.connector.load_state_dict(model.connector.state_dict(keep_vars=True), assign=True)
    return new.to(device).train(model.training)


def _with_size(tower: Any, old: int, size: int) -> Any:
    """The configuration of a tower where images are of `size` in place of `old`."""
    if not isinstance(tower, TransformersConfig) or tower.image_size != (old, old):
        return tower
    encoder = tower.encoder
    if tower.source.family.positions == "interpolated":  # its table is of the size that it says
        encoder = encoder | {"image_size": size}
    try:
        return TransformersConfig.model_validate(
            tower.model_dump() | {"encoder": encoder, "image_size": (size, size)}
        )
    except ValueError as error:
        raise ValueError(f"images of {size} pixels in place of {old}: {_reason(error)}") from error


def _interpolated(tower: nn.Module, old: Pair, new: Pair, channels: int) -> Tensor:
    """The table of positions of a tower, [1, leading + T, C] or [T, C], for another grid."""
    if isinstance(tower, ViTTower):
        table_1Chw = tower.position.T.reshape(1, -1, *old).float()
        larger_1Chw = nn.functional.interpolate(table_1Chw, size=new, mode="bicubic", align_corners=False)
        return larger_1Chw.flatten(2)[0].T.to(tower.position.dtype)
    assert isinstance(tower, TransformersTower)
    embeddings: Any = next(m for m in tower.encoder.modules() if hasattr(m, "interpolate_pos_encoding"))
    # It reads no more of the tokens than how many there are, and of how many channels.
    tokens = torch.empty(1, tower.leading + new[0] * new[1], channels, device="meta")
    pixels = [side * tower.patch_size for side in new]
    table: Tensor = embeddings.interpolate_pos_encoding(tokens, *pixels)
    return table


def _columns(config: VLMConfig) -> int:
    return max(columns for _, columns in config.token_grids)


def _windows(config: VLMConfig) -> list[int]:
    assert isinstance(config.connector, SVAConfig)
    return config.connector.windows_of([tower.grid(config.image.size) for tower in config.vision_towers])


def _reason(error: ValueError) -> str:
    """What a check of a configuration says, in one line."""
    errors = getattr(error, "errors", None)
    messages = [entry["msg"].removeprefix("Value error, ") for entry in errors()] if errors else [str(error)]
    return "; ".join(messages)

"""Vision encoders of transformers as towers: only the levels asked for are kept, and the rest is not run.

Shapes: N images, C channels, T = h·w tokens.
"""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyvlm.models.encoders import Encoder, read_folder
from pyvlm.models.tower_config import ImageConfig, TransformersConfig

# What the names of an encoder's weights begin with in a LLaVA; older ones have the second part too.
OF_LLAVA = r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"


class End(nn.Module):
    """Stands in place of the layers that were cut off; what it is given is the last level."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class TransformersTower(nn.Module):
    """An encoder of transformers, cut behind the highest level that is handed on.

    Images are resized and normalised as the encoder wants them. Its levels are the `hidden_states` of the
    whole model, less class token and registers. Layers above the highest level, heads, and (unless
    `last_norm`) the last norm are no part of the module.

    Args:
        config: the tower.
        image: the pixels that it will be given.
        backend: not used; the encoder's own attention runs.

    Raises:
        ValueError: the folder of `config.pretrained` has no safetensors, or lacks weights.
    """

    _scale: Tensor
    _shift: Tensor

    def __init__(self, config: TransformersConfig, image: ImageConfig, backend: str = "auto") -> None:
        super().__init__()
        source = config.source
        self.family, self.image_size = source.family, config.image_size
        self.levels, self.leading = config.level_indices, source.leading
        self.own_size, self.patch_size = source.own_size, getattr(source.config, "patch_size", 1)
        self.encoder, missing = _make(source, config.pretrained)
        self._cut()
        # A level is what the next layer takes, and so each is the first argument of one module.
        layers = self.encoder.get_submodule(self.family.layers)
        for level in self.levels:
            layers.get_submodule(str(level)).register_forward_pre_hook(partial(self._keep, level))
        self._kept: dict[int, Tensor] | None = None

        needed = set(self.encoder.state_dict())
        self.last_norms = self._take_last_norms()
        if not config.last_norm:
            self.last_norms, needed = None, set(self.encoder.state_dict())
        if lost := sorted(missing & needed):
            raise ValueError(
                f"{config.pretrained} lacks {len(lost)} weights of its {source.config.model_type}: "
                f"{', '.join(lost[:5])}"
            )

        # From (x − mean) / std of the shared pixels to that of the encoder: x · scale + shift.
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(-1, 1, 1) for values in (image.mean, image.std, config.mean, config.std)
        )
        channels = source.config.num_channels
        self.register_buffer("_scale", (std / own_std).expand(channels, 1, 1).clone(), persistent=False)
        self.register_buffer(
            "_shift", ((mean - own_mean) / own_std).expand(channels, 1, 1).clone(), persistent=False
        )

    def _cut(self) -> None:
        """Takes out the layers above the highest level, and what no level passes."""
        layers = self.encoder.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        del layers[max(self.levels) :]
        layers.append(End())
        for path in self.family.unused:
            parent, _, name = path.rpartition(".")
            setattr(self.encoder.get_submodule(parent), name, None)

    def _take_last_norms(self) -> nn.ModuleList | None:
        """Takes out what stands behind the layers: one for all levels, but of SAM a copy a level."""
        if self.family.last is None:
            return None
        last_norm = self.encoder.get_submodule(self.family.last)
        self.encoder.set_submodule(self.family.last, nn.Identity())
        further = len(self.levels) - 1 if self.family.form == "rows" else 0
        return nn.ModuleList([last_norm, *(deepcopy(last_norm) for _ in range(further))])

    def forward(self, images_NCHW: Tensor) -> list[Tensor]:
        """The levels of images [N, C, H, W] of any size, in the order asked for, [N, T, C] each."""
        self._kept = {}
        try:
            self.encoder(**self._arguments(self._prepare(images_NCHW)))
            kept = self._kept
        finally:
            self._kept = None
        return [self._as_tokens(kept[level], i) for i, level in enumerate(self.levels)]

    def _keep(self, level: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._kept is not None:  # None: a checkpointed layer that runs again, in the backward pass
            self._kept[level] = arguments[0]

    def _prepare(self, images_NCHW: Tensor) -> Tensor:
        """Images as the encoder wants them: its size, its normalisation, its channels, its dtype."""
        weight = next(self.encoder.parameters(), images_NCHW)  # level 0 of DINOv3's ConvNeXt has none
        x_NCHW = images_NCHW.to(torch.promote_types(images_NCHW.dtype, torch.float32))
        if tuple(x_NCHW.shape[2:]) != self.image_size:
            x_NCHW = nn.functional.interpolate(
                x_NCHW, size=self.image_size, mode="bilinear", antialias=True, align_corners=False
            )
        return (x_NCHW * self._scale + self._shift).to(weight.dtype)

    def _arguments(self, images_NCHW: Tensor) -> dict[str, Any]:
        """What the encoder's forward takes."""
        size, patch = self.image_size, self.patch_size
        arguments: dict[str, Any] = {"pixel_values": images_NCHW}
        if self.family.positions == "interpolated":
            arguments["interpolate_pos_encoding"] = size != self.own_size
        if self.family.takes_noise:  # in rising order nothing is shuffled
            count = (size[0] // patch) * (size[1] // patch)
            rising = torch.arange(count, device=images_NCHW.device, dtype=torch.float32)
            arguments["noise"] = rising.expand(len(images_NCHW), -1)
        if self.family.takes_patches:
            rows, columns = size[0] // patch, size[1] // patch
            whole = images_NCHW[..., : rows * patch, : columns * patch]
            patches = whole.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
            arguments["pixel_values"] = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
            arguments["pixel_attention_mask"] = None  # no patch is padding
            arguments["spatial_shapes"] = torch.tensor([[rows, columns]]).expand(len(images_NCHW), 2)
        return arguments

    def _as_tokens(self, level: Tensor, number: int) -> Tensor:
        """A level [N, T, C], after its last norm where there is one."""
        norm = None if self.last_norms is None else self.last_norms[number % len(self.last_norms)]
        form = self.family.form
        if form == "rows" and norm is not None:  # SAM's neck makes a map of it
            return norm(level).flatten(2).transpose(1, 2)
        if form == "rows":
            tokens_NTC = level.flatten(1, 2)
        elif form == "map":
            tokens_NTC = level.flatten(2).transpose(1, 2)
        else:
            tokens_NTC = level[:, self.leading :]
        return tokens_NTC if norm is None else norm(tokens_NTC)

    def _apply(self, fn: Any, recurse: bool = True) -> "TransformersTower":
        """Moves and casts as ever, but buffers that are no weights (rotary frequencies, the normalisation)
        stay in float32: they are not in a checkpoint, and must not depend on the path to half precision."""
        exact = {
            (module, name): buffer
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set and buffer.is_floating_point()
        }
        super()._apply(fn, recurse)
        for (module, name), buffer in exact.items():
            setattr(module, name, buffer.to(getattr(module, name).device))
        return self


def _is_llava(folder: str) -> bool:
    """Whether the encoder is a part of a LLaVA, whose weights have names of their own."""
    given, _ = read_folder(folder)
    return given.get("model_type") in ("llava", "llava_next")


def _make(source: Encoder, pretrained: str | None) -> tuple[nn.Module, set[str]]:
    """The whole encoder, and the names of weights that its folder lacks."""
    from transformers import AutoModel

    if pretrained is None:
        return AutoModel.from_config(source.config, dtype=torch.get_default_dtype()), set()
    return load_encoder(source.config, pretrained)


def load_encoder(config: Any, pretrained: str) -> tuple[nn.Module, set[str]]:
    """The encoder of a configuration of transformers with a folder's weights, and names of those it lacks.

    Raises:
        ValueError: the folder has no safetensors, or cannot be read.
    """
    from transformers import AutoModel

    try:
        model, report = AutoModel.from_pretrained(
            pretrained,
            config=config,
            dtype=torch.get_default_dtype(),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({"key_mapping": {OF_LLAVA: ""}} if _is_llava(pretrained) else {}),
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{pretrained}: cannot be read as {config.model_type} ({error})") from error
    return model, set(report["missing_keys"])

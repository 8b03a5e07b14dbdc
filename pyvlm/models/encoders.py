"""The vision encoders of transformers that a tower can be: what each is like, read off its configuration.

transformers is imported when the first of them is asked for, and never runs code of a checkpoint.

Sizes and grids are (rows, columns). A level is numbered as in transformers' `hidden_states`: 0 is what the
first layer (of ConvNeXt, stage) takes, i what layer i gives.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Pair = tuple[int, int]
Channels = tuple[float, ...]

_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Family:
    """What a transformers model does not say of itself; the rest is read off its configuration.

    Attributes:
        layers: path of the list of layers (of ConvNeXt, stages) whose inputs and outputs are the levels.
        form: of a level: "tokens" [N, leading + T, C], "rows" [N, h, w, C], "map" [N, C, h, w].
        last: path of what stands behind the layers: a norm over the channels, or SAM's neck; None: nothing.
        positions: how an image of another size than the encoder's own is met: "any", "interpolated" (by an
            argument of the model), or "fixed" (refused).
        class_token: whether one leads the patches. Registers are in the configuration.
        takes_patches: whether the model takes patches in place of images (SigLIP 2).
        takes_noise: whether it shuffles patches, by an argument (MAE).
        pixels: mean and standard deviation that it was trained with, where no preprocessor says so.
        overrides: entries of the configuration that leave out heads which no level passes.
        unused: paths of modules and parameters which no level passes, and no override leaves out.
    """

    layers: str
    form: Literal["tokens", "rows", "map"] = "tokens"
    last: str | None = "layernorm"
    positions: Literal["any", "interpolated", "fixed"] = "any"
    class_token: bool = True
    takes_patches: bool = False
    takes_noise: bool = False
    pixels: tuple[Channels, Channels] = _IMAGENET
    overrides: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


# One entry a `model_type` of a vision configuration of transformers.
FAMILIES = {
    "clip_vision_model": Family(
        "encoder.layers", last="post_layernorm", positions="interpolated", pixels=_CLIP
    ),
    "siglip_vision_model": Family(
        "encoder.layers",
        last="post_layernorm",
        positions="interpolated",
        class_token=False,
        pixels=_HALF,
        overrides={"vision_use_head": False},
    ),
    "siglip2_vision_model": Family(
        "encoder.layers",
        last="post_layernorm",
        class_token=False,
        takes_patches=True,
        pixels=_HALF,
        overrides={"vision_use_head": False},
    ),
    "aimv2_vision_model": Family(
        "encoder.layers",
        last="rms_norm",
        positions="fixed",
        class_token=False,
        pixels=_CLIP,
        overrides={"use_head": False},
    ),
    "dinov2": Family("encoder.layer", overrides={"use_mask_token": False}),
    "dinov2_with_registers": Family("encoder.layer", unused=("embeddings.mask_token",)),
    "dinov3_vit": Family("model.layer", last="norm", unused=("embeddings.mask_token",)),
    "dinov3_convnext": Family("model.stages", form="map", last="layer_norm"),
    "convnext": Family("encoder.stages", form="map"),
    "convnextv2": Family("encoder.stages", form="map"),
    "sam_vision_model": Family(
        "vision_encoder.layers", form="rows", last="vision_encoder.neck", positions="fixed"
    ),
    "layoutlmv3": Family(
        "encoder.layer", last=None, positions="fixed", pixels=_HALF, overrides={"text_embed": False}
    ),
    "vit": Family("layers", positions="interpolated", pixels=_HALF, unused=("pooler",)),
    "vit_mae": Family("layers", positions="interpolated", takes_noise=True, overrides={"mask_ratio": 0.0}),
}


@dataclass(frozen=True)
class Encoder:
    """One encoder: its family and its configuration, an object of transformers."""

    family: Family
    config: Any

    @property
    def num_levels(self) -> int:
        return self.config.num_stages + 1 if self._has_stages else self.config.num_hidden_layers + 1

    @property
    def own_size(self) -> Pair:
        """The image size that it was made for."""
        if self.family.takes_patches:
            return _pair(math.isqrt(self.config.num_patches) * self.config.patch_size)
        return _pair(getattr(self.config, "image_size", None) or self.config.input_size)

    @property
    def leading(self) -> int:
        """Tokens before those of the patches: class token and registers."""
        if self.family.form != "tokens":
            return 0
        return int(self.family.class_token) + getattr(self.config, "num_register_tokens", 0)

    def grid(self, size: Pair, level: int) -> Pair:
        """The grid of a level of an image.

        Raises:
            ValueError: the encoder cannot take an image of this size.
        """
        native = getattr(self.config, "is_native", False)  # AIMv2 with positions made for every size
        if self.family.positions == "fixed" and not native and size != self.own_size:
            raise ValueError(
                f"{self.config.model_type} takes images of {self.own_size} only, not {size}: "
                "leave image_size out, and they are resized"
            )
        rows, columns = self._stride(level)
        grid = size[0] // rows, size[1] // columns  # what is left over at the far edges is not looked at
        if min(grid) < 1:
            raise ValueError(
                f"{self.config.model_type} makes nothing of an image of {size}: take a larger one"
            )
        return grid

    def channels(self, level: int) -> int:
        """Channels of a level."""
        if not self._has_stages:
            return self.config.hidden_size
        sizes = self.config.hidden_sizes
        return [self.config.num_channels if self._starts_from_pixels else sizes[0], *sizes][level]

    def channels_after_last(self) -> int:
        """Channels of what `Family.last` makes of a level."""
        return self.config.output_channels if self.family.form == "rows" else self.channels(-1)

    def _stride(self, level: int) -> Pair:
        """Pixels a token; every stage but the first halves the map."""
        if self._starts_from_pixels:
            return _pair(4 * 2 ** (level - 1) if level > 0 else 1)
        rows, columns = _pair(self.config.patch_size)
        halved = 2 ** max(level - 1, 0) if self._has_stages else 1
        return rows * halved, columns * halved

    @property
    def _has_stages(self) -> bool:
        return self.family.form == "map"

    @property
    def _starts_from_pixels(self) -> bool:
        """Whether the first stage makes the patches, so that level 0 is the image itself."""
        return self.config.model_type == "dinov3_convnext"


def read_encoder(given: Mapping[str, Any]) -> Encoder:
    """The encoder of a configuration of transformers, or of the vision part of a dual model's.

    Raises:
        ValueError: transformers is missing, or the model is unknown to it or to pyvlm.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError(
            f'an encoder of transformers needs it: pip install "pyvlm[transformers]" ({error})'
        ) from None
    given = dict(given)
    model_type = given.pop("model_type", None)
    try:
        config = AutoConfig.for_model(model_type, **given)
    except Exception as error:  # its checks raise classes of their own
        raise ValueError(f"encoder of model_type {model_type!r}: {_reason(error)}; {_known()}") from error
    config = getattr(config, "vision_config", config)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"encoder of model_type {config.model_type!r} is unknown to pyvlm; {_known()}")
    for name, value in family.overrides.items():
        setattr(config, name, value)
    return Encoder(family, config)


def encoder_entry(encoder: Encoder) -> dict[str, Any]:
    """What `read_encoder` needs to make the same encoder: the configuration without its defaults."""
    kept = encoder.config.to_diff_dict()
    for name in ("transformers_version", "dtype", "architectures", "_name_or_path", "auto_map"):
        kept.pop(name, None)
    entry: dict[str, Any] = json.loads(json.dumps(kept | {"model_type": encoder.config.model_type}))
    return entry


def read_folder(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's configuration and, where there is one, the image processor's, of a folder of transformers.

    Raises:
        ValueError: there is no such folder, or a file in it cannot be read.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{folder}: no config.json there; give a local folder of a model that transformers saved"
        )
    preprocessor: dict[str, Any] = {}
    if (file := path / "processor_config.json").is_file():  # transformers 5 saves both processors in it
        preprocessor = _read_json(file).get("image_processor", {})
    if (file := path / "preprocessor_config.json").is_file():
        preprocessor = _read_json(file)
    return _read_json(path / "config.json"), preprocessor


def pixels_of_preprocessor(given: Mapping[str, Any]) -> dict[str, Any]:
    """image_size, mean and std of an image processor's configuration, as far as it names them."""
    size = given.get("size")
    if given.get("crop_size") and given.get("do_center_crop", True):
        size = given["crop_size"]
    if isinstance(size, Mapping):
        side = size.get("shortest_edge") or size.get("longest_edge")
        size = (size.get("height", side), size.get("width", side))
        size = None if None in size else size
    pixels = {"image_size": size, "mean": given.get("image_mean"), "std": given.get("image_std")}
    return {name: value for name, value in pixels.items() if value}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return content


def _reason(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200]


def _known() -> str:
    return (
        f"known are {', '.join(FAMILIES)}, alone or as the vision part of a dual model. A new one needs an "
        "entry in pyvlm.models.encoders.FAMILIES: the path of its list of layers, what their outputs look "
        "like, and what stands behind them"
    )


def _pair(size: Any) -> Pair:
    if isinstance(size, int):
        return size, size
    rows, columns = size
    return rows, columns

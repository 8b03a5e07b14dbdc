"""The configurations of vision towers, and of the pixels that they receive."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pyvlm.models.encoders import (
    Encoder,
    Pair,
    encoder_entry,
    pixels_of_preprocessor,
    read_encoder,
    read_folder,
)
from pyvlm.nn.fusion import Merge
from pyvlm.nn.projector import Projector

Size = Annotated[int, Field(gt=0)]
Levels = Annotated[list[int], Field(min_length=1)]


class Config(BaseModel):
    """Immutable; an unknown key is an error, so that a misspelt one is never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageConfig(Config):
    """The pixels that every tower receives: [N, channels, size, size], less `mean` and divided by `std`.

    Both are one number, or one a channel, of pixels in [0, 1]. `fit` says how an image becomes a square:
    it is stretched, or padded with `mean` first, or its middle is cut out. `resample` is how Pillow then
    resizes it, in 8 bits, as transformers' image processors do; None: bilinearly, in float32.
    """

    size: Size
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    fit: Literal["stretch", "pad", "crop"] = "stretch"
    resample: Literal["bicubic", "bilinear"] | None = None

    @model_validator(mode="after")
    def _one_a_channel(self) -> "ImageConfig":
        _check_pixels(self.mean, self.std, self.channels)
        return self


def _check_pixels(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(f"{name} {values}: give one number, or one for each of {channels} channels")
    if min(std) <= 0:
        raise ValueError(f"std {std} must be positive")


class TowerConfig(Config):
    """What every vision tower has.

    `levels` are the outputs to hand on, counted as in transformers' `hidden_states`: 0 is the embedding, i
    the output of block i, and negative numbers count from the end (−1 the last block, −2 LLaVA's choice).
    The rest, from `merge` on, is that of `pyvlm.nn.EncoderFeatures`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
    levels: Levels = [-1]
    merge: Merge = "layer_scale"
    downsample: Annotated[int, Field(ge=0)] = 0
    align_dim: Size | None = None
    align: Projector = "mlp2x_gelu"
    patches: Size = 1
    queries: Size = 32

    @property
    def num_levels(self) -> int:
        raise NotImplementedError

    def grid(self, image_size: int) -> Pair:
        """(rows, columns) of the map that this tower makes of a square image."""
        raise NotImplementedError

    @property
    def channels_out(self) -> int:
        raise NotImplementedError

    @property
    def level_indices(self) -> list[int]:
        """`levels` with the negative ones resolved."""
        return [level % self.num_levels for level in self.levels]

    @model_validator(mode="after")
    def _levels_exist(self) -> "TowerConfig":
        n = self.num_levels
        if bad := [level for level in self.levels if not -n <= level < n]:
            raise ValueError(f"tower {self.name!r}: levels {bad} do not exist; it has levels 0 to {n - 1}")
        if len(set(self.level_indices)) < len(self.levels):
            raise ValueError(f"tower {self.name!r}: levels {self.levels} name one level twice")
        return self


class ViTConfig(TowerConfig):
    """A plain pre-norm vision transformer with learned positions and no class token."""

    type: Literal["vit"] = "vit"
    patch_size: Size
    hidden_size: Size
    num_layers: Size
    num_heads: Size
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    # Spread of the position embeddings at the start. Measured on digits: 0.02 stalls, 0.5 trains.
    position_init_std: Annotated[float, Field(ge=0)] = 0.5

    @property
    def num_levels(self) -> int:
        return self.num_layers + 1

    def grid(self, image_size: int) -> Pair:
        if image_size % self.patch_size:
            raise ValueError(
                f"tower {self.name!r}: image size {image_size} is no multiple of patch_size {self.patch_size}"
            )
        return (image_size // self.patch_size,) * 2

    @property
    def channels_out(self) -> int:
        return self.hidden_size

    @model_validator(mode="after")
    def _heads_divide(self) -> "ViTConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"tower {self.name!r}: hidden_size {self.hidden_size} is no multiple of "
                f"num_heads {self.num_heads}"
            )
        return self


class ConvConfig(TowerConfig):
    """A small residual convolutional tower: a 3×3 stem, then `blocks[s]` blocks of `channels[s]` at stage s.

    Every stage after the first halves the map. The levels of a tower are merged, so all must be of one stage.
    """

    type: Literal["conv"] = "conv"
    channels: Annotated[list[Size], Field(min_length=1)]
    blocks: Annotated[list[Size], Field(min_length=1)]

    @property
    def num_levels(self) -> int:
        return sum(self.blocks) + 1

    def stage_of(self, level: int) -> int:
        """The stage whose shape a level has; level 0, the stem, is of stage 0."""
        return next(s for s in range(len(self.blocks)) if level <= sum(self.blocks[: s + 1]))

    @property
    def stage_out(self) -> int:
        return self.stage_of(self.level_indices[0])

    def grid(self, image_size: int) -> Pair:
        if image_size % 2**self.stage_out:
            raise ValueError(
                f"tower {self.name!r}: image size {image_size} cannot be halved {self.stage_out} times"
            )
        return (image_size // 2**self.stage_out,) * 2

    @property
    def channels_out(self) -> int:
        return self.channels[self.stage_out]

    @model_validator(mode="after")
    def _one_stage(self) -> "ConvConfig":
        if len(self.channels) != len(self.blocks):
            raise ValueError(
                f"tower {self.name!r}: {len(self.channels)} channels for {len(self.blocks)} stages; "
                "give channels and blocks one number a stage"
            )
        if len({self.stage_of(level) for level in self.level_indices}) > 1:
            raise ValueError(f"tower {self.name!r}: levels {self.levels} lie in stages of different shapes")
        return self


class TransformersConfig(TowerConfig):
    """A vision encoder of transformers; `pyvlm.models.encoders` says which.

    Attributes:
        encoder: its configuration, as its config.json has it: `model_type` and what differs from its
            defaults. Of a dual model such as CLIP, the vision part is taken.
        pretrained: a local folder that transformers saved (safetensors only). It fills in what is left out,
            and the tower starts from its weights; without one, from random ones.
        image_size: (rows, columns), or the side of a square, that the tower resizes the images to; as the
            folder's preprocessor or else the encoder has it.
        mean, std: the normalisation that the encoder was trained with, one number a channel of pixels in
            [0, 1]; as the folder's preprocessor or else the family has it.
        last_norm: every level also passes what stands behind the encoder's last layer, a norm (of SAM, its
            neck). `hidden_states` do not; the `last_hidden_state` of most encoders does.
    """

    type: Literal["transformers"] = "transformers"
    encoder: dict[str, Any]
    pretrained: str | None = None
    image_size: tuple[Size, Size]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    last_norm: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given  # the checks that follow say what is wrong
        given = dict(given)
        if given.get("encoder") is None:
            if given.get("pretrained") is None:
                raise ValueError(
                    'a tower of type "transformers" needs a folder `pretrained` or a configuration `encoder`'
                )
            given["encoder"], preprocessor = read_folder(given["pretrained"])
            given = pixels_of_preprocessor(preprocessor) | given
        encoder = read_encoder(given["encoder"])
        mean, std = encoder.family.pixels
        given = {"image_size": encoder.own_size, "mean": mean, "std": std} | given
        if isinstance(given["image_size"], int):
            given["image_size"] = (given["image_size"],) * 2
        return given | {"encoder": encoder_entry(encoder)}

    @cached_property
    def source(self) -> Encoder:
        """The encoder itself."""
        return read_encoder(self.encoder)

    @property
    def num_levels(self) -> int:
        return self.source.num_levels

    def grid(self, image_size: int) -> Pair:
        return self.source.grid(self.image_size, self.level_indices[0])

    @property
    def channels_out(self) -> int:
        return (
            self.source.channels_after_last()
            if self.last_norm
            else self.source.channels(self.level_indices[0])
        )

    @model_validator(mode="after")
    def _levels_agree(self) -> "TransformersConfig":
        source, name = self.source, self.name
        shapes = {(source.grid(self.image_size, i), source.channels(i)) for i in self.level_indices}
        if len(shapes) > 1:
            raise ValueError(f"tower {name!r}: levels {self.levels} lie in stages of different shapes")
        if self.last_norm and source.family.last is None:
            raise ValueError(f"tower {name!r}: {source.config.model_type} has no norm behind its last layer")
        if self.last_norm and source.channels(self.level_indices[0]) != source.channels(-1):
            raise ValueError(f"tower {name!r}: last_norm fits the last stage only, not levels {self.levels}")
        _check_pixels(self.mean, self.std, source.config.num_channels)
        return self

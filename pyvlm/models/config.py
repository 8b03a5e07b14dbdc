"""The configuration of a VLM: everything that `config.json` holds, checked before anything is built."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pyvlm.layout import RULES
from pyvlm.nn.moe_options import (
    AuxLossForm,
    Drop,
    ImageRouter,
    Noise,
    Normalize,
    RouterOptions,
    TextRouter,
)
from pyvlm.ops.moe_experts import Activation

Size = Annotated[int, Field(gt=0)]
Levels = Annotated[list[int], Field(min_length=1)]


class Config(BaseModel):
    """Immutable; an unknown key is an error, so that a misspelt one is never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageConfig(Config):
    """The pixels that every tower receives: [N, channels, size, size]."""

    size: Size
    channels: Literal[1, 3] = 3


class TowerConfig(Config):
    """What every vision tower has.

    `levels` are the outputs to hand on, counted as in transformers' `hidden_states`: 0 is the embedding, i
    the output of block i, and negative numbers count from the end (−1 the last block, −2 LLaVA's choice).
    `merge`, `align_dim` and `patches` are those of `pyvlm.nn.EncoderFeatures`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
    levels: Levels = [-1]
    merge: Literal["layer_scale", "concat"] = "layer_scale"
    align_dim: Size | None = None
    patches: Size = 1

    @property
    def num_levels(self) -> int:
        raise NotImplementedError

    def grid(self, image_size: int) -> int:
        """Side of the square map that this tower makes of an image."""
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

    def grid(self, image_size: int) -> int:
        if image_size % self.patch_size:
            raise ValueError(
                f"tower {self.name!r}: image size {image_size} is no multiple of patch_size {self.patch_size}"
            )
        return image_size // self.patch_size

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

    def grid(self, image_size: int) -> int:
        if image_size % 2**self.stage_out:
            raise ValueError(
                f"tower {self.name!r}: image size {image_size} cannot be halved {self.stage_out} times"
            )
        return image_size // 2**self.stage_out

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


VisionTowerConfig = Annotated[ViTConfig | ConvConfig, Field(discriminator="type")]


class FusionConfig(Config):
    """How the levels of all towers become one sequence of tokens an image: see `pyvlm.nn.FeatureFusion`."""

    method: Literal["channel_concat", "sequence"] = "channel_concat"
    hidden_size: Size
    grid: Size | None = None  # side of the common grid of "channel_concat"; None: the first tower's
    merge_weights: Literal["softmax", "free", "fixed"] = "softmax"
    shared_projection: bool = True

    @model_validator(mode="after")
    def _grid_is_used(self) -> "FusionConfig":
        if self.method == "sequence" and self.grid is not None:
            raise ValueError(
                'fusion.grid belongs to method "channel_concat"; "sequence" keeps the towers\' grids'
            )
        return self


class MoEConfig(Config):
    """Experts in place of the MLP in the layers `layers`; the rest is as in `pyvlm.nn.MoE`.

    The options of the routers are those of `pyvlm.nn.RouterOptions`, which checks them.
    """

    layers: Annotated[list[int], Field(min_length=1)]
    num_experts: Size
    intermediate_size: Size
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    top_k: int = RouterOptions.top_k
    image_router: ImageRouter = RouterOptions.image_router
    text_router: TextRouter = RouterOptions.text_router
    image_experts: int | None = RouterOptions.image_experts
    capacity_factor: float = RouterOptions.capacity_factor
    token_capacity_factor: float | None = RouterOptions.token_capacity_factor
    eval_token_capacity_factor: float | None = RouterOptions.eval_token_capacity_factor
    drop: Drop = RouterOptions.drop
    normalize: Normalize = RouterOptions.normalize
    noise: Noise | None = RouterOptions.noise
    noise_std: float = RouterOptions.noise_std
    threshold_momentum: float = RouterOptions.threshold_momentum
    bias_rate: float = RouterOptions.bias_rate
    aux_loss_coef: float = RouterOptions.aux_loss_coef
    aux_loss_form: AuxLossForm = RouterOptions.aux_loss_form
    z_loss_coef: float = RouterOptions.z_loss_coef
    importance_loss_coef: float = RouterOptions.importance_loss_coef
    load_loss_coef: float = RouterOptions.load_loss_coef

    @model_validator(mode="after")
    def _routers_are_possible(self) -> "MoEConfig":
        of_experts = {"layers", "intermediate_size", "activation", "gated", "bias"}
        RouterOptions(**self.model_dump(exclude=of_experts))
        return self


class LanguageConfig(Config):
    """A pre-norm decoder: RMSNorm, rotary positions, grouped-query span attention, SwiGLU or experts."""

    vocab_size: Size
    hidden_size: Size
    num_layers: Size
    num_heads: Size
    num_kv_heads: Size | None = None
    head_dim: Size | None = None
    intermediate_size: Size
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    attention_rule: str = "mmca"
    window: Size | None = None
    window_layers: list[int] | None = None  # the layers that keep to the window; None: all of them
    attention_softcap: Annotated[float, Field(gt=0)] | None = None
    logit_softcap: Annotated[float, Field(gt=0)] | None = None
    tie_embeddings: bool = True
    moe: MoEConfig | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    def window_of(self, layer: int) -> int | None:
        """The attention window of a layer, or None where it sees everything that the rule lets it see."""
        return self.window if self.window_layers is None or layer in self.window_layers else None

    @model_validator(mode="after")
    def _consistent(self) -> "LanguageConfig":
        causal_rules = [rule for rule in RULES if rule != "bidirectional"]
        if self.attention_rule not in causal_rules:
            raise ValueError(
                f"attention_rule {self.attention_rule!r} does not suit a next-token model; expected one of "
                + ", ".join(causal_rules)
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}; give head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_size}")
        if self.window_layers is not None and self.window is None:
            raise ValueError("window_layers without a window")
        for what, layers in (
            ("window_layers", self.window_layers),
            ("moe.layers", self.moe and self.moe.layers),
        ):
            if bad := [i for i in layers or [] if not 0 <= i < self.num_layers]:
                raise ValueError(f"{what} {bad} do not exist; the layers are 0 to {self.num_layers - 1}")
        return self


class VLMConfig(Config):
    """Vision towers → fusion → connector → language model."""

    image: ImageConfig
    vision_towers: Annotated[list[VisionTowerConfig], Field(min_length=1)]
    fusion: FusionConfig
    connector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    language: LanguageConfig
    image_token_id: Annotated[int, Field(ge=0)]
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    backend: Literal["auto", "reference", "native", "triton"] = "auto"

    @property
    def tokens_per_image(self) -> int:
        """Placeholders that each image takes in `input_ids`."""
        grids = [tower.grid(self.image.size) for tower in self.vision_towers]
        if self.fusion.method == "sequence":
            return sum(g**2 // tower.patches for g, tower in zip(grids, self.vision_towers, strict=True))
        return (self.fusion.grid or grids[0]) ** 2

    @model_validator(mode="after")
    def _consistent(self) -> "VLMConfig":
        names = [tower.name for tower in self.vision_towers]
        if len(set(names)) < len(names):
            raise ValueError(f"vision towers need names of their own, got {names}")
        for tower in self.vision_towers:
            tokens = tower.grid(self.image.size) ** 2
            if tokens % tower.patches:
                raise ValueError(f"tower {tower.name!r}: {tokens} patches do not group by {tower.patches}")
        if self.image_token_id >= self.language.vocab_size:
            raise ValueError(
                f"image_token_id {self.image_token_id} lies outside the vocabulary of "
                f"{self.language.vocab_size}"
            )
        return self

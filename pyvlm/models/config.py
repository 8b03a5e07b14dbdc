"""The configuration of a VLM: everything that `config.json` holds, checked before anything is built."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pyvlm.layout import RULES
from pyvlm.models.connector_config import Connector, QFormerConfig, ResamplerConfig, SVAConfig
from pyvlm.models.encoders import Pair
from pyvlm.models.language_families import read_language
from pyvlm.models.positions import PositionScheme
from pyvlm.models.rope import LocalRope, RopeScaling
from pyvlm.models.tiling import TilingConfig
from pyvlm.models.tower_config import Config, ConvConfig, ImageConfig, Size, TransformersConfig, ViTConfig
from pyvlm.nn.fusion import Method
from pyvlm.nn.moe_options import (
    AuxLossForm,
    Drop,
    ImageRouter,
    Noise,
    Normalize,
    RouterOptions,
    TextRouter,
)
from pyvlm.nn.projector import Projector
from pyvlm.ops.moe_experts import Activation

Dropout = Annotated[float, Field(ge=0, lt=1)]
VisionTowerConfig = Annotated[ViTConfig | ConvConfig | TransformersConfig, Field(discriminator="type")]


class FusionConfig(Config):
    """How the levels of all towers become one sequence of tokens an image: see `pyvlm.nn.FeatureFusion`."""

    method: Method = "channel_concat"
    hidden_size: Size | None = None  # None: no projector, for "channel_concat" only
    grid: Size | None = None  # side of the common grid of "channel_concat"; None: the first tower's
    mode: Literal["bilinear", "nearest", "area"] = "bilinear"
    align_corners: bool = False
    norm: Literal["none", "layernorm"] = "none"
    projector: Projector = "linear"
    qformer: QFormerConfig | None = None
    merge_weights: Literal["softmax", "free", "fixed"] = "softmax"
    shared_projection: bool = True

    @model_validator(mode="after")
    def _fits_the_method(self) -> "FusionConfig":
        if self.qformer is not None and self.method != "qformer":
            raise ValueError(f'fusion.qformer belongs to method "qformer", not {self.method!r}')
        if self.method == "channel_concat":
            if self.align_corners and self.mode != "bilinear":
                raise ValueError(f'fusion.align_corners needs mode "bilinear", not {self.mode!r}')
            return self
        if self.hidden_size is None:
            raise ValueError(
                f"fusion.hidden_size is missing; method {self.method!r} needs the width of a token"
            )
        default = {name: field.default for name, field in type(self).model_fields.items()}
        of_concat = ("grid", "mode", "align_corners", "norm", "projector")
        if given := [name for name in of_concat if getattr(self, name) != default[name]]:
            raise ValueError(f'fusion.{given[0]} belongs to method "channel_concat", not {self.method!r}')
        return self


class MoEConfig(Config):
    """Experts in place of the MLP in the layers `layers`; the rest is as in `pyvlm.nn.MoE`.

    "every_second" is layers 0, 2, 4, …, as MoE-LLaVA has them (arXiv 2401.15947); a `LanguageConfig` holds
    their numbers. The options of the routers are those of `pyvlm.nn.RouterOptions`, which checks them.
    """

    layers: Annotated[list[int], Field(min_length=1)] | Literal["every_second"]
    num_experts: Size
    intermediate_size: Size | None = None  # None: that of the MLPs
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


class PartialLoRAConfig(Config):
    """A low-rank update of the decoder's linears for image tokens only: see `pyvlm.nn.PartialLoRALinear`.

    The numbers are those of InternLM-XComposer2 (arXiv 2401.16420). Fused projections (queries, keys and
    values; gate and up) have one update. Experts have none.
    """

    rank: Size = 256
    alpha: Annotated[float, Field(gt=0)] = 256.0
    dropout: Dropout = 0.05
    modules: list[Literal["attention", "mlp"]] = Field(default=["attention", "mlp"], min_length=1)


class LoRAConfig(Config):
    """A low-rank update of the decoder's linears (arXiv 2106.09685), by peft. Experts have none.

    The numbers are those of LLaVA 1.5's fine-tuning.
    """

    rank: Size = 128
    alpha: Annotated[float, Field(gt=0)] = 256.0
    dropout: Dropout = 0.05
    target_modules: list[str] = Field(
        default=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], min_length=1
    )


class LanguageConfig(Config):
    """A decoder: RMSNorm, rotary positions, grouped-query span attention, SwiGLU or experts.

    Attributes:
        pretrained: a local folder of a language model that transformers saved (safetensors only), alone or as
            the language part of another model: see `pyvlm.models.language_families`. Its architecture takes
            the place of what is given, but for `vocab_size`, which may be larger, and the windows; the model
            starts from its weights, in their dtype. Layers with experts take no MLP from it.
        window_layers: the layers that keep to the window; None: all of them.
        attention_scale: multiplies the scores; None: head_dim ** -0.5.
        local_rope: layers with a base of their own.
        qk_norm: of queries and keys, see `pyvlm.nn.SpanAttention`.
        norm_placement: of the norms of attention and MLP: before them, behind them (before the sum), or both.
        norm_unit_offset: norms store their weight less 1: see `pyvlm.nn.norm`.
        activation: of the MLPs' gates; experts have their own.
        embedding_scale: multiplies the embeddings of tokens.
    """

    pretrained: str | None = None
    vocab_size: Size
    hidden_size: Size
    num_layers: Size
    num_heads: Size
    num_kv_heads: Size | None = None
    head_dim: Size | None = None
    intermediate_size: Size
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope: LocalRope | None = None
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    norm_placement: Literal["pre", "post", "both"] = "pre"
    norm_unit_offset: bool = False
    activation: Activation = "silu"
    embedding_scale: Annotated[float, Field(gt=0)] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    attention_rule: str = "mmca"
    window: Size | None = None
    window_layers: list[int] | None = None
    attention_scale: Annotated[float, Field(gt=0)] | None = None
    attention_softcap: Annotated[float, Field(gt=0)] | None = None
    logit_softcap: Annotated[float, Field(gt=0)] | None = None
    tie_embeddings: bool = True
    max_length: Size | None = None  # tokens of the longest sequence it was trained on; beyond it, chat warns
    moe: MoEConfig | None = None
    partial_lora: PartialLoRAConfig | None = None
    lora: LoRAConfig | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def moe_layers(self) -> list[int]:
        """The layers that have experts, in their order."""
        if self.moe is None:
            return []
        assert not isinstance(self.moe.layers, str), "_fill_in has named them"
        return sorted(set(self.moe.layers))

    def window_of(self, layer: int) -> int | None:
        """The attention window of a layer, or None where it sees everything that the rule lets it see."""
        return self.window if self.window_layers is None or layer in self.window_layers else None

    def rope_of(self, layer: int) -> Literal["global", "local"]:
        """Whose rotary positions a layer has: of `rope_theta` and `rope_scaling`, or of `local_rope`."""
        return "local" if self.local_rope is not None and layer in self.local_rope.layers else "global"

    @model_validator(mode="before")
    @classmethod
    def _read_folder(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("pretrained") is None:
            return given  # the checks that follow say what is wrong
        folder = read_language(given["pretrained"])
        entries, vocab_size = folder.entries, given.get("vocab_size")
        if isinstance(vocab_size, int) and vocab_size < folder.vocab_size:
            raise ValueError(
                f"vocab_size {vocab_size} is smaller than the {folder.vocab_size} tokens of "
                f"{given['pretrained']}: leave it out, or give a larger one to add tokens"
            )
        if given.get("window") is None and given.get("window_layers") is None:
            entries = entries | folder.windows
        return dict(given) | {"vocab_size": vocab_size or folder.vocab_size} | entries

    @field_validator("moe")
    @classmethod
    def _fill_in(cls, moe: MoEConfig | None, info: ValidationInfo) -> MoEConfig | None:
        """Which layers and which width are meant, where the experts' configuration leaves it to the model."""
        if moe is None or not {"num_layers", "intermediate_size"} <= info.data.keys():
            return moe
        changes: dict[str, Any] = {}
        if moe.layers == "every_second":
            changes["layers"] = list(range(0, info.data["num_layers"], 2))
        if moe.intermediate_size is None:
            changes["intermediate_size"] = info.data["intermediate_size"]
        return moe.model_copy(update=changes)

    @model_validator(mode="after")
    def _consistent(self) -> "LanguageConfig":
        if self.lora is not None and self.partial_lora is not None:
            raise ValueError("lora and partial_lora are both given: a model has one kind of update or none")
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
            ("local_rope.layers", self.local_rope and self.local_rope.layers),
            ("moe.layers", self.moe_layers),
        ):
            if bad := [i for i in layers or [] if not 0 <= i < self.num_layers]:
                raise ValueError(f"{what} {bad} do not exist; the layers are 0 to {self.num_layers - 1}")
        return self


class VLMConfig(Config):
    """Vision towers → fusion → connector → language model.

    Attributes:
        pretrained: a local folder of a LLaVA that transformers saved, whose connector the model starts from:
            see `pyvlm.models.pretrained_vlm`. `vision_towers` and `language` name it for their own weights.
    """

    pretrained: str | None = None
    image: ImageConfig
    tiling: TilingConfig | None = None  # None: every image is one square of image.size
    vision_towers: Annotated[list[VisionTowerConfig], Field(min_length=1)]
    fusion: FusionConfig
    connector: Connector = "mlp2x_gelu"  # a projector of each token, or what reads them into others
    position_scheme: PositionScheme = "all"  # of images: see `pyvlm.models.positions`
    language: LanguageConfig
    image_token_id: Annotated[int, Field(ge=0)]
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    backend: Literal["auto", "reference", "native", "triton"] = "auto"

    @property
    def tokens_per_image(self) -> int:
        """Placeholders that each image takes in `input_ids`; with `tiling`, the tokens of a tile."""
        return sum(math.prod(grid) for grid in self.token_grids)

    @property
    def token_grids(self) -> tuple[Pair, ...]:
        """The grids, (rows, columns) each, whose tokens follow one another in an image."""
        if not isinstance(self.connector, str):
            return (self.connector.grid,)
        grids = [tower.grid(self.image.size) for tower in self.vision_towers]
        if self.fusion.method == "channel_concat":
            return (grids[0] if self.fusion.grid is None else (self.fusion.grid,) * 2,)
        if self.fusion.method == "qformer":
            return tuple((1, tower.queries) for tower in self.vision_towers)
        return tuple(
            (rows, columns // tower.patches)
            if columns % tower.patches == 0
            else (rows * columns // tower.patches, 1)
            for (rows, columns), tower in zip(grids, self.vision_towers, strict=True)
        )

    @model_validator(mode="after")
    def _consistent(self) -> "VLMConfig":
        names = [tower.name for tower in self.vision_towers]
        if len(set(names)) < len(names):
            raise ValueError(f"vision towers need names of their own, got {names}")
        for tower in self.vision_towers:
            rows, columns = tower.grid(self.image.size)
            if rows * columns % tower.patches:
                raise ValueError(
                    f"tower {tower.name!r}: {rows * columns} patches do not group by {tower.patches}"
                )
            crosses_rows = columns % tower.patches and tower.patches % columns
            if self.position_scheme.startswith("share-by-row") and crosses_rows:
                raise ValueError(
                    f"tower {tower.name!r}: position_scheme {self.position_scheme!r} needs rows of whole "
                    f"tokens, and {tower.patches} patches a token do not fit rows of {columns}"
                )
            if isinstance(tower, TransformersConfig) and self.image.channels not in (
                1,
                channels := tower.source.config.num_channels,
            ):
                raise ValueError(
                    f"tower {tower.name!r} takes images of {channels} channels, and image.channels is "
                    f"{self.image.channels}"
                )
        queries_without_rows = not isinstance(self.connector, str) and self.connector.type == "qformer"
        if isinstance(self.connector, str):
            queries_without_rows = self.fusion.method == "qformer"
        if queries_without_rows and self.position_scheme.startswith("share-by-row"):
            raise ValueError(
                f"position_scheme {self.position_scheme!r} needs rows, and queries of a Q-Former have none"
            )
        if self.connector == "none" and self.fusion.hidden_size != self.language.hidden_size:
            raise ValueError(
                f'connector "none" needs fusion.hidden_size {self.fusion.hidden_size} to be that of the '
                f"language model, {self.language.hidden_size}"
            )
        self._check_connector()
        if self.tiling is not None:
            self._check_tiling(self.tiling)
        if self.image_token_id >= self.language.vocab_size:
            raise ValueError(
                f"image_token_id {self.image_token_id} lies outside the vocabulary of "
                f"{self.language.vocab_size}"
            )
        return self

    def _check_connector(self) -> None:
        connector, fusion = self.connector, self.fusion
        if isinstance(connector, ResamplerConfig):
            if fusion.method != "channel_concat":
                raise ValueError(
                    f'connector "resampler" reads one map: expected fusion.method "channel_concat", got '
                    f"{fusion.method!r}"
                )
            connector.heads(self.language.hidden_size)
        if isinstance(connector, SVAConfig):
            of_merging = {"merge_weights", "shared_projection"}
            given = fusion.model_dump(exclude_defaults=True).keys() - of_merging
            if given:
                raise ValueError(
                    'connector "sva" reads the towers\' maps in place of a fusion: leave out '
                    f"fusion.{min(given)}"
                )
            if deep := [tower.name for tower in self.vision_towers if tower.downsample]:
                raise ValueError(f'connector "sva" resizes maps itself: leave out downsample of {deep}')
            connector.windows_of([tower.grid(self.image.size) for tower in self.vision_towers])

    def _check_tiling(self, tiling: TilingConfig) -> None:
        if len(self.token_grids) > 1 or self.token_grids[0][0] != self.token_grids[0][1]:
            raise ValueError(
                "tiling needs one square map of tokens a tile, and an image has the maps "
                f"{list(self.token_grids)}"
            )
        tiling.check(self.image.size, self.tokens_per_image)
        if self.position_scheme.startswith("share-by-row"):
            raise ValueError(
                f"position_scheme {self.position_scheme!r} does not go with tiling, whose images differ in "
                'their rows: take "all" or "share-all"'
            )

    def without_sources(self) -> "VLMConfig":
        """The same without the folders that it starts from: what to keep once their weights are there."""
        towers = [
            tower.model_copy(update={"pretrained": None}) if isinstance(tower, TransformersConfig) else tower
            for tower in self.vision_towers
        ]
        language = self.language.model_copy(update={"pretrained": None})
        return self.model_copy(update={"pretrained": None, "vision_towers": towers, "language": language})

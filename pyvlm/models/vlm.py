"""The vision-language model: vision towers → fusion → connector → decoder, from one configuration.

Shapes: B samples, L new tokens, K all tokens so far, N images in reading order, T tokens an image, V words.
With tiling (`VLMConfig.tiling`), M base views and tiles stand in for the N images at the vision towers.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pyvlm.layout import TokenLayout
from pyvlm.models import checkpoint, generation
from pyvlm.models.adapters import inject_adapters
from pyvlm.models.config import VLMConfig
from pyvlm.models.connector import build_connector, build_fusion
from pyvlm.models.inputs import check_inputs, default_layout, next_labels
from pyvlm.models.parts import split_parts
from pyvlm.models.positions import grid_cells, position_ids
from pyvlm.models.pretrained_language import build_language, load_language
from pyvlm.models.pretrained_vision import TransformersTower
from pyvlm.models.pretrained_vlm import load_connector
from pyvlm.models.processor import IGNORED, Processor
from pyvlm.models.tiling import build_packer, host_sizes
from pyvlm.models.vision import ViTTower, build_tower
from pyvlm.nn.attention import KeyValueCache
from pyvlm.nn.moe import MoE, MoEStats
from pyvlm.ops.loss import linear_cross_entropy
from pyvlm.ops.placement import place_image_tokens


@dataclass(frozen=True)
class VLMOutput:
    """What a forward pass gives.

    Attributes:
        loss: scalar, cross_entropy + aux_loss; None without labels.
        cross_entropy: scalar, the mean over the labelled tokens, with label smoothing and z-loss where
            these are asked for; None without labels.
        aux_loss: scalar, the sum of the routers' losses, already weighted; 0 without experts or with a cache.
        logits: [B, L, V]; None with labels, since the loss never makes them.
        moe_stats: one a MoE layer; with a cache none.
    """

    loss: Tensor | None
    cross_entropy: Tensor | None
    aux_loss: Tensor
    logits: Tensor | None
    moe_stats: list[MoEStats]


class VLM(nn.Module):
    """A vision-language model.

    Args:
        config: its architecture.
        backend: overrides `config.backend`, for every op.
    """

    def __init__(self, config: VLMConfig, backend: str | None = None) -> None:
        super().__init__()
        if backend is not None:
            config = VLMConfig.model_validate(config.model_dump() | {"backend": backend})
        self.config = config.without_sources()
        self.vision_towers = nn.ModuleDict(
            {tower.name: build_tower(tower, config.image, config.backend) for tower in config.vision_towers}
        )
        self.fusion = build_fusion(config)
        self.connector = build_connector(config, self.fusion.out_dim)
        self.image_packer = build_packer(config)
        self.language = build_language(config.language, config.backend)
        self.column_embedding = None
        if config.position_scheme == "share-by-row-and-column":
            columns = max(columns for _, columns in config.token_grids)
            self.column_embedding = nn.Embedding(columns, config.language.hidden_size)
        self._initialize()
        if config.pretrained is not None:
            load_connector(self, config.pretrained)
        if config.language.pretrained is not None:
            load_language(self.language, config.language.pretrained)
        inject_adapters(self.language, config.backend)  # last: they start in their own way

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        layout: TokenLayout | None = None,
        cache: list[KeyValueCache] | None = None,
        image_sizes: Tensor | None = None,
        documents: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> VLMOutput:
        """The loss of a batch, or its logits where no labels are given.

        Args:
            input_ids: int64 [B, L], `config.tokens_per_image` placeholders an image; with tiling, as many as
                an image of its size takes.
            images: floating [N, C, H, W], those of all samples in reading order; None where there are none.
                With tiling [M, C, H, W], image by image the base view and the tiles.
            attention_mask: [B, L], 1 for a token and 0 for padding on either side; without a `layout` only.
            labels: int64 [B, L], aligned with input_ids (the shift is made here), −100: nothing to learn.
            layout: what each of the K tokens is; None: `default_layout` of the rest.
            cache: of `new_cache`; `layout` then covers the tokens in it and the new ones. Not with labels.
            image_sizes: integer [N, 2], with tiling only: (height, width) of each image before it was cut.
                Best left on the CPU, where they are read.
            documents: int32 [B, L], the number of each token's document in a packed row, whose documents do
                not see each other, and −1 for padding; without a `layout` only.
            label_smoothing, z_loss: of the loss, as in `pyvlm.ops.linear_cross_entropy`.

        Raises:
            TypeError, ValueError: a wrong type, shape or value, or images that do not match the placeholders;
                on the CPU before anything is computed.
        """
        image_sizes = None if image_sizes is None else image_sizes.cpu()
        check_inputs(self.config, input_ids, images, labels, attention_mask, image_sizes)
        cached = 0 if cache is None else cache[0].length
        if layout is None and cached == 0:
            layout = default_layout(self.config, input_ids, attention_mask, labels, image_sizes, documents)
        elif layout is None or attention_mask is not None or documents is not None:
            raise ValueError(
                "with tokens in the cache a layout is needed, and with a layout neither attention_mask nor "
                "documents"
            )
        if layout.kind.shape != (len(input_ids), cached + input_ids.shape[1]):
            raise ValueError(
                f"the layout is of {list(layout.kind.shape)} tokens, and must be of the {cached} cached ones "
                f"a row and input_ids {list(input_ids.shape)}"
            )
        if labels is not None and cache is not None:
            raise ValueError("labels need a full pass: leave out the cache")

        hidden_BLC, moe_stats = self.hidden_states(input_ids, images, layout, cache, image_sizes)
        aux_loss = sum((stats.aux_loss for stats in moe_stats), start=hidden_BLC.new_zeros(()))
        if labels is None:
            return VLMOutput(None, None, aux_loss, self.language.logits(hidden_BLC), moe_stats)
        cross_entropy = linear_cross_entropy(
            hidden_BLC.flatten(0, 1),
            self.language.head_weight,
            next_labels(labels, layout).flatten(),
            ignore_index=IGNORED,
            softcap=self.config.language.logit_softcap,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            backend=self.config.backend,
        )
        return VLMOutput(cross_entropy + aux_loss, cross_entropy, aux_loss, None, moe_stats)

    def hidden_states(
        self,
        input_ids: Tensor,
        images: Tensor | None,
        layout: TokenLayout,
        cache: list[KeyValueCache] | None = None,
        image_sizes: Tensor | None = None,
    ) -> tuple[Tensor, list[MoEStats]]:
        """The last hidden states [B, L, hidden] before the head; arguments as in `forward`, unchecked."""
        embeds_BLC = self.language.embed_tokens(input_ids)
        num_image_tokens = 0
        if images is not None and len(images):
            features_NTC = self.image_features(images).to(embeds_BLC.dtype)
            is_image_BL = input_ids == self.config.image_token_id
            if self.image_packer is None:
                features_RC = features_NTC.flatten(0, 1)
                num_image_tokens = len(features_RC)
                embeds_BLC = place_image_tokens(
                    embeds_BLC, features_RC, is_image_BL, backend=self.config.backend
                )
            else:
                sizes = host_sizes(image_sizes)
                num_image_tokens = sum(self.image_packer.num_tokens(size) for size in sizes)
                embeds_BLC = self.image_packer.place(embeds_BLC, features_NTC, is_image_BL, sizes)
        positions_BK = position_ids(layout, self.config.position_scheme, [self.config.token_grids])
        return self.language(embeds_BLC, layout, cache, positions_BK, num_image_tokens)

    def image_features(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] as tokens of the language model, [N, T, hidden]; with tiling, maps [M, ..]."""
        images = images.to(next(self.vision_towers.parameters(), self.language.embed_tokens.weight).dtype)
        levels = {name: tower(images) for name, tower in self.vision_towers.items()}
        tokens_NTC = self.connector(self.fusion(levels))
        if self.column_embedding is None:
            return tokens_NTC
        _, columns_T, _ = grid_cells((self.config.token_grids,), images.device)
        return tokens_NTC + self.column_embedding(columns_T)

    def new_cache(self, max_length: int) -> list[KeyValueCache]:
        """Empty caches, one a layer, for up to `max_length` tokens a row."""
        return [KeyValueCache(max_length) for _ in self.language.layers]

    generate = generation.generate

    def update_router(self, *moe_stats: list[MoEStats]) -> None:
        """Hands the statistics of a training step to its MoE layers: see `pyvlm.nn.MoE.update_router`.

        Args:
            moe_stats: `VLMOutput.moe_stats`, one a batch that gradients were summed over.
        """
        for layer, *stats in zip(self._moe_layers(), *moe_stats, strict=True):
            layer.update_router(*stats)

    def parts(self, finer: Sequence[str] = ()) -> dict[str, list[nn.Parameter]]:
        """The parameters of each part, to freeze it or set its learning rate; each is in one part.

        "vision", "fusion", "connector" (with the embedding of columns and the newline row), "language", "moe"
        (experts and their routers) and, where the model has them, "partial_lora" and "lora".

        Args:
            finer: pieces to take out of these as parts of their own: "vision.NAME", a tower, and
                "language.embeddings", those of the tokens and the head.

        Raises:
            ValueError: there is no such piece.
        """
        return split_parts(self, finer)

    def save_pretrained(self, folder: str | os.PathLike[str], processor: Processor | None = None) -> None:
        """Writes config.json, model.safetensors and the processor's files, all of them or nothing.

        Without a processor, the files of one that `folder` already holds stay.

        Raises:
            ValueError: `folder` holds other things, which would be lost.
        """
        folder = Path(folder)
        checkpoint.check_replaceable(folder)
        with checkpoint.replace_folder(folder) as aside:
            checkpoint.write_model(self, self.config, aside)
            if processor is not None:
                processor.save_pretrained(aside)
            else:
                checkpoint.copy_processor(folder, aside)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], backend: str | None = None) -> "VLM":
        """Reads what `save_pretrained` wrote: the same tensors bit for bit, on the CPU, in evaluation mode.

        Raises:
            ValueError: a missing, damaged or unfitting file; the message names it and what is wrong in it.
        """
        folder = checkpoint.find_folder(folder)
        model = cls(checkpoint.read_config(folder / checkpoint.CONFIG, VLMConfig), backend)
        checkpoint.load_weights(model, folder / checkpoint.WEIGHTS)
        return model.eval()

    def _moe_layers(self) -> list[MoE]:
        return [module for module in self.language.modules() if isinstance(module, MoE)]

    def _initialize(self) -> None:
        """Normal weights, zero biases; norms, experts and convolutions (scaled by fan-in) keep their own, and
        so do encoders of transformers."""
        encoders = [tower for tower in self.vision_towers.values() if isinstance(tower, TransformersTower)]
        in_encoders = {id(module) for tower in encoders for module in tower.modules()}
        for module in self.modules():
            if id(module) in in_encoders:
                continue
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, ViTTower):
                nn.init.normal_(module.position, std=module.position_init_std)

"""The language model: a decoder whose attention mask is a rule and whose MLPs may be experts.

Shapes: B batch, L new tokens, K all tokens so far, C channels, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyvlm.layout import IMAGE, AttentionSpans, TokenLayout
from pyvlm.models.config import LanguageConfig
from pyvlm.models.positions import position_ids
from pyvlm.nn.attention import KeyValueCache, Rotary, SpanAttention, rotary_tables
from pyvlm.nn.moe import MoE, MoEStats
from pyvlm.nn.moe_routing import TokenGroups
from pyvlm.nn.norm import RMSNorm, UnitOffsetRMSNorm
from pyvlm.nn.partial_lora import ImageTokens, project
from pyvlm.ops import gated_activation
from pyvlm.ops.moe_experts import Activation
from pyvlm.reference.gating import ACTIVATIONS


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202); gate and up are one projection, gate rows first.

    With activation "gelu" or "gelu_tanh" it is GEGLU.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Activation = "silu",
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = activation
        self.backend = backend

    @property
    def act_fn(self) -> Callable[[Tensor], Tensor]:
        """The activation, where `pyvlm.nn.Experts.from_dense` looks for it."""
        return ACTIVATIONS[self.activation]

    def forward(self, x_BLC: Tensor, image_tokens: ImageTokens | None = None) -> Tensor:
        gate, up = project(self.gate_up_proj, x_BLC, image_tokens).chunk(2, dim=-1)
        y = gated_activation(gate, up, self.activation, backend=self.backend)
        return project(self.down_proj, y, image_tokens)


class ScaledEmbedding(nn.Embedding):
    """Embeddings times a number, which is rounded to their dtype as Gemma rounds it."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        return super().forward(input) * torch.full((), self.scale, dtype=weight.dtype, device=weight.device)


def build_norm(config: LanguageConfig, backend: str, channels: int) -> nn.Module:
    """The norm that a language model uses everywhere."""
    kind = UnitOffsetRMSNorm if config.norm_unit_offset else RMSNorm
    return kind(channels, config.rms_norm_eps, _without_triton(backend))


def _without_triton(backend: str) -> str:
    """The backend of the ops that no Triton kernel exists for, in a model that is told to use those."""
    return "auto" if backend == "triton" else backend


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig, index: int, backend: str) -> None:
        super().__init__()
        hidden, norm = config.hidden_size, partial(build_norm, config, backend)
        before = norm if config.norm_placement != "post" else nn.Identity
        behind = norm if config.norm_placement != "pre" else nn.Identity
        self.attention_norm = before(hidden)
        self.attention = SpanAttention(
            hidden,
            config.num_heads,
            config.kv_heads,
            config.head_size,
            bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm=config.qk_norm,
            norm=norm,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            backend=backend,
        )
        self.attention_out_norm = behind(hidden)
        self.mlp_norm = before(hidden)
        self.mlp: nn.Module
        if config.moe is not None and index in config.moe_layers:
            options = config.moe.model_dump(exclude={"layers"})
            self.mlp = MoE(hidden, **options, backend=backend)
        else:
            self.mlp = SwiGLU(
                hidden, config.intermediate_size, config.activation, config.mlp_bias, _without_triton(backend)
            )
        self.mlp_out_norm = behind(hidden)

    def forward(
        self,
        x_BLC: Tensor,
        spans: AttentionSpans,
        rotary: Rotary,
        new_tokens: TokenLayout,
        groups: TokenGroups | None,
        cache: KeyValueCache | None,
        image_tokens: ImageTokens | None,
    ) -> tuple[Tensor, MoEStats | None]:
        y_BLC = self.attention(self.attention_norm(x_BLC), spans, rotary, cache, image_tokens)
        x_BLC = x_BLC + self.attention_out_norm(y_BLC)
        if isinstance(self.mlp, MoE):
            # With a cache it is generation, which has no use for statistics.
            y_BLC, stats = self.mlp(self.mlp_norm(x_BLC), new_tokens, groups, statistics=cache is None)
            return x_BLC + self.mlp_out_norm(y_BLC), stats
        return x_BLC + self.mlp_out_norm(self.mlp(self.mlp_norm(x_BLC), image_tokens)), None


class LanguageModel(nn.Module):
    """From embeddings to hidden states; the loss takes `head_weight` and the sampler `logits` from there."""

    def __init__(self, config: LanguageConfig, backend: str) -> None:
        super().__init__()
        self.config = config
        vocabulary = config.vocab_size, config.hidden_size
        self.embed_tokens: nn.Embedding = (
            nn.Embedding(*vocabulary)
            if config.embedding_scale is None
            else ScaledEmbedding(*vocabulary, config.embedding_scale)
        )
        self.layers = nn.ModuleList(DecoderLayer(config, i, backend) for i in range(config.num_layers))
        self.norm = build_norm(config, backend, config.hidden_size)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False

    @property
    def head_weight(self) -> Tensor:
        """[V, C]; the embedding's own where tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[..., C] to [..., V]."""
        logits = nn.functional.linear(hidden_states, self.head_weight)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        embeds_BLC: Tensor,
        layout: TokenLayout,
        cache: list[KeyValueCache] | None = None,
        positions_BK: Tensor | None = None,
        num_image_tokens: int | None = None,
    ) -> tuple[Tensor, list[MoEStats]]:
        """Runs the L new tokens through all layers.

        Args:
            embeds_BLC: embeddings of the new tokens.
            layout: of all tokens so far, those in the cache and the new ones.
            cache: one a layer; extended by the new tokens.
            positions_BK: of all tokens so far, int64; None: one position a token (`position_ids`).
            num_image_tokens: among the new ones; None: counted where Partial LoRA needs it.

        Returns:
            Normalised hidden states [B, L, C], and the statistics of each MoE layer; with a cache none.
        """
        config, start = self.config, 0 if cache is None else cache[0].length
        spans = {
            window: layout.spans(config.attention_rule, window, query_start=start)
            for window in {config.window_of(i) for i in range(config.num_layers)}
        }
        positions_BK = position_ids(layout) if positions_BK is None else positions_BK
        rotary = self._rotary(positions_BK[:, start:])
        new_tokens = layout if start == 0 else slice_layout(layout, start, layout.length)
        groups = None if config.moe is None else TokenGroups.of(new_tokens)
        image_tokens = None
        # Without images too, so that in training each parameter has a gradient; generation needs none.
        if config.partial_lora is not None and (num_image_tokens != 0 or cache is None):
            image_tokens = ImageTokens(new_tokens.kind == IMAGE, num_image_tokens)
        x_BLC, all_stats = embeds_BLC, []
        for i, layer in enumerate(self.layers):
            arguments = (
                x_BLC,
                spans[config.window_of(i)],
                rotary[config.rope_of(i)],
                new_tokens,
                groups,
                None if cache is None else cache[i],
                image_tokens,
            )
            if self.gradient_checkpointing and self.training:
                x_BLC, stats = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x_BLC, stats = layer(*arguments)
            if stats is not None:
                all_stats.append(stats)
        return self.norm(x_BLC), all_stats

    def _rotary(self, positions_BL: Tensor) -> dict[str, Rotary]:
        """The tables of each kind of layer: see `LanguageConfig.rope_of`."""
        config = self.config
        rotary = {
            "global": rotary_tables(positions_BL, config.head_size, config.rope_theta, config.rope_scaling)
        }
        if config.local_rope is not None:
            rotary["local"] = rotary_tables(positions_BL, config.head_size, config.local_rope.theta)
        return rotary


def slice_layout(layout: TokenLayout, start: int, stop: int) -> TokenLayout:
    """The layout of tokens start to stop − 1 of each row."""
    tokens = slice(start, stop)
    prefix = None if layout.prefix is None else layout.prefix[:, tokens]
    return TokenLayout(layout.kind[:, tokens], layout.image[:, tokens], layout.document[:, tokens], prefix)

"""The language model: a pre-norm decoder whose attention mask is a rule and whose MLPs may be experts.

Shapes: B batch, L new tokens, K all tokens so far, C channels, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyvlm.layout import IMAGE, AttentionSpans, TokenLayout
from pyvlm.models.config import LanguageConfig
from pyvlm.models.positions import position_ids
from pyvlm.nn.attention import KeyValueCache, Rotary, SpanAttention, rotary_tables
from pyvlm.nn.moe import MoE, MoEStats
from pyvlm.nn.moe_routing import TokenGroups
from pyvlm.nn.partial_lora import ImageTokens, project


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202); gate and up are one projection, gate rows first."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BLC: Tensor, image_tokens: ImageTokens | None = None) -> Tensor:
        gate, up = project(self.gate_up_proj, x_BLC, image_tokens).chunk(2, dim=-1)
        return project(self.down_proj, nn.functional.silu(gate) * up, image_tokens)


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig, index: int, backend: str) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attention_norm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.attention = SpanAttention(
            hidden,
            config.num_heads,
            config.kv_heads,
            config.head_size,
            softcap=config.attention_softcap,
            backend=backend,
        )
        self.mlp_norm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.mlp: nn.Module
        if config.moe is not None and index in config.moe_layers:
            options = config.moe.model_dump(exclude={"layers"})
            self.mlp = MoE(hidden, **options, backend=backend)
        else:
            self.mlp = SwiGLU(hidden, config.intermediate_size)

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
        x_BLC = x_BLC + self.attention(self.attention_norm(x_BLC), spans, rotary, cache, image_tokens)
        if isinstance(self.mlp, MoE):
            # With a cache it is generation, which has no use for statistics.
            y_BLC, stats = self.mlp(self.mlp_norm(x_BLC), new_tokens, groups, statistics=cache is None)
            return x_BLC + y_BLC, stats
        return x_BLC + self.mlp(self.mlp_norm(x_BLC), image_tokens), None


class LanguageModel(nn.Module):
    """From embeddings to hidden states; the loss takes `head_weight` and the sampler `logits` from there."""

    def __init__(self, config: LanguageConfig, backend: str) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, backend) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        rotary = rotary_tables(positions_BK[:, start:], config.head_size, config.rope_theta)
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
                rotary,
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


def slice_layout(layout: TokenLayout, start: int, stop: int) -> TokenLayout:
    """The layout of tokens start to stop − 1 of each row."""
    tokens = slice(start, stop)
    prefix = None if layout.prefix is None else layout.prefix[:, tokens]
    return TokenLayout(layout.kind[:, tokens], layout.image[:, tokens], layout.document[:, tokens], prefix)

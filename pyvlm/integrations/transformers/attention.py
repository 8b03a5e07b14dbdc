"""transformers' attention interface, served by `pyvlm.ops.span_attention`.

Three kinds of implementation are registered, all with the same mask function:

- "pyvlm": any mask of transformers, as spans;
- "pyvlm_flash": the same for vision encoders that pack windows or images in one row. They hand over the
  packed lengths (one call) only where the name of the implementation says flash, and else call once a window;
- "pyvlm_" + a rule of `TokenLayout.spans`, as "pyvlm_mmca": what `pyvlm.accelerate(attention_rule=...)` sets.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from pyvlm.integrations.transformers.changes import Change
from pyvlm.integrations.transformers.masks import (
    dense_spans,
    keep_spans,
    kept_spans,
    plain_spans,
    sequence_spans,
    spans_mask,
    unpack_spans,
)
from pyvlm.layout import RULES, AttentionSpans, TokenLayout
from pyvlm.ops.attention import span_attention

NAME, PACKED_NAME = "pyvlm", "pyvlm_flash"
KERNEL = "pyvlm.ops.span_attention"
# Model types whose every mask, cache and packed form is tested against their own eager attention.
SUPPORTED = frozenset(
    {
        "clip_vision_model",
        "dinov2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "idefics3_vision",
        "internvl_vision",
        "llama",
        "llama4_text",
        "llama4_vision_model",
        "mistral",
        "mixtral",
        "molmo2_adapter",
        "molmo2_text",
        "molmo2_vision",
        "pixtral",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_5_vl_vision",
        "qwen2_vl_text",
        "qwen2_vl_vision",
        "qwen3",
        "qwen3_moe",
        "qwen3_vl_moe_text",
        "qwen3_vl_moe_vision",
        "qwen3_vl_text",
        "qwen3_vl_vision",
        "siglip",
        "siglip_vision_model",
        "smolvlm_vision",
    }
)
# Vision encoders that call attention once a window unless the implementation's name says flash.
PACKED = frozenset({"qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision", "qwen3_vl_moe_vision"})


def rule_name(rule: str) -> str:
    """The name of the attention implementation that computes a rule."""
    return f"{NAME}_{rule}"


def _spans_of_one_token(rule: str) -> AttentionSpans:
    one = torch.ones(1, 1, dtype=torch.uint8)
    return TokenLayout(one, prefix=one.bool()).spans(rule)


# By the name of an implementation: what is the same in all spans of its rule.
RULES_BY_NAME = {rule_name(rule): _spans_of_one_token(rule) for rule in RULES}


def register() -> None:
    """Makes pyvlm's attention known to transformers, and its mask: without one it would silently be None."""
    for name in (NAME, PACKED_NAME, *RULES_BY_NAME):
        AttentionInterface.register(name, _attention)
        AttentionMaskInterface.register(name, spans_mask)


def apply(model: nn.Module) -> list[Change]:
    """Sets the attention of every submodel of a supported type to pyvlm's, by its config, until undone."""
    changes, seen = [], set()
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or id(module.config) in seen:
            continue
        seen.add(id(module.config))
        if not _has_attention_of_its_own(module) or module.config._attn_implementation in RULES_BY_NAME:
            continue
        reason = _why_not(module)
        if reason is not None:
            changes.append(Change(path, "attention", None, reason))
            continue
        packed = module.config.model_type in PACKED
        undo = set_implementation(module.config, PACKED_NAME if packed else NAME)
        note = "all windows and images in one call" if packed else ""
        changes.append(Change(path, "attention", KERNEL, note, undo))
    return changes


def set_implementation(config: PreTrainedConfig, name: str) -> Callable[[], None]:
    """Sets the attention implementation of one config (not of its sub-configs); gives what undoes it."""
    before = config._attn_implementation_internal

    def undo() -> None:
        config._attn_implementation_internal = before

    config._attn_implementation_internal = name
    return undo


def _has_attention_of_its_own(module: PreTrainedModel) -> bool:
    """Whether some layer reads this very config (a composite model's own config is read by no layer)."""
    return any(
        getattr(child, "config", None) is module.config and not isinstance(child, PreTrainedModel)
        for child in module.modules()
        if "Attention" in type(child).__name__
    )


def _why_not(module: PreTrainedModel) -> str | None:
    config = module.config
    if config.model_type not in SUPPORTED:
        return f"{config.model_type} is not among the tested model types"
    if not module._can_set_attn_implementation():
        return f"{type(module).__name__} does not go through transformers' attention interface"
    for name in ("attention_dropout", "attn_dropout", "attention_probs_dropout_prob"):
        if getattr(config, name, 0.0):
            return f"{name}={getattr(config, name)}: pyvlm's attention has no dropout; set it to 0"
    return None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, H, Q, D], key and value [B, G, K, D] → [B, Q, H, D], None."""
    _refuse(module, key, value, dropout, kwargs)
    queries, keys = query.shape[2], key.shape[2]
    name: str = module.config._attn_implementation  # type: ignore[union-attr,assignment]
    if attention_mask is not None:
        rule = RULES_BY_NAME.get(name)
        use = (queries, keys, None if rule is None else name)
        spans = _kept(attention_mask, use, lambda: _spans_of(attention_mask, queries, keys, rule))
    elif name in RULES_BY_NAME:
        raise ValueError(
            f'{type(module).__name__} runs on "{name}" without a mask of this rule: set the rule with '
            "pyvlm.accelerate(model, attention_rule=...)"
        )
    elif cu_seq_lens_q is not None:
        use = (queries, keys, None)
        spans = _kept(cu_seq_lens_q, use, lambda: sequence_spans(cu_seq_lens_q, queries))
    elif name == PACKED_NAME:
        # Older Pixtral says by position ids alone where an image ends.
        raise ValueError(
            f'{type(module).__name__} runs on "{PACKED_NAME}" and gives no cu_seq_lens_q: use "{NAME}" for it'
        )
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        spans = _plain_spans(query.shape[0], queries, keys, causal and queries > 1, query.device)
    return _attend(query, key, value, spans, scaling, softcap, s_aux)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: AttentionSpans,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> tuple[Tensor, None]:
    if spans.bounds.shape[0] != query.shape[0]:  # one mask for all rows
        rows = query.shape[0]
        spans = AttentionSpans(
            spans.bounds.expand(rows, -1, -1, -1),
            spans.key_class.expand(rows, -1),
            spans.range_classes,
            spans.separate,
        )
    out = span_attention(query, key, value, spans, scale=scaling, softcap=softcap, sinks=s_aux)
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, key: Tensor, value: Tensor, dropout: float, kwargs: dict[str, Any]) -> None:
    """What pyvlm's attention does not compute, by name."""
    name = type(module).__name__
    if dropout:
        raise ValueError(
            f"{name} asks for attention dropout {dropout}, which pyvlm has not: set it to 0 in the config"
        )
    if kwargs.get("position_bias") is not None:
        raise ValueError(f'{name} adds a position bias to the scores: use attn_implementation="sdpa"')
    if kwargs.get("cache") is not None:
        raise ValueError(f'{name} runs on a paged cache, which pyvlm does not read: use "sdpa" for it')
    if key.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"{name} has keys of {key.shape[-1]} and values of {value.shape[-1]} numbers a head, and pyvlm's "
            'attention wants one size: use attn_implementation="sdpa"'
        )


def _spans_of(mask: Tensor, queries: int, keys: int, rule: AttentionSpans | None) -> AttentionSpans:
    """The spans of a mask: of pyvlm's own, which for a rule is what `rules.py` packed, or of a dense one."""
    if rule is not None:
        return unpack_spans(mask, queries, keys, rule.range_classes, rule.separate)
    if mask.dtype == torch.int32:
        return unpack_spans(mask, queries, keys)
    if mask.dim() != 4 or mask.shape[2] != queries or mask.shape[3] < keys:
        raise ValueError(f"the attention mask is {list(mask.shape)}; expected [batch, 1, {queries}, {keys}]")
    return dense_spans(mask[..., :keys])


def _kept(
    tensor: Tensor, use: tuple[int, int, str | None], make: Callable[[], AttentionSpans]
) -> AttentionSpans:
    """The spans of a mask, made in the first layer and kept with the tensor for all others.

    They are made anew once the tensor was written to, which a mask of the caller's own may be between two
    steps. In inference mode nothing tells, so that only integers are kept: those are made for one forward.
    """
    of_integers = not tensor.is_floating_point() and tensor.dtype != torch.bool
    if torch.compiler.is_compiling() or (tensor.is_inference() and not of_integers):
        return make()
    spans = kept_spans(tensor, use)
    if spans is None:
        spans = make()
        keep_spans(tensor, use, spans)
    return spans


@lru_cache(maxsize=16)
def _kept_plain_spans(
    batch: int, queries: int, keys: int, causal: bool, device: torch.device
) -> AttentionSpans:
    with torch.inference_mode(False):  # they outlive this call, and a training step may save them
        return plain_spans(batch, queries, keys, causal, device)


def _plain_spans(batch: int, queries: int, keys: int, causal: bool, device: torch.device) -> AttentionSpans:
    make = plain_spans if torch.compiler.is_compiling() else _kept_plain_spans
    return make(batch, queries, keys, causal, device)

"""Attention rules on models of transformers: multimodal causal attention and its like, on LLaVA-like models.

A rule needs to know which token is an image's. Only the model that takes `input_ids` knows that, and only the
language model takes the mask: a hook on the first notes the kind of each new token, a hook on the second
writes the mask, and the kinds of cached tokens are kept beside their cache.

Shapes: B batch, Q queries (new tokens), K keys (cached and new ones).
"""

from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

from pyvlm.integrations.transformers import attention
from pyvlm.integrations.transformers.changes import Change
from pyvlm.integrations.transformers.masks import pack_spans, unpack_spans
from pyvlm.layout import IMAGE, PADDING, RULES, TEXT, TokenLayout

WINDOWED = "sliding_attention"


def apply(model: nn.Module, rule: str) -> list[Change]:
    """Makes the language model of a vision-language model attend by a rule.

    Raises:
        ValueError: the rule is unknown or needs what transformers does not tell, or the model is no
            vision-language model of a supported language model.
    """
    if rule not in RULES or rule == "prefix":
        known = ", ".join(r for r in RULES if r != "prefix")
        why = " (transformers does not tell a model where its prefix ends)" if rule == "prefix" else ""
        raise ValueError(f"attention_rule={rule!r}{why}; expected one of {known}")
    outer, path, language = _find(model)
    config = language.config
    if config.model_type not in attention.SUPPORTED:
        raise ValueError(f"attention_rule={rule!r}: the language model {config.model_type} is not supported")
    layers = set(getattr(config, "layer_types", None) or [])
    if not layers <= {"full_attention", WINDOWED}:
        raise ValueError(
            f"attention_rule={rule!r}: the language model has {', '.join(sorted(layers))} layers"
        )
    mask = _RuleMask(rule, language, _image_token(outer))
    handles = [
        outer.register_forward_pre_hook(mask.note_kinds, with_kwargs=True),
        language.register_forward_pre_hook(mask.write, with_kwargs=True),
        language.register_forward_hook(mask.keep, with_kwargs=True),
    ]
    restore = attention.set_implementation(config, attention.rule_name(rule))

    def undo() -> None:
        restore()
        for handle in handles:
            handle.remove()

    return [Change(path, "attention", attention.KERNEL, f"by the rule {rule!r}", undo)]


class _RuleMask:
    """The hooks of one model: kinds of the new tokens, and of those in each cache."""

    def __init__(self, rule: str, language: PreTrainedModel, image_token: int) -> None:
        self.rule, self.image_token = rule, image_token
        config = language.config
        self.layers = set(getattr(config, "layer_types", None) or [])
        self.window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:  # as Qwen 2: a window that is not in use
            self.window = None
        self.names = list(signature(language.forward).parameters)
        self.new: Tensor | None = None
        self.kinds: Tensor | None = None
        self.cached: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    def note_kinds(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError(
                f"attention_rule={self.rule!r} needs input_ids, which tell images from text; "
                "this call gave inputs_embeds alone"
            )
        self.new = torch.where(ids == self.image_token, IMAGE, TEXT).to(torch.uint8)

    def write(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Puts the rule's mask in the place of the one given to the language model."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        new, self.new = self.new, None
        if new is None:
            raise ValueError(
                f"the language model was called by itself; with attention_rule={self.rule!r} it needs the "
                "vision-language model around it, which tells images from text"
            )
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        self.kinds = torch.cat([self._kinds_of(cache, seen), new], dim=1) if seen else new
        queries = new.shape[1]
        keys = self._key_count(cache, queries, seen)
        real = _real_keys(mask, queries, keys)
        kind = pad(self.kinds, (0, keys - self.kinds.shape[1]))
        document = None
        if real is not None:
            kind = kind * real
        elif cache is None and given.get("position_ids") is not None:
            document = _documents(given["position_ids"], new.shape[0])
        layout = TokenLayout(kind, document=document)

        def packed(window: int | None) -> Tensor:
            spans = layout.spans(self.rule, window, query_start=seen, num_queries=queries)
            return pack_spans(spans.bounds, spans.key_class)

        if self.layers:
            given["attention_mask"] = {
                layer: packed(self.window if layer == WINDOWED else None) for layer in sorted(self.layers)
            }
            if len(self.layers) == 1 and not isinstance(mask, dict):
                (given["attention_mask"],) = given["attention_mask"].values()
        else:
            given["attention_mask"] = packed(self.window)
        return (), given

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keeps the kinds of all tokens seen so far beside the cache that holds them now."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self.kinds is not None:
            self.cached[cache] = self.kinds
        self.kinds = None

    def _kinds_of(self, cache: Any, seen: int) -> Tensor:
        kinds = self.cached.get(cache)
        if kinds is None or kinds.shape[1] < seen:
            raise ValueError(
                f"the cache holds {seen} tokens that attention_rule={self.rule!r} never saw: start with an "
                "empty cache after pyvlm.accelerate"
            )
        return kinds[:, :seen]

    def _key_count(self, cache: Any, queries: int, seen: int) -> int:
        if cache is None:
            return queries
        keys, offset = cache.get_mask_sizes(queries, 0)
        if offset or keys < seen + queries:
            raise ValueError(
                f"attention_rule={self.rule!r} needs a cache that keeps all tokens; this one keeps a window "
                'of them: generate with cache_implementation="static" or a DynamicCache() without the config'
            )
        return int(keys)


def _find(model: nn.Module) -> tuple[PreTrainedModel, str, PreTrainedModel]:
    """The innermost model that takes ids and pictures, and its language model with its name."""
    outer: PreTrainedModel | None = None
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and {"input_ids", "pixel_values"} <= set(
            signature(module.forward).parameters
        ):
            outer = module
    if outer is None:
        raise ValueError(f"attention_rule: {type(model).__name__} takes no input_ids and pixel_values")
    text = outer.config.get_text_config()
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.config is text and hasattr(module, "layers"):
            return outer, path, module
    raise ValueError(f"attention_rule: no language model was found in {type(outer).__name__}")


def _image_token(model: PreTrainedModel) -> int:
    for name in ("image_token_id", "image_token_index"):
        token = getattr(model.config, name, None)
        if token is not None:
            return int(token)
    raise ValueError(f"attention_rule: the config of {type(model).__name__} names no image token")


def _real_keys(mask: Any, queries: int, keys: int) -> Tensor | None:
    """bool [B, K]: the keys that are no padding, from any mask that the model was given; None: all are."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    if mask is None:
        return None
    if mask.dim() == 2:
        return pad(mask != 0, (0, max(0, keys - mask.shape[1])))[:, :keys]
    if mask.dtype == torch.int32:
        return unpack_spans(mask, queries, keys).key_class != PADDING
    raise ValueError(
        f"the attention mask is {list(mask.shape)} of {mask.dtype}; an attention rule makes the mask "
        "itself: give the 2-D attention_mask, 1 for a token and 0 for padding"
    )


def _documents(position_ids: Tensor, batch: int) -> Tensor | None:
    """int32 [B, Q]: which packed sample a token belongs to; None where each row is one sample."""
    if position_ids.dim() == 3:  # multimodal rotary positions: the first row is that of the text
        position_ids = position_ids[0]
    index = find_packed_sequence_indices(position_ids.expand(batch, -1))
    return None if index is None else index.to(torch.int32)

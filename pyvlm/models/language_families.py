"""The language models of transformers that ours can be: what each is like, read off its configuration.

transformers is imported when the first of them is asked for, and never runs code of a checkpoint. What its
configuration says and ours cannot express is refused by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pyvlm.models.encoders import read_folder

# Our modules of a layer, and those of transformers whose rows, one after another, are theirs.
_SPLIT = {
    "attention.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.o_proj": ("self_attn.o_proj",),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
_FUSED = _SPLIT | {
    "attention.qkv_proj": ("self_attn.qkv_proj",),
    "mlp.gate_up_proj": ("mlp.gate_up_proj",),
}
_PRE_NORMS = {"attention_norm": ("input_layernorm",), "mlp_norm": ("post_attention_layernorm",)}
_POST_NORMS = {
    "attention_out_norm": ("post_attention_layernorm",),
    "mlp_out_norm": ("post_feedforward_layernorm",),
}
_BOTH_NORMS = _POST_NORMS | {
    "attention_norm": ("input_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
}

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True)
class Family:
    """What a transformers model does not say of itself; the rest is read off its configuration.

    Attributes:
        modules: of a layer: ours, and those of transformers whose rows follow one another in it.
        entries: of `LanguageConfig`, that all models of the family share.
        window: whether `sliding_window` is that of all layers or of those that `layer_types` names; None: the
            models have none.
        scaled: whether embeddings are multiplied by the root of their width.
        refused: names of settings that change what the models compute and that ours cannot express, beside
            those that are refused of every family.
    """

    modules: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _SPLIT | _PRE_NORMS)
    entries: Mapping[str, Any] = field(default_factory=dict)
    window: Literal["all", "layer_types"] | None = None
    scaled: bool = False
    refused: tuple[str, ...] = ()


# One entry a `model_type` of a language model's configuration of transformers.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(window="all"),
    "qwen2": Family(entries={"qkv_bias": True, "out_bias": False}, window="layer_types"),
    "qwen3": Family(entries={"qk_norm": "head"}, window="layer_types"),
    "phi3": Family(_FUSED | _PRE_NORMS, window="all"),
    "olmo2": Family(_SPLIT | _POST_NORMS, entries={"qk_norm": "all", "norm_placement": "post"}),
    "gemma": Family(entries={"norm_unit_offset": True}, scaled=True),
    "gemma2": Family(
        _SPLIT | _BOTH_NORMS,
        entries={"norm_unit_offset": True, "norm_placement": "both"},
        window="layer_types",
        scaled=True,
    ),
    "gemma3_text": Family(
        _SPLIT | _BOTH_NORMS,
        entries={"norm_unit_offset": True, "norm_placement": "both", "qk_norm": "head"},
        window="layer_types",
        scaled=True,
        refused=("attn_logit_softcapping",),  # transformers itself reads it and does not use it
    ),
}

# Settings that ours cannot express, and the values with which they do nothing.
_REFUSED = {
    "use_bidirectional_attention": (None, False),
    "attention_dropout": (None, 0),
    "resid_pdrop": (None, 0),
    "embd_pdrop": (None, 0),
}


@dataclass(frozen=True)
class LanguageFolder:
    """What a folder's configuration says: entries of `LanguageConfig`.

    Attributes:
        family: says how its weights are named.
        vocab_size: tokens that its embedding has.
        entries: of its architecture, other than these.
        windows: `window` and `window_layers`.
    """

    family: Family
    vocab_size: int
    entries: dict[str, Any]
    windows: dict[str, Any]


def read_language(folder: str) -> LanguageFolder:
    """What the configuration in a folder of transformers says of its language model.

    Of a vision-language model such as LLaVA, the language part is taken.

    Raises:
        ValueError: no such folder, transformers is missing, the model is unknown, or a setting is none that
            ours has; the message names it.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError(
            f'a language model of transformers needs it: pip install "pyvlm[transformers]" ({error})'
        ) from None
    given, _ = read_folder(folder)
    model_type = given.pop("model_type", None)
    try:
        whole = AutoConfig.for_model(model_type, **given)
        config = whole.get_text_config()
    except Exception as error:  # its checks raise classes of their own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: language model of model_type {model_type!r}: {reason}; {_known()}"
        ) from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"{folder}: language model of model_type {config.model_type!r} is unknown to pyvlm; {_known()}"
        )
    try:
        if quantized := getattr(whole, "quantization_config", None):
            raise _Refusal(f"quantization_config={quantized!r}")
        return LanguageFolder(
            family,
            config.vocab_size,
            _entries(family, config) | {"tie_embeddings": bool(getattr(whole, "tie_word_embeddings", False))},
            _windows(family, config),
        )
    except _Refusal as refusal:
        raise ValueError(
            f"{folder}: {config.model_type} with {refusal}, which pyvlm's language model does not have"
        ) from None


def language_entries(config: Any) -> dict[str, Any]:
    """The entries of `LanguageConfig` that a configuration of a known family means, its windows among them.

    Raises:
        ValueError: a setting that ours does not have.
    """
    family = FAMILIES[config.model_type]
    try:
        return _entries(family, config) | _windows(family, config)
    except _Refusal as refusal:
        raise ValueError(f"{config.model_type} with {refusal}") from None


class _Refusal(Exception):
    """A setting that ours cannot express, as NAME=VALUE."""


def _entries(family: Family, config: Any) -> dict[str, Any]:
    """The architecture as entries of `LanguageConfig`."""
    idle: dict[str, tuple[Any, ...]] = _REFUSED | {name: (None,) for name in family.refused}
    for name, values in idle.items():
        if (value := getattr(config, name, None)) not in values:
            raise _Refusal(f"{name}={value!r}")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise _Refusal(f"hidden_act={activation!r}")
    bias = bool(getattr(config, "attention_bias", False))
    query_scalar = getattr(config, "query_pre_attn_scalar", None)
    return {
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "norm_placement": "pre",
        "norm_unit_offset": False,
        "activation": ACTIVATIONS[activation],
        "embedding_scale": config.hidden_size**0.5 if family.scaled else None,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "qk_norm": None,
        "attention_scale": None if query_scalar is None else query_scalar**-0.5,
        "attention_softcap": getattr(config, "attn_logit_softcapping", None),
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
        **_rope(config),
        **family.entries,
    }


def _windows(family: Family, config: Any) -> dict[str, Any]:
    """The sliding window, and the layers that keep to it."""
    window = getattr(config, "sliding_window", None)
    if family.window is None or window is None:
        return {"window": None, "window_layers": None}
    if family.window == "all":
        return {"window": window, "window_layers": None}
    sliding = _sliding_layers(config)
    return {"window": window if sliding else None, "window_layers": sliding or None}


def _sliding_layers(config: Any) -> list[int]:
    if foreign := set(config.layer_types) - {"full_attention", "sliding_attention"}:
        raise _Refusal(f"layer_types={sorted(foreign)!r}")
    return [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"]


def _rope(config: Any) -> dict[str, Any]:
    """Base, scaling and local base of the rotary positions."""
    given = config.rope_parameters
    local = None
    if "sliding_attention" in given:  # a base a type of layer
        of_sliding, given = given["sliding_attention"], given["full_attention"]
        if of_sliding["rope_type"] != "default":
            raise _Refusal(f"rope_type={of_sliding['rope_type']!r} of sliding layers")
        sliding = _sliding_layers(config)
        local = {"layers": sliding, "theta": of_sliding["rope_theta"]} if sliding else None
    if (part := given.get("partial_rotary_factor", 1.0)) != 1:
        raise _Refusal(f"partial_rotary_factor={part}")
    kind = given["rope_type"]
    scaling: dict[str, Any] | None = None
    if kind == "linear":
        scaling = {"type": kind, "factor": given["factor"]}
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        original = given["original_max_position_embeddings"]
        scaling = {"type": kind, "original_length": original, **{name: given[name] for name in names}}
    elif kind == "yarn":
        scaling = _yarn(given, config.max_position_embeddings)
    elif kind != "default":
        raise _Refusal(f"rope_type={kind!r}")
    return {"rope_theta": given["rope_theta"], "rope_scaling": scaling, "local_rope": local}


def _yarn(given: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    original = given["original_max_position_embeddings"]
    factor = given.get("factor") or max_length / original
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        scale, scale_all = given.get("mscale"), given.get("mscale_all_dim")
        attention_factor = _yarn_magnitude(factor, 1.0)
        if scale and scale_all:
            attention_factor = _yarn_magnitude(factor, scale) / _yarn_magnitude(factor, scale_all)
    return {
        "type": "yarn",
        "factor": factor,
        "original_length": original,
        "attention_factor": attention_factor,
        "beta_fast": given.get("beta_fast") or 32.0,
        "beta_slow": given.get("beta_slow") or 1.0,
        "truncate": given.get("truncate", True),
    }


def _yarn_magnitude(factor: float, scale: float) -> float:
    """As the paper recommends it (arXiv 2309.00071, section 3.4)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _known() -> str:
    return (
        f"known are {', '.join(FAMILIES)}, alone or as the language part of another model. A new one "
        "that computes as ours does needs an entry in pyvlm.models.language_families.FAMILIES: how its "
        "modules are named, and what its configuration does not say"
    )

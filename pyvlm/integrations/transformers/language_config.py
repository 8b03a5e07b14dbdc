"""From a `LanguageConfig` to the configuration of transformers that means the same.

Each family's candidate is read back by `pyvlm.models.language_families`, and is the one only where that gives
the architecture it was made from: what one reads and the other writes cannot drift apart.
"""

import math
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from pyvlm.models.config import LanguageConfig
from pyvlm.models.language_families import ACTIVATIONS, FAMILIES, language_entries
from pyvlm.models.rope import Llama3Scaling, YarnScaling


def text_config(language: LanguageConfig, tokens: dict[str, int | None]) -> PreTrainedConfig:
    """The configuration of the first family that computes what `language` does.

    Args:
        language: without experts and updates.
        tokens: ids by the names that configurations have for them, such as "eos_token_id".

    Raises:
        ValueError: there is none; the message says in what the nearest differs.
    """
    nearest: tuple[str, list[str]] | None = None
    for model_type in FAMILIES:
        try:
            config = _candidate(model_type, language, tokens)
            differences = sorted(_differences(language, _read_back(config, language)))
        except Exception:  # a setting that this family refuses, by an error of any class
            continue
        if not differences:
            return config
        if nearest is None or len(differences) < len(nearest[1]):
            nearest = model_type, differences
    if nearest is None:
        raise ValueError("no language model of transformers takes its settings")
    raise ValueError(
        f"no language model of transformers is like it; {nearest[0]} differs in {', '.join(nearest[1])}"
    )


def _candidate(model_type: str, language: LanguageConfig, tokens: dict[str, int | None]) -> PreTrainedConfig:
    """The configuration of a family with every setting that it has a name for."""
    activation = next(name for name, ours in ACTIVATIONS.items() if ours == language.activation)
    layers = range(language.num_layers)
    windows = [language.window_of(i) is not None for i in layers]
    scale = language.attention_scale
    # A whole number that its root was taken of, where there is one.
    scalar = language.head_size if scale is None else _whole(scale**-2)
    given: dict[str, Any] = {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.kv_heads,
        "head_dim": language.head_size,
        "intermediate_size": language.intermediate_size,
        "rms_norm_eps": language.rms_norm_eps,
        "hidden_activation": activation,
        "hidden_act": activation,
        "attention_bias": language.out_bias,
        "mlp_bias": language.mlp_bias,
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": language.attention_softcap,
        "final_logit_softcapping": language.logit_softcap,
        "tie_word_embeddings": language.tie_embeddings,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "sliding_window": language.window,
        "use_sliding_window": any(windows),
        "rope_parameters": _rope(model_type, language),
        "max_position_embeddings": language.max_length,
        **tokens,
    }
    known = AutoConfig.for_model(model_type)
    leave_out = [name for name in given if not hasattr(known, name)]
    if language.max_length is None:
        leave_out.append("max_position_embeddings")
    if model_type in ("gemma2", "gemma3_text") and language.window is None:
        leave_out.append("sliding_window")  # they have one always, and no layer keeps to it
    return AutoConfig.for_model(model_type, **{k: v for k, v in given.items() if k not in leave_out})


def _whole(number: float) -> float | int:
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number


def _rope(model_type: str, language: LanguageConfig) -> dict[str, Any]:
    scaling = language.rope_scaling
    given: dict[str, Any] = {"rope_type": "default", "rope_theta": language.rope_theta}
    if scaling is not None:
        given |= scaling.model_dump(exclude={"type", "original_length"}) | {"rope_type": scaling.type}
    if isinstance(scaling, (Llama3Scaling, YarnScaling)):
        given["original_max_position_embeddings"] = scaling.original_length
    if model_type != "gemma3_text":
        return given
    theta = language.rope_theta if language.local_rope is None else language.local_rope.theta
    return {"full_attention": given, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}


def _read_back(config: PreTrainedConfig, language: LanguageConfig) -> LanguageConfig:
    of_recipe = {"attention_rule": language.attention_rule, "max_length": language.max_length}
    tied = {"tie_embeddings": language.tie_embeddings}  # said by the model that it is a part of
    entries = language_entries(config)
    return LanguageConfig.model_validate({"vocab_size": language.vocab_size, **entries, **tied, **of_recipe})


def _differences(one: LanguageConfig, other: LanguageConfig) -> Iterator[str]:
    """The names of what two models of the same weights compute differently."""
    mine, yours = _meaning(one), _meaning(other)
    for name, value in mine.items():
        if isinstance(value, float) and isinstance(yours[name], float):
            same = math.isclose(value, yours[name], rel_tol=1e-9)
        else:
            same = value == yours[name]
        if not same:
            yield name


def _meaning(config: LanguageConfig) -> dict[str, Any]:
    """The entries, with what None stands for in its place."""
    layers = range(config.num_layers)
    return config.model_dump(exclude={"pretrained", "window_layers", "local_rope"}) | {
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_size,
        "attention_scale": config.attention_scale or config.head_size**-0.5,
        "embedding_scale": config.embedding_scale or 1.0,
        "window": [config.window_of(i) for i in layers],
        "local_rope": [
            config.local_rope.theta
            if config.local_rope is not None and config.rope_of(i) == "local"
            else None
            for i in layers
        ],
    }

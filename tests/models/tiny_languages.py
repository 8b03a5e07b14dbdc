"""Language models of transformers of some thousand parameters: each family, and what families differ in.

The settings that a family has are away from where they do nothing: a window is shorter than the rows, heads
are grouped, and head sizes are not hidden_size / heads where the family allows it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCAB = 23
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 22,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 6, "rope_parameters": LLAMA3},
    "llama, linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    },
    "llama, biases": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 3, "head_dim": 8},
    "qwen2": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen2, windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 6, "attention_bias": True},
    "phi3": {"model_type": "phi3", "sliding_window": 3},
    "olmo2": {"model_type": "olmo2"},
    "gemma": {"model_type": "gemma", "head_dim": 6},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 6,
        "query_pre_attn_scalar": 5,
        "sliding_window": 3,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 6,
        "query_pre_attn_scalar": 5,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 200.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
    },
}


def make(name: str, **changes: Any) -> Any:
    """The model, with eager attention, and every parameter away from its start."""
    import transformers

    torch.manual_seed(3)
    given = SIZES | MODELS[name] | changes
    config = transformers.AutoConfig.for_model(**given)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    scatter(model)
    return model


def scatter(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = 1.0 if "norm" in name and parameter.dim() == 1 and "bias" not in name else 0.0
            nn.init.normal_(parameter, middle, 0.3)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Makes the model and saves it; gives it in the dtype saved."""
    model = make(name, **changes).to(dtype)
    model.save_pretrained(folder)
    return model

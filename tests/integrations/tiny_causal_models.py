"""Tiny random models of transformers, and batches for them: what the loss and its head are tried on."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    PaliGemmaConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    SiglipVisionConfig,
)

WORDS = 101  # prime, so that no other width is the vocabulary's
IMAGE, START, END = 90, 91, 92  # token ids
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
LANGUAGES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**TEXT, tie_word_embeddings=False),
    "llama, tied": lambda: LlamaConfig(**TEXT, tie_word_embeddings=True),
    "gemma2, softcap": lambda: Gemma2Config(**TEXT, head_dim=8, final_logit_softcapping=0.5),
    "granite, divided": lambda: GraniteConfig(**TEXT, logits_scaling=3.0),
    "cohere, scaled": lambda: CohereConfig(**TEXT, logit_scale=0.3),
    "mixtral, auxiliary loss": lambda: MixtralConfig(
        **TEXT, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
    ),
}
VISION: dict[str, Any] = {
    "llava": lambda: LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=32),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    ),
    "paligemma": lambda: PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=32,
    ),
    "gemma3": lambda: Gemma3Config(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Gemma3TextConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=4,
    ),
    "qwen2-vl": lambda: Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 1,
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    ),
}
MODELS = (*LANGUAGES, *VISION)


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a name; the same weights at every call."""
    torch.manual_seed(1)
    config = {**LANGUAGES, **VISION}[name]()
    auto = AutoModelForCausalLM if name in LANGUAGES else AutoModelForImageTextToText
    model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    return model.train()


def batch(name: str, tokens: int = 12, labelled: int = 5) -> dict[str, Tensor]:
    """Two sequences, in VLMs with an image of 4 tokens each; only the last `labelled` tokens have labels."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, IMAGE, (2, tokens), generator=generator)
    inputs: dict[str, Tensor] = {"attention_mask": torch.ones_like(input_ids)}
    if name in VISION:
        input_ids[:, 1], input_ids[:, 2:6], input_ids[:, 6] = START, IMAGE, END
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    if name in ("paligemma", "gemma3", "qwen2-vl"):
        key = "mm_token_type_ids" if name == "qwen2-vl" else "token_type_ids"
        inputs[key] = (input_ids == IMAGE).long() if name != "paligemma" else torch.zeros_like(input_ids)
    if name == "qwen2-vl":
        inputs["pixel_values"] = torch.randn(8, 3 * 2 * 8 * 8, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 2], [1, 2, 2]])
    labels = torch.where(torch.arange(tokens) >= tokens - labelled, input_ids, -100)
    return {"input_ids": input_ids, "labels": labels, **inputs}

"""Small random models of every family that pyvlm is tested with in transformers, and batches for them.

A family makes its model from a config of its own, and turns rows of pieces ("image", or a number of text
tokens) into what the model's processor would give: left-padded ids, pictures, sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
import transformers
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    InternVLConfig,
    InternVLVisionConfig,
    Llama4Config,
    Llama4TextConfig,
    Llama4VisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    PaliGemmaConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    VipLlavaConfig,
)

VOCABULARY, IMAGE, PAD = 96, 95, 0
Row = tuple[int | str, ...]
ROWS: tuple[Row, ...] = ((3, "image", 4, "image", 2), (2, "image", 6), (5,))  # several images, one, none
TEXT_ROWS: tuple[Row, ...] = ((11,), (4,), (7,))

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZE, PATCH = 8, 4
VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}


@dataclass(frozen=True)
class Family:
    """How to make one family's model and its batches.

    Attributes:
        architecture: the class of transformers that has a head, by name.
        config: makes its config.
        pictures: (model, number of images a row) → the inputs that hold the pictures.
        rows: what the rows of a batch are made of.
        name: its key in FAMILIES.
    """

    architecture: str
    config: Callable[[], Any]
    pictures: Callable[[PreTrainedModel, list[int]], dict[str, Tensor]] | None = None
    rows: tuple[Row, ...] = ROWS
    name: str = ""

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
        torch.manual_seed(5)
        config = self.config()
        model = getattr(transformers, self.architecture)._from_config(config, dtype=dtype, **options)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # norms and biases keep their start; others far enough from 0 to matter
                torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else parameter.shape[-1] ** -0.5)
        return model.eval()

    def batch(self, model: PreTrainedModel, rows: tuple[Row, ...] | None = None) -> dict[str, Tensor]:
        rows = self.rows if rows is None else rows
        counts = [row.count("image") for row in rows]
        pictures = self.pictures(model, counts) if self.pictures is not None and any(counts) else {}
        inputs = fill(rows, pictures.pop("tokens", 0), getattr(model.config, "image_token_id", IMAGE))
        accepted = signature(model.forward).parameters
        is_image = (inputs["input_ids"] == getattr(model.config, "image_token_id", IMAGE)).long()
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in accepted:  # for PaliGemma 1 is the suffix, which only training has
                inputs[name] = is_image * (self.architecture != "PaliGemmaForConditionalGeneration")
        dtype = next(model.parameters()).dtype
        return inputs | {k: v.to(dtype) if v.is_floating_point() else v for k, v in pictures.items()}


def fill(rows: tuple[Row, ...], tokens: int, image_token: int) -> dict[str, Tensor]:
    """input_ids and attention_mask [rows, longest], padded on the left; an image is `tokens` image tokens."""
    random = torch.Generator().manual_seed(7)
    ids = []
    for row in rows:
        pieces = [
            torch.full((tokens,), image_token)
            if piece == "image"
            else torch.randint(3, VOCABULARY - 8, (int(piece),), generator=random)
            for piece in row
        ]
        ids.append(torch.cat(pieces))
    longest = max(map(len, ids))
    pads = [longest - len(row) for row in ids]
    return {
        "input_ids": torch.stack(
            [torch.cat([torch.full((n,), PAD), row]) for n, row in zip(pads, ids, strict=True)]
        ),
        "attention_mask": torch.stack([(torch.arange(longest) >= n).long() for n in pads]),
    }


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def plain_pictures(model: PreTrainedModel, counts: list[int]) -> dict[str, Tensor]:
    pixels = noise(sum(counts), 3, SIZE, SIZE)
    return {"pixel_values": pixels, "tokens": features(model, pixel_values=pixels.to(model.dtype))}


def features(model: PreTrainedModel, **inputs: Tensor) -> int:
    """How many tokens an image becomes, asked of the model itself (all images of a batch are alike)."""
    with torch.no_grad():
        found = model.get_image_features(**inputs)
    pooled = getattr(found, "pooler_output", None)
    found = getattr(found, "last_hidden_state", found) if pooled is None else pooled
    return found[0].shape[0] if isinstance(found, tuple | list) else found.shape[1]


def tiled_pictures(model: PreTrainedModel, counts: list[int]) -> dict[str, Tensor]:
    count = sum(counts)
    pixels, sizes = noise(count, 3, 3, SIZE, SIZE), torch.tensor([[10, 20]] * count)
    tokens = features(model, pixel_values=pixels.to(model.dtype), image_sizes=sizes)
    return {"pixel_values": pixels, "image_sizes": sizes, "tokens": tokens}


def row_pictures(model: PreTrainedModel, counts: list[int]) -> dict[str, Tensor]:
    """Idefics 3: pictures by row, filled up with zeros, which the model takes for no picture."""
    pixels = torch.zeros(len(counts), max(counts), 3, 2 * SIZE, 2 * SIZE)
    for row, count in enumerate(counts):
        pixels[row, :count] = noise(count, 3, 2 * SIZE, 2 * SIZE)
    shown = pixels[:1, :1].to(model.dtype)
    return {"pixel_values": pixels, "tokens": features(model, pixel_values=shown)}


def pixtral_pictures(model: PreTrainedModel, counts: list[int]) -> dict[str, Tensor]:
    count = sum(counts)
    pixels, sizes = noise(count, 3, SIZE, 2 * SIZE), torch.tensor([[SIZE, 2 * SIZE]] * count)
    return {"pixel_values": pixels, "image_sizes": sizes, "tokens": 2}


def llama4_pictures(model: PreTrainedModel, counts: list[int]) -> dict[str, Tensor]:
    return {"pixel_values": noise(sum(counts), 3, SIZE, SIZE), "tokens": 1}  # 4 patches, shuffled into one


def flat_pictures(model: PreTrainedModel, counts: list[int]) -> dict[str, Tensor]:
    """Qwen-VL: patches of all pictures in one row, 4 × 6 of 2 × 3 × 4 × 4 numbers a picture."""
    count = sum(counts)
    grid = torch.tensor([[1, 4, 6]] * count)
    return {"pixel_values": noise(count * 24, 96), "image_grid_thw": grid, "tokens": 6}


def molmo_pictures(model: PreTrainedModel, counts: list[int]) -> dict[str, Tensor]:
    count = sum(counts)
    pooling = torch.arange(count * 4).view(count, 2, 2).flatten(0, 1)
    pooling[1::2, 1] = -1
    return {
        "pixel_values": noise(count, 4, 3 * PATCH * PATCH),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[1, 2, 0, 0]] * count),
        "tokens": 2,
    }


def vlm(config: type, text: Any, vision: Any, **options: Any) -> Callable[[], Any]:
    return lambda: config(text_config=text(), vision_config=vision(), image_token_id=IMAGE, **options)


def clip() -> Any:
    return CLIPVisionConfig(**VIT)


def siglip() -> Any:
    return SiglipVisionConfig(**VIT, vision_use_head=False)


def llama(**options: Any) -> Any:
    return LlamaConfig(**LLAMA, **options)


def qwen2() -> Any:
    return Qwen2Config(**LLAMA)


QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "in_channels": 3}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 94,
    "vision_start_token_id": 93,
    "vision_end_token_id": 92,
}
GEMMA = LLAMA | {"num_hidden_layers": 3}
GEMMA3 = GEMMA | {
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def qwen2_vl() -> Any:
    vision = QWEN_VISION | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return Qwen2VLConfig(text_config=LLAMA | MROPE, vision_config=vision, **QWEN_IDS)


def qwen2_5_vl() -> Any:
    vision = QWEN_VISION | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(text_config=LLAMA | MROPE, vision_config=vision, **QWEN_IDS)


def qwen3_vl(config: type = Qwen3VLConfig, **text: Any) -> Any:
    vision = QWEN_VISION | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return config(text_config=LLAMA | MROPE | text, vision_config=vision, **QWEN_IDS)


def gemma3() -> Any:
    # 4 patches a picture, pooled to as many tokens
    return Gemma3Config(
        text_config=Gemma3TextConfig(**GEMMA3),
        vision_config=siglip(),
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
    )


def paligemma(text: Callable[[], Any]) -> Any:
    return PaliGemmaConfig(
        text_config=text(), vision_config=siglip().to_dict(), image_token_index=IMAGE, projection_dim=32
    )


def gemma2() -> Any:
    return Gemma2Config(
        **GEMMA,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def llama4() -> Any:
    text = LLAMA | {
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "num_hidden_layers": 4,
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
    }
    vision = VIT | {
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "pixel_shuffle_ratio": 0.5,
        "intermediate_size": 64,
    }
    return Llama4Config(
        text_config=Llama4TextConfig(**text),
        vision_config=Llama4VisionConfig(**vision),
        image_token_id=IMAGE,
    )


def molmo2() -> Any:
    attention = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return transformers.Molmo2Config(
        vision_config=attention
        | {"intermediate_size": 24, "num_hidden_layers": 3, "image_size": [SIZE, SIZE], "patch_size": PATCH},
        adapter_config=attention
        | {"vision_feature_layer": [-1, -2], "text_hidden_size": 32, "intermediate_size": 24},
        text_config=LLAMA | {"additional_vocab_size": 8},
        image_patch_id=IMAGE,
    )


FAMILIES = {
    "llava": Family("LlavaForConditionalGeneration", vlm(LlavaConfig, llama, clip), plain_pictures),
    "llava_mistral": Family(
        "LlavaForConditionalGeneration",
        vlm(
            LlavaConfig,
            lambda: MistralConfig(**LLAMA, sliding_window=8),
            siglip,
            vision_feature_select_strategy="full",
        ),
        plain_pictures,
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        vlm(LlavaNextConfig, llama, clip, image_grid_pinpoints=[[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]),
        tiled_pictures,
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        vlm(LlavaOnevisionConfig, qwen2, siglip, image_grid_pinpoints=[[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]),
        tiled_pictures,
    ),
    "vipllava": Family(
        "VipLlavaForConditionalGeneration",
        vlm(VipLlavaConfig, llama, clip, vision_feature_layers=[-1, -2, 1]),
        plain_pictures,
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        vlm(
            InternVLConfig,
            qwen2,
            lambda: InternVLVisionConfig(**VIT | {"image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}),
        ),
        plain_pictures,
    ),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration",
        lambda: Idefics3Config(
            text_config=llama(),
            vision_config=VIT | {"image_size": 2 * SIZE},
            image_token_id=IMAGE,
            scale_factor=2,
        ),
        row_pictures,
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        lambda: SmolVLMConfig(
            text_config=llama(),
            vision_config=VIT | {"image_size": 2 * SIZE},
            image_token_id=IMAGE,
            scale_factor=2,
        ),
        row_pictures,
    ),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", qwen2_vl, flat_pictures),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, flat_pictures),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", qwen3_vl, flat_pictures),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration", lambda: qwen3_vl(Qwen3VLMoeConfig, **MOE), flat_pictures
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration", lambda: paligemma(lambda: GemmaConfig(**GEMMA)), plain_pictures
    ),
    "paligemma2": Family("PaliGemmaForConditionalGeneration", lambda: paligemma(gemma2), plain_pictures),
    "gemma3": Family("Gemma3ForConditionalGeneration", gemma3, plain_pictures),
    "molmo2": Family("Molmo2ForConditionalGeneration", molmo2, molmo_pictures),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        vlm(
            Mistral3Config,
            lambda: MistralConfig(**LLAMA),
            lambda: PixtralVisionConfig(**VIT | {"head_dim": 8}),
            spatial_merge_size=2,
        ),
        pixtral_pictures,
    ),
    "llama4": Family("Llama4ForConditionalGeneration", llama4, llama4_pictures),
    "llama": Family("LlamaForCausalLM", llama, rows=TEXT_ROWS),
    "mistral": Family("MistralForCausalLM", lambda: MistralConfig(**LLAMA, sliding_window=4), rows=TEXT_ROWS),
    "qwen2": Family("Qwen2ForCausalLM", qwen2, rows=TEXT_ROWS),
    "qwen3": Family("Qwen3ForCausalLM", lambda: Qwen3Config(**LLAMA), rows=TEXT_ROWS),
    "gemma": Family("GemmaForCausalLM", lambda: GemmaConfig(**GEMMA), rows=TEXT_ROWS),
    "gemma2": Family("Gemma2ForCausalLM", gemma2, rows=TEXT_ROWS),
    "gemma3_text": Family("Gemma3ForCausalLM", lambda: Gemma3TextConfig(**GEMMA3), rows=TEXT_ROWS),
    "mixtral": Family(
        "MixtralForCausalLM", lambda: MixtralConfig(**LLAMA, num_local_experts=4), rows=TEXT_ROWS
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", lambda: Qwen3MoeConfig(**LLAMA | MOE), rows=TEXT_ROWS),
}
FAMILIES = {name: replace(family, name=name) for name, family in FAMILIES.items()}
ENCODERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "clip": ("CLIPVisionModel", clip),
    "siglip": ("SiglipVisionModel", lambda: SiglipVisionConfig(**VIT)),
    "dinov2": ("Dinov2Model", lambda: Dinov2Config(**VIT | {"mlp_ratio": 2})),
}

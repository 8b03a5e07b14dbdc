"""LLaVA and LLaVA-NeXT of some thousand parameters, saved by transformers with their processors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.chat_folders import IM, Family, family_tokenizer
from models.tiny_languages import SIZES, scatter
from PIL import Image

transformers = pytest.importorskip("transformers")

# As that of llava-interleave-qwen: all images of a message, then its texts.
IMAGES_FIRST = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIDE, PATCH = 12, 4
VISION = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": SIDE,
    "patch_size": PATCH,
}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
QUESTION = "What is in image 1?"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tokenizer() -> Any:
    """A fast tokenizer of transformers with <image> among its special tokens."""
    family = Family(IMAGES_FIRST, "<|im_end|>", IM, bos="<|endoftext|>", eos="<|im_end|>")
    made = family_tokenizer(family)
    made.add_special_tokens(["<image>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.bos,
        extra_special_tokens={"image_token": "<image>"},
    )


def image_processor(vision: str, tiles: bool, **options: Any) -> Any:
    clip = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if tiles:
        kind, given = transformers.LlavaNextImageProcessorPil, clip | {"image_grid_pinpoints": PINPOINTS}
    elif vision == "siglip_vision_model":
        kind, given = transformers.SiglipImageProcessorPil, {"size": {"height": SIDE, "width": SIDE}}
    else:
        kind, given = transformers.CLIPImageProcessorPil, clip
    if options.get("do_pad"):
        kind = transformers.LlavaImageProcessorPil
    return kind(**given | options)


def save_llava(
    folder: Path,
    text: str = "llama",
    vision: str = "clip_vision_model",
    *,
    tiles: bool = False,
    template: str = IMAGES_FIRST,
    pixels: dict[str, Any] | None = None,
    text_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Saves the model and its processor; gives the model."""
    torch.manual_seed(3)
    words = tokenizer()
    sizes = SIZES | {"vocab_size": len(words) + 3, "max_position_embeddings": 512}  # as padded embeddings are
    sizes |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    sizes |= {"pad_token_id": words.pad_token_id}
    strategy = "default" if vision == "clip_vision_model" else "full"
    kind = "llava_next" if tiles else "llava"
    given: dict[str, Any] = {
        "vision_config": VISION | {"model_type": vision},
        "text_config": sizes | {"model_type": text} | (text_options or {}),
        "image_token_index": words.convert_tokens_to_ids("<image>"),
        "vision_feature_select_strategy": strategy,
        "image_seq_length": (SIDE // PATCH) ** 2,
        **({"image_grid_pinpoints": PINPOINTS} if tiles else {}),
    }
    config = transformers.AutoConfig.for_model(kind, **given | options)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    scatter(model)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(folder)
    of_kind = transformers.LlavaNextProcessor if tiles else transformers.LlavaProcessor
    of_kind(
        image_processor=image_processor(vision, tiles, **(pixels or {})),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        chat_template=template,
        num_additional_image_tokens=int(strategy == "default"),
    ).save_pretrained(folder)
    return model

"""A model of some thousand parameters that has every part, and batches for it.

In float64 two ways to one result agree to 1e-10, so that no error hides behind a tolerance.
"""

from typing import Any

import torch
from torch import Tensor

from pyvlm.models import VLM, VLMConfig

IMAGE_ID, PAD_ID, VOCAB = 2, 0, 23
TOKENS_PER_IMAGE = 4


def tiny_config(**language: Any) -> VLMConfig:
    """Two towers with two levels each, grouped-query heads, experts in the second of three layers."""
    return VLMConfig.model_validate(
        {
            "image": {"size": 8, "channels": 1},
            "vision_towers": [
                {
                    "type": "vit",
                    "name": "vit",
                    "patch_size": 4,
                    "hidden_size": 12,
                    "num_layers": 2,
                    "num_heads": 2,
                    "levels": [1, -1],
                },
                {"type": "conv", "name": "conv", "channels": [4, 6], "blocks": [1, 2], "levels": [-2, -1]},
            ],
            "fusion": {"hidden_size": 10, "grid": 2},
            "language": {
                "vocab_size": VOCAB,
                "hidden_size": 16,
                "num_layers": 3,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 6,
                "intermediate_size": 20,
                "moe": {"layers": [1], "num_experts": 3, "intermediate_size": 8},
            }
            | language,
            "image_token_id": IMAGE_ID,
        }
    )


def tiny_vlm(dtype: torch.dtype = torch.float64, backend: str | None = None, **language: Any) -> VLM:
    """The model of `tiny_config`, in evaluation mode, with weights so large that its rows differ."""
    torch.manual_seed(7)
    model = VLM(tiny_config(**language), backend).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.language.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def tokens(*parts: int | str) -> list[int]:
    """Ids from numbers of random words and "image"."""
    ids: list[int] = []
    for part in parts:
        if part == "image":
            ids += [IMAGE_ID] * TOKENS_PER_IMAGE
        else:
            ids += torch.randint(3, VOCAB, (int(part),)).tolist()
    return ids


def batch(*rows: list[int], side: str = "left") -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask of rows, padded on one side."""
    ids = [torch.tensor(row) for row in rows]
    real = [torch.ones_like(row) for row in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, PAD_ID, side), pad(real, True, 0, side)


def pictures(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 1, 8, 8, dtype=dtype)

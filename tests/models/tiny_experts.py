"""Tiny models with experts of every kind, and whether what comes later reaches a logit, on any device."""

from typing import Any

import torch
from models.tiny_vlm import IMAGE_ID, VOCAB, pictures, tiny_vlm, tokens
from tolerance import assert_conforms

from pyvlm.models import VLM

EXPERTS: dict[str, dict[str, Any]] = {
    "images by expert choice, text by token choice": {},
    "all by token choice": {"image_router": "token_choice"},
    "text by threshold": {"text_router": "threshold_choice"},
    "all by threshold": {"text_router": "threshold_choice", "image_router": "threshold_choice"},
    "split": {"image_experts": 2},
    "split, text by threshold": {"image_experts": 2, "text_router": "threshold_choice"},
    "loss-free bias": {"bias_rate": 0.1},
}


def model_of(experts: dict[str, Any], **language: Any) -> VLM:
    """Experts in two layers, whose routers' state has moved."""
    moe = {"layers": [0, 2], "num_experts": 4, "intermediate_size": 8} | experts
    model = tiny_vlm(moe=moe, **language).train()
    for _ in range(3):
        model.update_router(model(torch.tensor([tokens(4, "image", 9)]), pictures(1)).moe_stats)
    return model


def assert_no_logit_depends_on_what_comes_later(model: VLM, device: torch.device) -> None:
    """From each place on, all words and all whole images are others; every logit before it stays."""
    row = tokens(2, "image", 3, "image", 2)  # the images are at 2 to 5 and at 9 to 12
    images = pictures(2).to(device)
    before = model(torch.tensor([row], device=device), images).logits[0]
    for place in (1, 2, 6, 7, 8, 9, 13, 14):
        ids = [t if i < place or t == IMAGE_ID else (t - 2) % (VOCAB - 3) + 3 for i, t in enumerate(row)]
        later = images.clone()
        later[sum(start < place for start in (2, 9)) :] += 1
        after = model(torch.tensor([ids], device=device), later).logits[0]
        assert_conforms(after[:place].detach(), before[:place].detach())
        assert not torch.isclose(after[place:], before[place:]).all()

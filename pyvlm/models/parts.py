"""The parts of a model that learn or stay as they are, each apart from the others."""

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from pyvlm.nn.moe import MoE

if TYPE_CHECKING:
    from pyvlm.models.vlm import VLM


def split_parts(model: "VLM", by_tower: bool = False) -> dict[str, list[nn.Parameter]]:
    """See `VLM.parts`."""
    towers = {f"vision.{name}": list(tower.parameters()) for name, tower in model.vision_towers.items()}
    connector = list(model.connector.parameters())
    if model.column_embedding is not None:
        connector += model.column_embedding.parameters()
    if model.image_packer is not None:
        connector += model.image_packer.parameters()
    parts = {
        **(towers if by_tower else {"vision": [p for tower in towers.values() for p in tower]}),
        "fusion": list(model.fusion.parameters()),
        "connector": connector,
        "language": [],
        "moe": [],
    }
    layers = [module for module in model.language.modules() if isinstance(module, MoE)]
    in_experts = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for name, parameter in model.language.named_parameters():
        parts.setdefault(_part_of_language(name, id(parameter) in in_experts), []).append(parameter)
    return parts


def hash_parts(model: "VLM", by_tower: bool = False) -> dict[str, str]:
    """SHA-256 of each part's parameters, type, shape and bits: equal where nothing has learned.

    Args:
        by_tower: as in `VLM.parts`.
    """
    return {part: _hash(parameters) for part, parameters in model.parts(by_tower).items()}


def _part_of_language(name: str, in_experts: bool) -> str:
    if in_experts:
        return "moe"
    if ".lora_a." in name or ".lora_b." in name:
        return "partial_lora"
    if ".lora_A." in name or ".lora_B." in name:  # peft's names
        return "lora"
    return "language"


def _hash(parameters: list[nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(f"{parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

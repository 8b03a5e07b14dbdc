"""The parts of a model that learn or stay as they are, each apart from the others."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from pyvlm.nn.moe import MoE

if TYPE_CHECKING:
    from pyvlm.models.vlm import VLM

# Those that every model has; one may be empty.
PARTS = ("vision", "fusion", "connector", "language", "moe")


def split_parts(model: "VLM", finer: Sequence[str] = ()) -> dict[str, list[nn.Parameter]]:
    """See `VLM.parts`."""
    modules: list[tuple[str, nn.Module | None]] = [
        *((f"vision.{name}", tower) for name, tower in model.vision_towers.items()),
        ("fusion", model.fusion),
        ("connector", model.connector),
        ("connector", model.column_embedding),
        ("connector", model.image_packer),
    ]
    named = [(part, p) for part, module in modules if module is not None for p in module.parameters()]
    layers = [module for module in model.language.modules() if isinstance(module, MoE)]
    in_experts = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for name, parameter in model.language.named_parameters():
        named.append((_part_of_language(name, id(parameter) in in_experts), parameter))
    possible = {part for part, _ in named if "." in part}
    if unknown := [part for part in finer if part not in possible]:
        raise ValueError(f"part {unknown[0]!r} is unknown; expected one of {', '.join(sorted(possible))}")
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in PARTS}
    for part, parameter in named:
        parts.setdefault(part if part in finer else part.partition(".")[0], []).append(parameter)
    return parts


def hash_parts(model: "VLM", finer: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of each part's parameters, type, shape and bits: equal where nothing has learned.

    Args:
        finer: as in `VLM.parts`.
    """
    return {part: _hash(parameters) for part, parameters in model.parts(finer).items()}


def _part_of_language(name: str, in_experts: bool) -> str:
    if in_experts:
        return "moe"
    if ".lora_a." in name or ".lora_b." in name:
        return "partial_lora"
    if ".lora_A." in name or ".lora_B." in name:  # peft's names
        return "lora"
    if name.startswith(("embed_tokens.", "lm_head.")):
        return "language.embeddings"
    return "language"


def _hash(parameters: list[nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(f"{parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""What a stage does to the weights: which learn, how fast each of them, and with what moments."""

import math
import re
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Optimizer

from pyvlm.models.vlm import VLM
from pyvlm.training.recipe import Stage


def check_parts(model: VLM, stages: Iterable[tuple[str, Stage]]) -> None:
    """Raises ValueError where a stage names a part that the model does not have."""
    for name, stage in stages:
        try:
            known = model.parts(stage.finer)
        except ValueError as error:
            raise ValueError(f"stage {name!r}: {error}") from error
        if unknown := sorted({*stage.train, *stage.layer_decay} - known.keys()):
            raise ValueError(
                f"stage {name!r} names the part {unknown[0]!r}, and the parts of this model are "
                + ", ".join(known)
            )


def make_optimizer(model: VLM, stage: Stage) -> AdamW:
    """AdamW over the stage's parts, the others frozen; matrices and embeddings decay, vectors do not.

    A group of parameters has, beside AdamW's options, its `part` and the `scale` of its learning rate.

    Raises:
        ValueError: the model has no parameters in these parts.
    """
    scales = layer_scales(model, stage)
    groups = []
    for part, parameters in model.parts(stage.finer).items():
        learns = part in stage.train
        for parameter in parameters:
            parameter.requires_grad_(learns)
        if not learns:
            parameters = []
        for scale in sorted({scales.get(parameter, 1.0) for parameter in parameters}):
            for decays in (True, False):
                members = [p for p in parameters if (p.dim() >= 2) == decays and scales.get(p, 1.0) == scale]
                if members:
                    decay = stage.weight_decay if decays else 0.0
                    groups.append({"params": members, "part": part, "weight_decay": decay, "scale": scale})
    if not groups:
        raise ValueError(f"the model has no parameters in the parts to train, {stage.train}")
    return AdamW(groups, lr=0.0, betas=stage.betas, eps=stage.eps, fused=True)


def layer_scales(model: VLM, stage: Stage) -> dict[nn.Parameter, float]:
    """The factor of each parameter's rate under `stage.layer_decay`; of those that it leaves alone none.

    In a stack of n layers, layer i (from 0) has decay^(n − i), what comes before the layers decay^(n + 1)
    and what follows them 1, as in BEiT (arXiv 2106.08254), which Qwen-VL takes over for its encoder. Each
    vision tower is a stack of its own.
    """
    scales = {}
    stacks = {f"vision_towers.{name}": tower for name, tower in model.vision_towers.items()}
    stacks["language"] = model.language
    parts = {parameter: part for part, members in model.parts(stage.finer).items() for parameter in members}
    for stack in stacks.values():
        depths, top = _depths(stack)
        for parameter, depth in depths.items():
            decay = stage.layer_decay.get(parts[parameter])
            if decay is not None:
                scales[parameter] = decay ** (top - depth)
    return scales


def _depths(stack: nn.Module) -> tuple[dict[nn.Parameter, int], int]:
    """How deep each parameter lies, and how deep what follows the layers: 0 before them, 1 in the first one.

    The layers are the outermost `nn.ModuleList` that holds the most parameters.
    """
    lists = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in stack.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    layers = max(lists, key=lambda name: (lists[name], -len(name)), default=None)
    depths, depth, behind = {}, 0, []
    for name, parameter in stack.named_parameters():
        inside = re.match(rf"{re.escape(layers)}\.(\d+)\.", name) if layers is not None else None
        if inside:
            depth = int(inside[1]) + 1
        elif depth > 0:
            behind.append(parameter)
        depths[parameter] = depth
    return depths | dict.fromkeys(behind, depth + 1), depth + 1


def keep_moments(old: Optimizer, new: Optimizer) -> None:
    """Gives `new` the state that `old` has for the parameters of both."""
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]


def set_learning_rate(optimizer: Optimizer, stage: Stage, step: int, steps: int) -> None:
    """The rates of step `step`, counted from 0, of a stage of `steps`: warm-up, then the stage's schedule."""
    factor = rate_factor(stage, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = factor * group.get("scale", 1.0) * stage.rate_of(group["part"])


def rate_factor(stage: Stage, step: int, steps: int) -> float:
    """The part of the peak rate: a linear rise over the warm-up, then cosine, line or constant."""
    warmup = stage.warmup_steps(steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return stage.final_lr + (1 - stage.final_lr) * left[stage.schedule]

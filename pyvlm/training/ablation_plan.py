"""Which variants of a recipe an ablation compares, and for how many steps each is trained: equal compute.

The budget is one of training FLOPs (`pyvlm.training.budget`), so that a variant whose steps are dearer gets
fewer of them. All its stages shrink or grow by one factor, and their warm-up with them.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from pyvlm.models.config import VLMConfig
from pyvlm.training.budget import stage_models, stage_workloads, step_cost
from pyvlm.training.explain import explain
from pyvlm.training.flops import StepCosts, skeleton, total
from pyvlm.training.recipe import Recipe
from pyvlm.training.recipe_paths import set_path

SHORTHANDS = {
    "connector": "model.connector",
    "mask": "model.language.attention_rule",
    "tower": "model.vision_towers",
}


@dataclass(frozen=True)
class Variant:
    """One combination of the values that are varied.

    Attributes:
        choices: key -> value, as they were given.
        recipe: with its steps scaled; the seed is that of the base.
        parameters: of the model.
        step_flops: mean training FLOPs of a step, by stage.
    """

    choices: dict[str, str]
    recipe: Recipe
    parameters: int
    step_flops: list[int]

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.choices.items())

    @property
    def folder(self) -> str:
        """A name for its run folders: readable, and no other variant's."""
        readable = re.sub(r"[^A-Za-z0-9.=+-]+", "_", self.name)[:60].strip("_")
        return f"{readable}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"

    @property
    def flops(self) -> int:
        return self.flops_at(self.recipe.total_steps)

    def flops_at(self, step: int) -> int:
        """Training FLOPs of the first `step` steps."""
        spent = 0
        for stage, each in zip(self.recipe.stages.values(), self.step_flops, strict=True):
            done = min(step, stage.count_steps())
            spent, step = spent + done * each, step - done
        return spent


def parse_vary(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Each KEY=VALUE,VALUE,… as a key and its values, which are read as YAML.

    Raises:
        ValueError: one is not of this form, or a key or a value is named twice.
    """
    vary: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, listed = text.partition("=")
        try:
            values = yaml.safe_load(f"[{listed}]")
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--vary {text}: the values are not YAML ({reason})") from error
        if not key or not equals or not values:
            raise ValueError(f"--vary {text}: expected KEY=VALUE,VALUE, such as mask=causal,mmca")
        if key in vary or len({_label(value) for value in values}) < len(values):
            raise ValueError(f"--vary {text}: name each key and each of its values once")
        vary[key] = values
    return vary


def plan_variants(
    base: Recipe, vary: Mapping[str, Sequence[Any]], budget: float | None = None, looks: int = 8
) -> list[Variant]:
    """Every combination of the values, the last key changing fastest.

    Args:
        vary: a shorthand (connector, mask, tower) or a dotted path into the recipe -> its values. A value for
            connector may be "resampler", "qformer" or "sva": as many tokens an image as the recipe has. One
            for tower names towers of the recipe, joined by "+".
        budget: training FLOPs of each run; None: those of the recipe as it is.
        looks: how often held-out accuracy is measured on the way.

    Raises:
        ValueError: a value that does not fit, or a budget below one step of each stage; it names the variant.
    """
    if budget is None:
        budget = sum(
            stage.count_steps() * each
            for stage, each in zip(base.stages.values(), _step_flops(base), strict=True)
        )
    variants = []
    for values in itertools.product(*vary.values()):
        choices = dict(zip(vary, values, strict=True))
        labels = {key: _label(value) for key, value in choices.items()}
        name = ", ".join(f"{key}={label}" for key, label in labels.items())
        recipe = _change(base, choices, name)
        step_flops = _step_flops(recipe)
        recipe = _scale(recipe, step_flops, budget, looks, name)
        parameters = sum(p.numel() for p in skeleton(recipe.model).parameters())
        variants.append(Variant(labels, recipe, parameters, step_flops))
    return variants


def _step_flops(recipe: Recipe) -> list[int]:
    return [
        total(step_cost(StepCosts(model, stage.train), stage_workloads(recipe, name)[0]).values()).total
        for (name, stage), model in zip(recipe.stages.items(), stage_models(recipe), strict=True)
    ]


def _change(base: Recipe, choices: Mapping[str, Any], name: str) -> Recipe:
    content = base.model_dump(mode="json") | {"name": f"{base.name}: {name}"}
    for key, value in choices.items():
        if key == "connector":
            value = connector_preset(value, base.model)
            if choices[key] == "sva":
                content["model"]["fusion"] = {}  # it fuses the towers' maps itself
        if key == "tower":
            value = _towers(value, content["model"]["vision_towers"])
        set_path(content, SHORTHANDS.get(key, key), value, "--vary")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"variant {name} is not a valid recipe: {explain(error, Recipe)}") from error


def connector_preset(name: Any, model: VLMConfig) -> Any:
    """A connector that reads queries, at the model's own tokens an image and the decoder's width."""
    language = model.language
    inside = {"hidden_dim": language.hidden_size, "num_heads": language.num_heads}
    presets = {"resampler": {"num_heads": language.num_heads}, "qformer": inside, "sva": inside}
    if not isinstance(name, str) or name not in presets:
        return name
    return {"type": name, "queries": model.tokens_per_image, **presets[name]}


def _towers(names: Any, towers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    by_name = {tower["name"]: tower for tower in towers}
    wanted = str(names).split("+")
    if missing := [name for name in wanted if name not in by_name]:
        raise ValueError(f"--vary tower: the recipe has no tower {missing[0]!r}; it has {', '.join(by_name)}")
    return [by_name[name] for name in wanted]


def _scale(recipe: Recipe, step_flops: Sequence[int], budget: float, looks: int, name: str) -> Recipe:
    """The recipe with all stages longer or shorter by the factor that meets the budget."""
    stages = recipe.stages.values()
    own = sum(stage.count_steps() * each for stage, each in zip(stages, step_flops, strict=True))
    if budget < (least := sum(step_flops)):
        raise ValueError(
            f"variant {name}: a budget of {budget:.3g} FLOPs is less than one step of each stage, {least:.3g}"
        )
    factor = budget / own
    counts = _round_steps([stage.count_steps() * factor for stage in stages], step_flops, budget)
    changed = {
        key: stage.model_copy(
            update={"steps": steps, "epochs": None, "warmup": _scale_warmup(stage.warmup, factor, steps)}
        )
        for (key, stage), steps in zip(recipe.stages.items(), counts, strict=True)
    }
    steps = sum(stage.count_steps() for stage in changed.values())
    evaluation = recipe.evaluation.model_copy(update={"every": math.ceil(steps / looks)})
    return recipe.model_copy(update={"stages": changed, "evaluation": evaluation})


def _scale_warmup(warmup: float, factor: float, steps: int) -> float:
    """A warm-up in steps becomes longer or shorter with its stage; a share of the stage is one anyway."""
    return min(steps, round(warmup * factor)) if isinstance(warmup, int) else warmup


def _round_steps(wanted: Sequence[float], step_flops: Sequence[int], budget: float) -> list[int]:
    """Whole steps, one at least: rounded up where most is missing, until half a step would be too much."""
    counts = [max(1, math.floor(steps)) for steps in wanted]
    left = budget - sum(count * each for count, each in zip(counts, step_flops, strict=True))
    for i in sorted(range(len(wanted)), key=lambda i: counts[i] - wanted[i]):
        if left >= step_flops[i] / 2:
            counts[i] += 1
            left -= step_flops[i]
    return counts


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

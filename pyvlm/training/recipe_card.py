"""A recipe in words: `pyvlm recipes` and `pyvlm recipes show`."""

from collections.abc import Iterator, Sequence

import yaml

from pyvlm.models.config import VLMConfig
from pyvlm.training.budget import stage_models
from pyvlm.training.flops import skeleton
from pyvlm.training.recipe import Recipe, Stage, load_recipe, shipped_recipes


def list_recipes() -> str:
    """A line for each recipe that pyvlm ships: its name and what makes it itself."""
    recipes = [load_recipe(name) for name in shipped_recipes()]
    width = max(len(recipe.name) for recipe in recipes)
    return "\n".join(f"{recipe.name:<{width}}  {recipe.summary}" for recipe in recipes)


def show_recipe(recipe: Recipe) -> str:
    """The resolved configuration as YAML, then its parts and stages with their parameters."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110) + "\n" + card(recipe)


def card(recipe: Recipe) -> str:
    """Parts and stages of a recipe with their parameters; nothing of the model is allocated."""
    return "\n".join(_lines(recipe))


def _lines(recipe: Recipe) -> Iterator[str]:
    models = stage_models(recipe)
    first, last = _count(recipe.model, ()), _count(models[-1], ())
    columns = [first] if first == last else [first, last]
    yield f"{recipe.name}: {recipe.summary}"
    yield f"{recipe.model.tokens_per_image} tokens an image, attention {recipe.model.language.attention_rule}"
    yield ""
    yield f"{'part':<16}{'parameters':>16}" + ("" if first == last else f"{'in the end':>16}")
    for name in last | first:
        numbers = [counts.get(name, 0) for counts in columns]
        if any(numbers):
            yield f"{name:<16}" + "".join(f"{number:>16,}" for number in numbers)
    yield f"{'all':<16}" + "".join(f"{sum(counts.values()):>16,}" for counts in columns)
    yield ""
    yield f"{'stage':<12}{'steps':>10}{'batch':>8}{'trainable':>16}{'of all':>8}  parts and learning rates"
    for (name, stage), model in zip(recipe.stages.items(), models, strict=True):
        counts = _count(model, stage.finer)
        total = sum(counts.values())
        trainable = sum(counts.get(part, 0) for part in stage.train)
        rates = ", ".join(f"{part} {stage.rate_of(part):g}" for part in stage.train)
        size = f"{trainable:>16,}{trainable / total:>8.1%}"
        what = "; captions" if stage.form == "plain" else ""
        if stage.image_size is not None:
            what += f"; images of {model.image.size} pixels, {model.tokens_per_image} tokens each"
        yield f"{name:<12}{_length(stage):>10}{stage.batch_size:>8}{size}  {rates}{what}"


def _count(config: VLMConfig, finer: Sequence[str]) -> dict[str, int]:
    parts = skeleton(config).parts(finer)
    return {name: sum(p.numel() for p in parameters) for name, parameters in parts.items()}


def _length(stage: Stage) -> str:
    try:
        return f"{stage.count_steps():,}"
    except ValueError:
        return f"{stage.epochs:g} epochs"

"""Who is told of a run's figures beside metrics.jsonl, through the trackers of accelerate."""

import importlib.util
import json
from collections.abc import Sequence
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from pyvlm.training.recipe import Recipe
from pyvlm.training.runfolder import RunFolder


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"trackers: {name} is not installed; pip install {name}, or take it out of the recipe"
            )


def start_trackers(recipe: Recipe, run: RunFolder, done: int) -> list[GeneralTracker]:
    """The trackers of a recipe, started; each has `log(values, step=...)` and `finish()`.

    TensorBoard's files lie in the run folder. The services have a project "pyvlm" and a run a start.

    Args:
        done: steps that were done before; TensorBoard forgets what it was told of later ones.
    """
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": run.path, "purge_step": done + 1},
        "wandb": {"run_name": "pyvlm", "name": recipe.name, "dir": str(run.path)},
        "trackio": {"run_name": "pyvlm", "name": recipe.name},
    }
    trackers = []
    for name in recipe.trackers:
        tracker = LOGGER_TYPE_TO_CLASS[name](**options[name])
        tracker.start()
        if name != "tensorboard":  # to which a configuration is a run of its own
            tracker.store_init_configuration({"recipe": json.dumps(recipe.model_dump(mode="json"))})
        trackers.append(tracker)
    return trackers

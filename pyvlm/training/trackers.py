"""Who is told of a run's figures beside metrics.jsonl, through the trackers of accelerate."""

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from pyvlm.training.recipe import Recipe
from pyvlm.training.runfolder import RunFolder

PROJECT = "pyvlm"  # of every run, at W&B and Trackio


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # A folder of its name, as W&B leaves them where it is used, is found too, and has no origin.
        if spec is None or spec.origin is None:
            raise ValueError(
                f"trackers: {name} is not installed; pip install {name}, or take it out of the recipe"
            )


def start_trackers(recipe: Recipe, run: RunFolder, done: int) -> list[GeneralTracker]:
    """The trackers of a recipe, started; each has `log(values, step=...)`, and `finish_trackers` ends them.

    TensorBoard's files and W&B's lie in the run folder; Trackio has one folder of its own for all runs, where
    `trackio show` looks. W&B and Trackio get the recipe as the run's configuration. A run that is gone on
    with is the same run there: what they were told of steps after `done` they are told again, with the same
    values.

    Args:
        done: steps that were done before; TensorBoard forgets what it was told of later ones.

    Raises:
        ValueError: a tracker does not start, for want of a login for example; none is left open.
    """
    trackers: list[GeneralTracker] = []
    for name in recipe.trackers:
        tracker = LOGGER_TYPE_TO_CLASS[name](**_options(name, recipe, run, done))
        try:
            tracker.start()
        except Exception as error:  # each service has kinds of its own
            finish_trackers(trackers, failed=True)
            login = "; `wandb login` or, to stay on this machine, `wandb offline`" if name == "wandb" else ""
            reason = " ".join(str(error).split())
            raise ValueError(
                f"trackers: {name} does not start ({reason}){login}, or take it out of the recipe"
            ) from error
        trackers.append(tracker)
    return trackers


def finish_trackers(trackers: Sequence[GeneralTracker], failed: bool) -> None:
    """Ends all of them, whatever one of them raises; W&B shows a run that failed as such."""
    with ExitStack() as each:
        for tracker in trackers:
            if tracker.name == "wandb":
                each.callback(tracker.tracker.finish, exit_code=int(failed))
            else:
                each.callback(tracker.finish)


def _options(name: str, recipe: Recipe, run: RunFolder, done: int) -> dict[str, Any]:
    if name == "tensorboard":
        return {"run_name": "tensorboard", "logging_dir": run.path, "purge_step": done + 1}
    # The configuration is given here: accelerate's own way leaves a key of its call in Trackio's.
    shared = {"run_name": PROJECT, "resume": "allow", "config": recipe.model_dump(mode="json")}
    if name == "wandb":
        return shared | {"name": recipe.name, "id": run.identity(), "dir": str(run.path)}
    return shared | {"name": f"{recipe.name}-{run.identity()}"}  # Trackio finds its runs by name

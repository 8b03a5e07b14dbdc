"""A run that is really killed, at points inside a checkpoint's writing and at random ones, goes on exactly.

Children are forked from a server that has imported everything, so that each begins within a moment.
"""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyvlm.models import checkpoint
from pyvlm.training import checkpointing, trainer
from pyvlm.training.recipe import Recipe

CHANGES = {
    "model": {
        "language": {
            "moe": {
                "num_experts": 4,
                "text_router": "threshold_choice",
                "image_router": "token_choice",
                "bias_rate": 0.01,
                "noise": "gaussian",
            }
        }
    },
    "stages": {"one": {"accumulation": 2, "steps": 6}, "two": {"keep_optimizer": True, "steps": 5}},
    "log_every": 1,
    "profile_every": 4,
    "keep_stages": True,
    "trackers": [],
}


@pytest.fixture(scope="module")
def fork() -> Any:
    """Starts a function of this module in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pyvlm.training.trainer", "sklearn.datasets", "matplotlib.backends.backend_agg", "torch._dynamo"]
    )

    def start(function: Any, *arguments: Any) -> Any:
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


@pytest.fixture
def recipe(small_recipe) -> Recipe:
    return small_recipe(**CHANGES)


def run(recipe: Recipe, folder: Path, dies: str = "never", number: int = 0, late: float = 0.0) -> None:
    """Trains; "dies" names the moment at which the process kills itself, the `number`-th time it comes, or
    `late` times the time since it last came after it."""
    torch.set_num_threads(1)
    seen, last = 0, time.monotonic()

    def die_at(moment: str) -> None:
        nonlocal seen, last
        if moment != dies:
            return
        now, seen = time.monotonic(), seen + 1
        if seen == number:
            wait, end = late * (now - last), (os.getpid(), signal.SIGKILL)
            threading.Timer(wait, os.kill, end).start() if late else os.kill(*end)
        last = now

    rename, save, save_file = os.rename, torch.save, checkpoint.save_file

    def watched_rename(source: Any, target: Any) -> None:
        die_at("before a rename")
        rename(source, target)

    def torn_save(state: Any, file: Any) -> None:
        save(state, file)
        file.flush()
        os.truncate(file.fileno(), file.tell() // 2)
        die_at("half of trainer.pt")
        file.seek(0)
        save(state, file)

    def torn_save_file(tensors: Any, path: Path, **options: Any) -> None:
        save_file(tensors, path, **options)
        os.truncate(path, path.stat().st_size // 2)
        die_at("half of the weights")
        save_file(tensors, path, **options)

    os.rename, torch.save, checkpoint.save_file = watched_rename, torn_save, torn_save_file
    trainer.measured_limit = lambda *_: 1e9  # what it measures takes longer than the run
    trainer.train(recipe, folder, progress=False, after_step=lambda done: die_at("between steps"))


def result(folder: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]], dict[str, torch.Tensor]]:
    """Losses and looks of a finished run, and the weights of its models."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    looks = [(line["step"], line["held_out_accuracy"]) for line in lines if "held_out_accuracy" in line]
    weights = {
        f"{name}/{key}": tensor
        for name in ("model", "best", "stages/one", "stages/two")
        for key, tensor in load_file(folder / name / "model.safetensors").items()
    }
    return losses, looks, weights


def assert_same(folder: Path, expected: Any) -> None:
    losses, looks, weights = result(folder)
    assert losses == expected[0]
    assert looks == expected[1]
    assert weights.keys() == expected[2].keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[2][name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("whole") / "run"}


@pytest.fixture
def whole_run(finished, fork, recipe) -> Any:
    """The uninterrupted run, once for all tests."""
    if "result" not in finished:
        process = fork(run, recipe, finished["folder"])
        process.join()
        assert process.exitcode == 0
        finished["result"] = result(finished["folder"])
    return finished["result"]


# Models of the run are written at steps 2 (checkpoint), 3 (best), 4, 6 (the stage, and a checkpoint), 8, ...
@pytest.mark.parametrize(
    ("dies", "number"),
    [
        ("half of the weights", 1),  # the first checkpoint: there is none before it
        ("half of trainer.pt", 3),  # of the checkpoint at the stage's end
        ("before a rename", 4),  # of the old checkpoint, out of the way
        ("before a rename", 5),  # of the new one, into place: the old one lies aside
        ("between steps", 6),
        ("between steps", 11),  # all steps are done, the model is not written
    ],
)
def test_a_kill_at_a_chosen_moment(tmp_path, fork, recipe, whole_run, dies, number):
    process = fork(run, recipe, tmp_path, dies, number)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = fork(run, recipe, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert_same(tmp_path, whole_run)


def test_kills_at_random_moments(tmp_path, fork, recipe, whole_run):
    """Within a step's time after some step of each run; on a fast machine as on a slow one."""
    rng, kills = random.Random(0), 0
    for _ in range(4):
        process = fork(run, recipe, tmp_path, "between steps", rng.randint(2, 4), rng.random())
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills
    process = fork(run, recipe, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert_same(tmp_path, whole_run)


def run_out_of_space(recipe: Recipe, folder: Path, limit: int, told: Any) -> None:
    import resource

    torch.set_num_threads(1)
    trainer.measured_limit = lambda *_: 1e9
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        trainer.train(recipe, folder, progress=False)
    except ValueError as error:
        told.send(str(error))


@pytest.mark.parametrize("what", ["weights", "moments", "log"])
def test_no_file_may_grow_further(tmp_path, fork, recipe, whole_run, finished, what):
    process = fork(run, recipe, tmp_path, "between steps", 5)
    process.join()
    sizes = {
        "weights": (finished["folder"] / "checkpoint" / "model.safetensors").stat().st_size,
        "moments": (finished["folder"] / "checkpoint" / checkpointing.STATE).stat().st_size,
        "log": (tmp_path / "metrics.jsonl").stat().st_size,
    }
    listen, told = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    process = fork(run_out_of_space, recipe, tmp_path, sizes[what] - 10, told)
    process.join()
    assert listen.poll(0), "the run must not have gone on"
    message = listen.recv()
    assert "File too large" in message
    assert "last checkpoint" in message or "one before it is kept" in message
    process = fork(run, recipe, tmp_path)
    process.join()
    assert_same(tmp_path, whole_run)

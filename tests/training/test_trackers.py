"""W&B and Trackio, offline: what they are told, that a run gone on with is one run, and how they end."""

import importlib.util
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from pyvlm.training.recipe import Recipe
from pyvlm.training.runfolder import RunFolder
from pyvlm.training.trackers import check_trackers, finish_trackers, start_trackers
from pyvlm.training.trainer import train

STOPPED_AT = 3  # one step after a checkpoint


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f'{package} is not installed: pip install "pyvlm[trackers]"')


def stop(step: int) -> None:
    if step == STOPPED_AT:
        raise RuntimeError("stopped")


def train_twice(recipe: Recipe, folder: Path) -> None:
    """Stopped by an exception, then gone on with to the end."""
    with pytest.raises(RuntimeError, match="stopped"):
        train(recipe, folder, progress=False, after_step=stop)
    train(recipe, folder, progress=False)


def told(folder: Path) -> dict[int, dict[str, float]]:
    """The figures of metrics.jsonl by step, under the names that trackers know them by."""
    figures: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        figure = json.loads(line)
        of_step = figures.setdefault(figure["step"], {})
        if "loss" in figure:
            of_step["train/loss"] = figure["loss"]
            of_step |= {f"lr/{part}": rate for part, rate in figure["lr"].items()}
        if "held_out_accuracy" in figure:
            of_step["held_out/accuracy"] = figure["held_out_accuracy"]
    return figures


def assert_told(steps: dict[int, dict[str, float]], folder: Path) -> None:
    expected = told(folder)
    assert sorted(steps) == sorted(expected)
    for step, figures in expected.items():
        found = {key: value for key, value in steps[step].items() if key in figures}
        assert found == pytest.approx(figures), step
        assert set(steps[step]) <= {*figures, "train/tokens_per_second"}


def records(path: Path) -> Iterator[bytes]:
    """What is in a file of W&B, whose format is LevelDB's log after a header of seven bytes."""
    data, at, block, pending = path.read_bytes(), 7, 32768, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := block - at % block) < 7:  # too little for a record's head: filled up
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pending += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield pending
            pending = b""


def read_wandb(path: Path) -> dict[str, Any]:
    """The run's names, its configuration, its figures by step and its exit code."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, Any] = {"config": {}, "steps": {}, "exit": None}
    for data in records(path):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "name": record.run.display_name, "project": record.run.project}
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            figures = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            own = {key: value for key, value in figures.items() if not key.startswith("_")}
            found["steps"].setdefault(record.history.step.num, {}).update(own)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


@pytest.fixture
def of_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Its settings, which it keeps for a process: with a home of its own, where no one has logged in."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    wandb.teardown()


@needs("wandb")
def test_wandb_is_told_all_and_a_run_gone_on_with_is_one_run(tmp_path, small_recipe, of_wandb):
    of_wandb.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    recipe = small_recipe(trackers=["wandb"])
    train_twice(recipe, folder)
    parts = [read_wandb(path) for path in folder.glob("wandb/offline-run-*/*.wandb")]
    stopped, ended = sorted(parts, key=lambda part: min(part["steps"]))
    assert stopped["id"] == ended["id"] == (folder / "run_id").read_text()
    assert (stopped["exit"], ended["exit"]) == (1, 0)
    assert sorted(stopped["steps"]) == [1, 2, 3]
    assert sorted(ended["steps"]) == [3, 4, 5, 6, 7, 8, 9]
    assert_told(stopped["steps"] | ended["steps"], folder)
    for part in parts:
        assert (part["project"], part["name"]) == ("pyvlm", "small")
        config = {key: value for key, value in part["config"].items() if key != "_wandb"}
        assert config == recipe.model_dump(mode="json")


@needs("wandb")
def test_wandb_without_a_login_is_told_in_a_line(tmp_path, small_recipe, of_wandb):
    of_wandb.setenv("WANDB_MODE", "online")
    message = r"^trackers: wandb does not start \(No API key[^\n]*`wandb offline`[^\n]*$"
    with pytest.raises(ValueError, match=message):
        train(small_recipe(trackers=["wandb"]), tmp_path / "run", progress=False)


@pytest.fixture(scope="module")
def trackio_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Trackio's folder, which it reads when it is imported: nothing before these tests imports it."""
    path = tmp_path_factory.mktemp("of_trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(path))
        yield path


@needs("trackio")
def test_trackio_is_told_all_and_a_run_gone_on_with_is_one_run(tmp_path, small_recipe, trackio_dir):
    folders = [tmp_path / name for name in ("first", "second")]
    recipe = small_recipe(trackers=["trackio"])
    train_twice(recipe, folders[0])
    train(recipe, folders[1], progress=False)

    database = sqlite3.connect(trackio_dir / "pyvlm.db")
    names = [f"small-{(folder / 'run_id').read_text()}" for folder in folders]
    configs = dict(database.execute("select run_name, config from configs"))
    assert set(configs) == set(names)
    for name, folder in zip(names, folders, strict=True):
        assert len(set(database.execute("select run_id from metrics where run_name = ?", [name]))) == 1
        config = {key: value for key, value in json.loads(configs[name]).items() if not key.startswith("_")}
        assert config == recipe.model_dump(mode="json")
        steps: dict[int, dict[str, float]] = {}
        for step, figures in database.execute("select step, metrics from metrics where run_name = ?", [name]):
            steps.setdefault(step, {}).update(json.loads(figures))
        assert_told(steps, folder)


class Recorded(GeneralTracker):
    """A tracker that notes how it ended, in a list that all of them share."""

    name = "recorded"
    requires_logging_directory = False
    ended: list[str] = []  # noqa: RUF012

    def __init__(self, run_name: str, **options: Any) -> None:
        self.run_name = run_name

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        pass

    def finish(self, exit_code: int | None = None) -> None:
        self.ended.append(f"{self.name} {exit_code}")


class Refused(Recorded):
    def start(self) -> None:
        raise RuntimeError("no way\nin")


class Broken(Recorded):
    name = "broken"

    def finish(self, exit_code: int | None = None) -> None:
        raise RuntimeError("cannot end")


class LikeWandb(Recorded):
    name = "wandb"


def test_a_tracker_that_does_not_start_leaves_none_open(tmp_path, small_recipe, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Recorded)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Refused)
    monkeypatch.setattr(Recorded, "ended", [])
    recipe = small_recipe(trackers=["tensorboard", "trackio"])
    message = r"^trackers: trackio does not start \(no way in\), or take it"
    with RunFolder(tmp_path / "run", recipe) as run, pytest.raises(ValueError, match=message):
        start_trackers(recipe, run, done=0)
    assert Recorded.ended == ["recorded None"]


def test_all_end_whatever_one_of_them_raises(monkeypatch):
    monkeypatch.setattr(Recorded, "ended", [])
    with pytest.raises(RuntimeError, match="cannot end"):
        finish_trackers([Recorded(""), Broken(""), LikeWandb("")], failed=True)
    assert sorted(Recorded.ended) == ["recorded None", "wandb 1"]
    finish_trackers([LikeWandb("")], failed=False)
    assert Recorded.ended[-1] == "wandb 0"


def test_a_folder_of_a_trackers_name_is_no_tracker(tmp_path, monkeypatch):
    (tmp_path / "tracker_of_nobody").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="tracker_of_nobody is not installed"):
        check_trackers(["tracker_of_nobody"])


def test_a_run_keeps_its_identity_and_another_has_its_own(tmp_path, small_recipe):
    made = []
    for name in ("a", "b", "a"):
        with RunFolder(tmp_path / name, small_recipe()) as run:
            made.append(run.identity())
    assert made[0] == made[2] != made[1]
    assert all(len(identity) == 8 and int(identity, 16) >= 0 for identity in made)

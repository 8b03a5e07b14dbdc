"""A run folder: its lock, its recipe, its metrics, and where everything else of a run lies.

recipe.json       the recipe, every default filled in
environment.json  for each time the run was begun or gone on with: versions, commit, machine
metrics.jsonl     one line a step, one a profiled step, and one an evaluation
curves.png        the same as a picture, at most a minute behind the last checkpoint
tensorboard/      the same for TensorBoard
wandb/            the same for W&B, where the recipe names it
run_id            what W&B and Trackio know the run by
checkpoint/       what training goes on from: model, optimizer, position
lengths/          how long the samples of data files are, unless their `cache` keeps it elsewhere
stages/NAME/      the model at the end of each stage, where the recipe keeps them
best/             the model that did best in a held-out evaluation on the way
model/            the trained model, written at the end
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pyvlm.models.checkpoint import write_file
from pyvlm.training.recipe import Recipe

BOOKKEEPING = {"checkpoint_every", "keep_stages", "log_every", "profile_every", "trackers"}


class RunFolder:
    """Holds a run folder for this process alone; a context manager.

    The lock is the kernel's, so that it goes with its process, however that ends.

    Args:
        path: made where it is missing.
        recipe: what is trained there.
        main: whether this is the process that writes; of several that train together the others only read
            where things lie, and hold nothing.

    Raises (on entering):
        ValueError: another process uses the folder, it holds a run of another recipe, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], recipe: Recipe, main: bool = True) -> None:
        self.path, self.recipe, self.main = Path(path), recipe, main
        self.metrics_path = self.path / "metrics.jsonl"
        self.environment = self.path / "environment.json"
        self.curves = self.path / "curves.png"
        self.checkpoint = self.path / "checkpoint"
        self.lengths = self.path / "lengths"
        self.stages = self.path / "stages"
        self.best = self.path / "best"
        self.model = self.path / "model"
        self._lock: int | None = None

    def __enter__(self) -> "RunFolder":
        if not self.main:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"run folder {self.path}: cannot be written ({error.strerror})") from error
        try:
            self._take_lock()
            self._check_recipe()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip()
            raise ValueError(
                f"run folder {self.path} is in use by process {holder or 'unknown'}: wait for it, or give "
                "another folder"
            ) from None
        os.truncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())

    def _check_recipe(self) -> None:
        """Refuses another recipe; keys that change nothing in the model may change."""
        path, recipe = self.path / "recipe.json", self.recipe.model_dump(mode="json")
        found = None
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}): give another run folder") from error
            if changes := list(differences(_relevant(_with_new_defaults(found)), _relevant(recipe))):
                more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
                raise ValueError(
                    f"run folder {self.path} holds a run of another recipe ({'; '.join(changes[:3])}{more}): "
                    "give another folder, or the recipe that the run began with"
                )
        if found != recipe:
            write_file(path, json.dumps(recipe, indent=2).encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl; a last line that was cut off is left out."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def append_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Appends whole lines, or none where the disk is full."""
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with open(self.metrics_path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(end)
                raise

    def cut_metrics(self, step: int) -> None:
        """Forgets what was logged after `step`: it is about to be computed again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_file(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def identity(self) -> str:
        """Eight hexadecimal digits, made when they are first asked for; the run keeps them."""
        path = self.path / "run_id"
        if not path.exists():
            write_file(path, secrets.token_hex(4).encode())
        return path.read_text(encoding="utf-8").strip()

    def note_start(self, facts: Mapping[str, Any]) -> None:
        """Appends to environment.json; a file that cannot be read is begun anew."""
        try:
            starts = json.loads(self.environment.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            starts = []
        write_file(self.environment, json.dumps([*starts, facts], indent=2).encode())


def _relevant(recipe: Any) -> Any:
    """A recipe without what changes nothing in the model: keys at the top that say what is written, and how
    often, and where lengths are kept."""
    if not isinstance(recipe, dict):
        return recipe
    return _without_caches({k: v for k, v in recipe.items() if k not in BOOKKEEPING})


def _without_caches(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    left_out = {"cache"} if value.get("source") == "files" else set()
    return {k: _without_caches(v) for k, v in value.items() if k not in left_out}


def _with_new_defaults(found: Any) -> Any:
    """A recipe of an earlier version with the keys that it did not know yet."""
    try:
        return Recipe.model_validate(found).model_dump(mode="json")
    except ValueError:
        return found


def differences(old: Any, new: Any, where: str = "") -> Iterable[str]:
    """In words, where two values of JSON differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            inner = f"{where}.{key}" if where else key
            yield from differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield f"{where} was {old!r} and is now {new!r}"

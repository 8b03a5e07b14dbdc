"""Models on disk: `config.json` and `model.safetensors`, there whole or not at all.

Everything is written aside, flushed to the disk, and renamed into place, so that whoever is interrupted (by a
kill, a full disk, a power cut) finds the old checkpoint or the new one, never half of one.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PROCESSOR_FILES = ("processor.json", "tokenizer.json")

ConfigType = TypeVar("ConfigType", bound=BaseModel)


@contextmanager
def replace_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a new folder to write into, which takes the place of `folder`, whole, when the block ends.

    Where the block raises, `folder` stays as it was. A folder of a new name appears in one atomic rename.
    POSIX cannot replace a filled folder in one step, so an old one is renamed to `.NAME.old` first. Whoever
    is killed between the two renames finds it there: `find_folder` reads it, and the next `replace_folder`
    puts it back.
    """
    folder = Path(folder).absolute()
    aside, old = folder.with_name(f".{folder.name}.new"), _old(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _put_back(folder)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in [aside, *aside.rglob("*")]:
            _flush(path)
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
    except BaseException:
        _put_back(folder)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def find_folder(folder: str | os.PathLike[str]) -> Path:
    """Where a folder of `replace_folder` can be read: its place, or beside it if a save was cut off.

    Raises:
        ValueError: it is in neither.
    """
    folder = Path(folder).absolute()
    for candidate in (folder, _old(folder)):
        if candidate.is_dir():
            return candidate
    raise ValueError(f"{folder}: there is no such folder; give one that save_pretrained wrote")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _put_back(folder: Path) -> None:
    if _old(folder).exists() and not folder.exists():
        os.rename(_old(folder), folder)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file in one step."""
    aside = path.with_name(f".{path.name}.new")
    try:
        aside.write_bytes(data)
        _flush(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def read_file(path: Path) -> bytes:
    """Raises ValueError, naming the file, where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def read_config(path: Path, kind: type[ConfigType]) -> ConfigType:
    """A configuration from JSON.

    Raises:
        ValueError: an unreadable file, or one entry a defect: an unknown key, a missing one, a wrong value.
    """
    try:
        return kind.model_validate_json(read_file(path))
    except ValidationError as error:
        defects = [f"{'.'.join(map(str, e['loc'])) or 'all of it'}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"{path} is not a valid {kind.__name__}: {'; '.join(defects)}") from error


def check_replaceable(folder: Path) -> None:
    """Raises ValueError where `folder` holds anything that is no part of a model: it would be lost."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder to save the model in")
    known = {CONFIG, WEIGHTS, *PROCESSOR_FILES}
    if folder.is_dir() and (
        foreign := sorted(path.name for path in folder.iterdir() if path.name not in known)
    ):
        raise ValueError(
            f"{folder} holds {', '.join(foreign[:5])}, no part of a model, and saving replaces the whole "
            "folder: give the model a folder of its own"
        )


def copy_processor(source: Path, target: Path) -> None:
    """Copies a processor's files where `source` has them."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_model(model: nn.Module, config: BaseModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes config, parameters and buffers into a folder of `replace_folder`; this alone is not atomic.

    Floating ones are written as they are, or in `dtype`.
    """
    (folder / CONFIG).write_text(config.model_dump_json(indent=2))
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if dtype is not None:  # on the CPU: a device may have no room for all of them in a larger type
        tensors = {n: t.cpu().to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody else read its files


def load_weights(model: nn.Module, path: Path) -> None:
    """Gives `model` the tensors of a file, bit for bit and in the file's floating dtype.

    Raises:
        ValueError: the file is missing or damaged, or tensors are missing, foreign, or of a wrong shape or
            type: one error that names them. The model is then as it was.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or truncated ({error})") from error
    expected = model.state_dict()
    defects = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    defects += [f"{name} is foreign" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        given, wanted = tensors[name], expected[name]
        if given.shape != wanted.shape:
            defects.append(f"{name} is {list(given.shape)} and must be {list(wanted.shape)}")
        elif given.is_floating_point() != wanted.is_floating_point():
            defects.append(f"{name} is {given.dtype} and must be {wanted.dtype}")
    if defects:
        more = f"; and {len(defects) - 20} more" if len(defects) > 20 else ""
        raise ValueError(
            f"{path} does not fit the model of its config: {'; '.join(sorted(defects)[:20])}{more}"
        )
    model.load_state_dict(tensors, assign=True)

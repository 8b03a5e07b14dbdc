"""What reading all records of a file found, kept for the next time: of 665,000 it takes minutes.

An entry is one file, `KEY.npz`. The key is a digest of all that the findings depend on: which files, of what
size and last changed when; how they are read; the tokenizer and the processor; the versions of what computes
them. So an entry is right or is not found, and nothing has to be thrown away by hand, but for one thing:
images are known by their folder only. Where images themselves are exchanged, delete the folder of the cache.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
import tokenizers

import pyvlm
from pyvlm.data.bad_records import Report
from pyvlm.data.scan import Scan
from pyvlm.models.processor import Processor

VERSION = 1  # of what an entry holds
Arrays = Mapping[str, np.ndarray]


def identity(path: str | os.PathLike[str]) -> list[tuple[str, int, int]]:
    """Path, bytes and time of last change (ns) of a file, or of all files in a folder."""
    path = Path(path).absolute()
    files = sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]
    found = [(str(file), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def digest(processor: Processor, **facts: Any) -> str:
    """The key of an entry: of `facts`, which are JSON, and of how `processor` counts tokens."""
    versions = {"entry": VERSION, "pyvlm": pyvlm.__version__, "tokenizers": tokenizers.__version__}
    words = _digest(processor.tokenizer.to_str())
    return _digest(json.dumps([versions, words, processor.config.model_dump(mode="json"), facts]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def remember(
    folder: Path | None, key: Callable[[], str], find: Callable[[], Arrays], tell: Callable[[str], None]
) -> Arrays:
    """What `find` gives, from the cache where it has it.

    An entry is written aside and renamed, so that there is all of it or none, whoever writes at once. One
    that cannot be read is made again; where none can be written, that is told and the work goes on.

    Args:
        folder: of the cache, made where it is missing; None: there is none.
        key: of the entry; asked for only where there is a cache.
        find: makes the arrays.
        tell: is told that an entry could not be written.
    """
    if folder is None:
        return find()
    path = folder / f"{key()}.npz"
    try:
        with np.load(path, allow_pickle=False) as entry:
            return dict(entry)
    except (OSError, ValueError, EOFError, BadZipFile, KeyError):
        arrays = find()
    aside = folder / f".{uuid4().hex}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        tell(f"{folder}: lengths cannot be kept there ({error}), and are measured again the next time")
    finally:
        with suppress(OSError):  # the folder itself may be what is wrong
            aside.unlink()
    return arrays


def scan_to_arrays(found: Scan) -> Arrays:
    """A scan as an entry of the cache."""
    columns = {name: getattr(found, name) for name in ("kept", "lengths", "images", "turns", "passed")}
    report = json.dumps(asdict(found.report)).encode()
    return columns | {"report": np.frombuffer(report, np.uint8)}


def scan_from_arrays(arrays: Arrays) -> Scan:
    """The scan that `scan_to_arrays` was given."""
    columns = {name: array for name, array in arrays.items() if name != "report"}
    return Scan(**columns, report=Report(**json.loads(arrays["report"].tobytes())))

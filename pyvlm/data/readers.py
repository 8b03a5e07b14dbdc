"""Data files by record: JSON and JSON lines by an index of offsets, tables through `datasets`."""

import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pyvlm.data.bad_records import BadRecord
from pyvlm.data.records import Format, Record, conversation

SUFFIXES = (".json", ".jsonl", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLANK = re.compile(r"[ \t\r\n]*")


class Rows(Protocol):
    """The records of a file as they stand in it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Raises BadRecord where it cannot be parsed."""
        ...

    def place(self, index: int) -> str:
        """Its line or row, counted from 1."""
        ...


class RecordFile:
    """The conversations of a data file, by number; each is read when it is asked for.

    Args:
        path: .json (a list of records) or .jsonl (a record a line), told apart by what is in them; .parquet,
            a folder of parquet files, or a folder that `datasets` saved with save_to_disk.
        images: the folder that image paths are relative to; None: the file's.
        form: of the records; see `pyvlm.data.records`.

    Raises:
        ValueError: the file is missing, cannot be read, or holds no records; the message names it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        images: str | os.PathLike[str] | None = None,
        form: Format = "auto",
    ) -> None:
        self.path, self.form = Path(path), form
        self.images = Path(images) if images is not None else self.path.parent
        if images is None and self.path.is_dir():
            self.images = self.path
        self.rows = _open_rows(self.path)
        if not len(self.rows):
            raise ValueError(f"{self.path} holds no records")
        if not self.images.is_dir():
            raise ValueError(f"{self.images}: there is no such folder of images")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord where it is no conversation."""
        messages = conversation(self.rows[index], self.images, self.form)
        return Record(messages, f"{self.path}, {self.place(index)}")

    def read(self, index: int) -> Record:
        """A record that somebody asked for: ValueError says where it stands and what is wrong with it."""
        if not 0 <= index < len(self):
            raise ValueError(
                f"{self.path} has {len(self):,} records, 0 to {len(self) - 1}: there is no {index}"
            )
        try:
            return self[index]
        except BadRecord as error:
            raise ValueError(f"{self.path}, {self.place(index)}: {error}") from error

    def place(self, index: int) -> str:
        """Line or row of a record, counted from 1."""
        return self.rows.place(index)


def is_data(source: str | os.PathLike[str]) -> bool:
    """Whether this is the path of a data file, by its name, and not that of a recipe."""
    return Path(source).suffix in SUFFIXES or Path(source).is_dir()


def _open_rows(path: Path) -> Rows:
    if path.is_dir() or path.suffix == ".parquet":
        return TableRows(path)
    return JsonRows(path)


class JsonRows:
    """Records of a JSON list or of JSON lines: where each begins and ends is kept, and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("rb")
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        is_list = _first_character(self.file.read(1 << 16)) == b"["
        self.file.seek(0)
        self.starts, self.sizes, self.lines = array("q"), array("q"), array("q")
        for start, size, line in self._index_list() if is_list else self._index_lines():
            self.starts.append(start)
            self.sizes.append(size)
            self.lines.append(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Any:
        # pread has no position to share, so that threads and forked workers may read at once.
        data = os.pread(self.file.fileno(), self.sizes[index], self.starts[index])
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadRecord("broken JSON", str(error)) from error

    def place(self, index: int) -> str:
        return f"line {self.lines[index]}"

    def _index_lines(self) -> Iterator[tuple[int, int, int]]:
        start = 0
        for number, line in enumerate(self.file, start=1):
            if line.removeprefix(BYTE_ORDER_MARK).strip():
                yield start, len(line), number
            start += len(line)

    def _index_list(self) -> Iterator[tuple[int, int, int]]:
        data = self.file.read()
        start = (
            len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0
        )  # in bytes, `place` in characters
        line, place, decoder = 1, 0, json.JSONDecoder()
        try:
            text = data[start:].decode()
            here = _skip_blank(text, _skip_blank(text, 0) + 1)
            while text[here : here + 1] != "]":
                start += len(text[place:here].encode())
                line += text.count("\n", place, here)
                _, end = decoder.raw_decode(text, here)
                size = len(text[here:end].encode())
                yield start, size, line
                start, line, place = start + size, line + text.count("\n", here, end), end
                here = _skip_blank(text, end)
                if text[here : here + 1] == ",":
                    here = _skip_blank(text, here + 1)
                elif text[here : here + 1] != "]":
                    raise ValueError("expected , or ] after a record")
            if _skip_blank(text, here + 1) < len(text):
                raise ValueError("there is more after the list's end")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, line {line}: broken JSON ({error})") from error


def _skip_blank(text: str, start: int) -> int:
    found = BLANK.match(text, start)
    return found.end() if found else start


def _first_character(data: bytes) -> bytes:
    return data.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]


class TableRows:
    """Rows of parquet files or of a `datasets` folder, mapped from the disk."""

    def __init__(self, path: Path) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"{path}: tables need datasets ({error}): pip install 'pyvlm[data]'") from error
        files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
        try:
            if files:
                table: Any = datasets.Dataset.from_parquet([str(file) for file in files])
            elif path.is_dir():
                table = datasets.load_from_disk(str(path))
            else:
                raise FileNotFoundError("there is no such file or folder")
        except Exception as error:  # datasets, pyarrow and the disk have each their own
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{path}: cannot be read as a table ({reason})") from error
        if isinstance(table, datasets.DatasetDict):
            splits = sorted(table)
            if len(splits) > 1 and "train" not in splits:
                raise ValueError(f"{path} has the splits {', '.join(splits)}: give the folder of one of them")
            table = table["train" if "train" in splits else splits[0]]
        self.table = table.with_format("arrow")  # as they are stored: datasets would decode every image

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.table[index].to_pylist()[0]

    def place(self, index: int) -> str:
        return f"row {index + 1}"

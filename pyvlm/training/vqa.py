"""Questions with known answers, from a file of VQA records or of conversations."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyvlm.data.bad_records import BadRecord
from pyvlm.data.records import IMAGE_MARK, conversation
from pyvlm.models.checkpoint import read_file
from pyvlm.models.speaker import Messages

NAMED = 5  # bad records of each reason that are told of one by one


@dataclass(frozen=True)
class Question:
    """What is asked, and what would be right.

    Attributes:
        messages: the conversation up to and with the question; images are paths.
        answers: one, or those of several people.
        kind: "" where the record names none.
        where: its line or place in the file.
    """

    messages: Messages
    answers: tuple[str, ...]
    kind: str
    where: str


class Skipped:
    """Counts bad records by reason and tells of the first of each.

    Args:
        tell: gets a line.
        strict: raise ValueError at the first.
    """

    def __init__(self, tell: Callable[[str], None], strict: bool = False) -> None:
        self.tell, self.strict = tell, strict
        self.counts: Counter[str] = Counter()

    def add(self, where: str, error: BadRecord) -> None:
        """Counts the record at `where`."""
        if self.strict:
            raise ValueError(f"{where}: {error}") from error
        self.counts[error.reason] += 1
        if self.counts[error.reason] <= NAMED:
            self.tell(f"skipped {where}: {error}")

    def summary(self) -> str:
        """One line: how many, and how many of each reason."""
        listed = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())
        return f"{self.counts.total():,} records skipped: {listed}"


def read_questions(path: str | os.PathLike[str], skipped: Skipped) -> Iterator[Question]:
    """The questions of a .json list or a file with a JSON object a line, in their order.

    A record is {"image": path or paths, "question": str, "answer": str or "answers": [str or
    {"answer": str}, ...], "type": str}, where the image and the type may be missing; or a conversation,
    {"messages": [...]} as `Processor.encode` takes them or LLaVA's {"conversations": [...]}. Each <image>
    mark in a text is the next of the record's images; images of a question without marks stand before it.
    Of a conversation every turn of the assistant is a question, behind the true turns before it. Paths are
    relative to the file's folder.

    Args:
        path: the file.
        skipped: gets the records that hold no question.

    Raises:
        ValueError: the file cannot be read or holds no question at all.
    """
    path, found = Path(path), False
    for where, record in _records(path):
        try:
            if isinstance(record, BadRecord):
                raise record
            questions = list(_questions(record, path.parent, where))
        except BadRecord as error:
            skipped.add(where, error)
            continue
        found = True
        yield from questions
    if not found:
        raise ValueError(f"{path} holds no question with an answer")


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Places and records; a BadRecord in place of what is no JSON."""
    text = read_file(path).decode(errors="replace")
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from error
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(records, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                yield where, BadRecord("broken JSON", str(error))


def _questions(record: Any, folder: Path, where: str) -> Iterator[Question]:
    if not isinstance(record, Mapping):
        raise BadRecord("not an object", f"got {type(record).__name__}")
    kind = str(record.get("type") or "")
    if "question" in record:
        messages, answers = conversation(_as_messages(record), folder), _answers(record)
        yield Question(messages[:-1], answers, kind, where)
        return
    messages = conversation(record, folder)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            expected = message["content"]
            if not isinstance(expected, str):
                expected = "".join(part.get("text", "") for part in expected)
            yield Question(messages[:number], (expected,), kind, where)


def _answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    given = record.get("answers")
    given = [record.get("answer")] if given is None else given
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise BadRecord("no answer", f"answers must be a list of them, got {given!r}")
    answers = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in given]
    if bad := [answer for answer in answers if isinstance(answer, bool) or not isinstance(answer, str | int)]:
        raise BadRecord("no answer", f"expected text, got {bad[0]!r}")
    return tuple(map(str, answers))


def _as_messages(record: Mapping[str, Any]) -> dict[str, Any]:
    """A VQA record as one of messages with images beside them; its answers are in none of them."""
    question, images = record["question"], _images(record)
    if not isinstance(question, str) or not question.strip():
        raise BadRecord("no question", f"got {question!r}")
    marks = "" if IMAGE_MARK in question else IMAGE_MARK * len(images)
    turns = [{"role": "user", "content": marks + question}, {"role": "assistant", "content": ""}]
    return {"messages": turns, "images": images}


def _images(record: Mapping[str, Any]) -> list[Any]:
    """The images of a VQA record, one or several."""
    images = record.get("images") or record.get("image") or []
    return list(images) if isinstance(images, list | tuple) else [images]

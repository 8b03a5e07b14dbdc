"""Conversations to look at a model with: from a file, or the held-out dialogues of a recipe."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pyvlm.models.checkpoint import read_file
from pyvlm.models.config import ImageConfig
from pyvlm.models.processor import Processor, Sample
from pyvlm.training.conversation import dialogue_messages
from pyvlm.training.digits import DigitDialogues
from pyvlm.training.pictures import read_strokes
from pyvlm.training.recipe import load_recipe


def read_samples(source: str, processor: Processor, limit: int) -> Iterator[Sample]:
    """At most `limit` conversations, encoded.

    Args:
        source: a .jsonl file, a conversation a line: {"messages": [...]} as `Processor` takes them, with
            pictures as paths from the file's folder; or a recipe, whose held-out dialogues are taken.

    Raises:
        ValueError: the file or a picture is missing or damaged; the message names the line.
    """
    if Path(source).suffix == ".jsonl":
        yield from islice(_read_lines(Path(source), processor), limit)
        return
    recipe = load_recipe(source)
    dialogues = DigitDialogues("test", recipe.evaluation.data, recipe.seed)
    for index in range(limit):
        yield processor.encode(dialogue_messages(dialogues.batch(0, [index])[0]))


def _read_lines(path: Path, processor: Processor) -> Iterator[Sample]:
    for number, line in enumerate(read_file(path).decode(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
                raise ValueError('expected {"messages": [...]}')
            image = processor.config.image
            yield processor.encode([_with_pictures(m, path.parent, image) for m in content["messages"]])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error


def _with_pictures(message: Any, folder: Path, image: ImageConfig) -> Any:
    """The message with paths from `folder`; models of grey images take strokes, as in `pyvlm chat`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        if isinstance(part, Mapping) and isinstance(part.get("image"), str):
            picture = folder / part["image"]
            part = {**part, "image": read_strokes(picture, image.size)[0] if image.channels == 1 else picture}
        parts.append(part)
    return {**message, "content": parts}

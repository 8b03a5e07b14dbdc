"""Conversations to look at a model with: from a file, or the held-out dialogues of a recipe."""

from collections.abc import Iterator

from pyvlm.data.readers import RecordFile, is_data
from pyvlm.models.config import ImageConfig
from pyvlm.models.processor import Processor, Sample
from pyvlm.models.speaker import Messages
from pyvlm.training.bundled import bundled_dialogues
from pyvlm.training.conversation import dialogue_messages
from pyvlm.training.pictures import read_picture
from pyvlm.training.recipe import load_recipe


def read_samples(source: str, processor: Processor, limit: int) -> Iterator[Sample]:
    """At most `limit` conversations, encoded.

    Args:
        source: a data file (see `pyvlm.data.readers.RecordFile`), or a recipe, whose held-out dialogues are
            taken.

    Raises:
        ValueError: the file or a picture is missing or damaged; the message names the line.
    """
    if is_data(source):
        yield from _read_file(source, processor, limit)
        return
    recipe = load_recipe(source)
    dialogues = bundled_dialogues("test", recipe.bundled_held_out(), recipe.seed)
    for index in range(limit):
        yield processor.encode(dialogue_messages(dialogues.batch(0, [index])[0]))


def _read_file(path: str, processor: Processor, limit: int) -> Iterator[Sample]:
    file = RecordFile(path)
    for index in range(min(limit, len(file))):
        try:
            messages = file[index].messages
            yield processor.encode(_with_pictures(messages, processor.config.image))
        except ValueError as error:
            raise ValueError(f"{path}, {file.place(index)}: {error}") from error


def _with_pictures(messages: Messages, image: ImageConfig) -> Messages:
    """The conversation with its image files read as the model takes them, as in `pyvlm chat`."""
    seen = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {**part, "image": read_picture(part["image"], image)[0]}
                if part["type"] == "image" and isinstance(part["image"], str)
                else part
                for part in content
            ]
        seen.append({**message, "content": content})
    return seen

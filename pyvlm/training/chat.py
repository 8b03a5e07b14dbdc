"""`pyvlm chat`: questions about pictures on disk."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pyvlm.models.checkpoint import CONFIG
from pyvlm.models.processor import Processor
from pyvlm.models.vlm import VLM
from pyvlm.training.conversation import Messages, answer, ask, open_conversation
from pyvlm.training.evaluate import reply
from pyvlm.training.pictures import read_strokes


def load_model(path: str | os.PathLike[str]) -> tuple[VLM, Processor]:
    """The model of a run folder, or of a folder that `VLM.save_pretrained` wrote.

    Raises:
        ValueError: there is none, or a file of it is damaged; the message names it.
    """
    folder = Path(path)
    if not (folder / CONFIG).exists() and (folder / "model" / CONFIG).exists():
        folder = folder / "model"
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"{path} holds no model: expected a run folder with a finished model/, or a folder with "
            f"{CONFIG}; train one with: pyvlm demo"
        )
    return VLM.from_pretrained(folder), Processor.from_pretrained(folder)


class Chat:
    """A conversation about pictures; each `ask` is a further round.

    Args:
        model, processor: see `load_model`.
        paths: the pictures. Models of grey images are models of strokes: see `read_strokes`.
        tell: is told of what was done to a picture, and of words that the model does not know.

    Raises:
        ValueError: a picture cannot be read.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        paths: Sequence[str | os.PathLike[str]],
        tell: Callable[[str], None],
    ) -> None:
        self.model, self.processor, self.tell = model, processor, tell
        self.images = [self._read(path) for path in paths]
        self.messages: Messages = []

    def ask(self, question: str) -> str:
        """The model's answer."""
        if unknown := self.processor.unknown_words(question):
            self.tell(f"the model does not know the words: {', '.join(unknown)}")
        asked = ask(self.messages, question) if self.messages else open_conversation(self.images, question)
        text = reply(self.model, self.processor, [asked])[0]
        self.messages = answer(asked, text)
        return text

    def interact(self, questions: Iterable[str], say: Callable[[str], None]) -> None:
        """Answers one question after another; blank ones are passed over."""
        for question in questions:
            if question.strip():
                say(self.ask(question.strip()))

    def _read(self, path: str | os.PathLike[str]) -> Any:
        image = self.processor.config.image
        if image.channels != 1:
            return path
        strokes, inverted = read_strokes(path, image.size)
        if inverted:
            self.tell(f"{path}: dark on bright, inverted")
        return strokes

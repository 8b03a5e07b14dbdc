"""A conversation with a model about pictures on disk."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pyvlm.data.source import Messages
from pyvlm.models.checkpoint import CONFIG, write_file
from pyvlm.models.processor import Processor
from pyvlm.models.vlm import VLM
from pyvlm.training.conversation import answer, introductions
from pyvlm.training.pictures import read_picture
from pyvlm.training.replies import Interrupted, Sampling, Speaker


def load_model(path: str | os.PathLike[str], device: str = "cpu") -> tuple[VLM, Processor]:
    """The model of a run folder, or of a folder that `VLM.save_pretrained` wrote.

    Raises:
        ValueError: there is none, or a file of it is damaged; the message names it. Or no such device.
    """
    folder = Path(path)
    if not (folder / CONFIG).exists() and (folder / "model" / CONFIG).exists():
        folder = folder / "model"
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"{path} holds no model: expected a run folder with a finished model/, or a folder with "
            f"{CONFIG}; train one with: pyvlm demo"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA fails an assertion
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return VLM.from_pretrained(folder).to(device), Processor.from_pretrained(folder)


class Chat:
    """A conversation about pictures, or about none; each `ask` is a further round.

    Args:
        model, processor: see `load_model`.
        paths: the pictures of the first question; see `add_image`.
        tell: is told of what was done to a picture, of words that the model does not know, and of a
            conversation that is longer than what the model was trained on.
        sampling: how tokens are chosen.
        system: see `set_system`.

    Attributes:
        pending: parts of the next question, a picture each.

    Raises:
        ValueError: a picture cannot be read, or the model takes no system message.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        paths: Sequence[str | os.PathLike[str]],
        tell: Callable[[str], None],
        sampling: Sampling | None = None,
        system: str | None = None,
    ) -> None:
        self.processor, self.tell = processor, tell
        self.speaker = Speaker(model, processor, sampling or Sampling())
        self.pending: list[dict[str, Any]] = []
        self._system: Messages = []
        self._rounds: Messages = []
        if system is not None:
            self.set_system(system)
        for path in paths:
            self.add_image(path)

    @property
    def messages(self) -> Messages:
        """The conversation so far as `Processor.encode` takes it; pictures have their "path" beside them."""
        return [*self._system, *self._rounds]

    def add_image(self, path: str | os.PathLike[str]) -> None:
        """Shows a picture with the next question. Models of grey images are models of strokes and take it as
        `read_strokes` reads it."""
        image, inverted = read_picture(path, self.processor.config.image)
        part = {"type": "image", "image": image, "path": os.fspath(path)}
        try:
            self.processor.encode([{"role": "user", "content": [part]}])
        except ValueError as error:
            raise ValueError(f"image {os.fspath(path)!r}: {error}") from error
        if inverted:
            self.tell(f"{path}: dark on bright, inverted")
        self.pending.append(part)

    def set_system(self, text: str | None) -> None:
        """The system message that the conversation begins with from now on; None: none.

        Raises:
            ValueError: the model's template has no place for one.
        """
        system: Messages = [] if text is None else [{"role": "system", "content": text}]
        self.processor.encode([*system, {"role": "user", "content": "?"}], add_generation_prompt=True)
        self._system = system

    def reset(self) -> None:
        """Forgets all rounds and pictures; the system message stays."""
        self._rounds, self.pending = [], []

    def ask(self, question: str, write: Callable[[str], None] | None = None) -> str:
        """The model's answer, which `write` gets piece by piece as it comes.

        Raises:
            Interrupted: Ctrl-C; what had been said is the answer. Had nothing been said, the question counts
                as not asked.
            ValueError: the question cannot be encoded; it counts as not asked.
        """
        if unknown := self.processor.unknown_words(question):
            self.tell(f"the model does not know the words: {', '.join(unknown)}")
        asked = [*self._rounds, {"role": "user", "content": self._content(question)}]
        try:
            text = self.speaker.answer([*self._system, *asked], write)
        except Interrupted as stop:
            if stop.text:
                self._rounds, self.pending = answer(asked, stop.text), []
            raise
        self._rounds, self.pending = answer(asked, text), []
        self._warn_of_length()
        return text

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes {"messages": [...]} with absolute paths of pictures; one line where the name ends in .jsonl.

        Raises:
            ValueError: another ending than .json and .jsonl, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix not in (".json", ".jsonl"):
            raise ValueError(f"{path}: expected a name that ends in .json or .jsonl")
        messages = [{**m, "content": _with_paths(m["content"])} for m in self.messages]
        indent = None if path.suffix == ".jsonl" else 2
        text = json.dumps({"messages": messages}, indent=indent, ensure_ascii=False) + "\n"
        try:
            write_file(path, text.encode())
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from error

    def _warn_of_length(self) -> None:
        limit, tokens = self.speaker.model.config.language.max_length, self.speaker.total_tokens
        if limit is not None and tokens > limit:
            self.tell(
                f"the conversation has {tokens:,} tokens, and the model was trained on at most {limit:,}: "
                "its answers may suffer; begin a new one"
            )

    def _content(self, question: str) -> str | list[dict[str, Any]]:
        """The pending pictures and the question.

        Role tokens are of models trained here, on pictures that are introduced by their number in the
        conversation; other templates, and `image_words`, say all that is to be said.
        """
        if not self.pending:
            return question
        config = self.processor.config
        if config.template != "role_tokens" or config.image_words is not None:
            return [*self.pending, *_texts([question])]
        contents = [m["content"] for m in self._rounds if isinstance(m["content"], list)]
        shown = sum(part["type"] == "image" for content in contents for part in content)
        words = introductions(shown + len(self.pending))[shown:]
        parts = [part for pair in zip(_texts(words), self.pending, strict=True) for part in pair]
        return [*parts, *_texts([question])]


def _texts(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def _with_paths(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The content of a message with absolute paths in place of pictures."""
    if isinstance(content, str):
        return content
    return [
        {"type": "image", "image": os.path.abspath(part["path"])} if part["type"] == "image" else part
        for part in content
    ]

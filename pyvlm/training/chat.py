"""A conversation with a model about pictures on disk."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pyvlm.models.checkpoint import CONFIG, read_file, write_file
from pyvlm.models.processor import Processor
from pyvlm.models.speaker import Interrupted, Messages, Sampling, Speaker
from pyvlm.models.vlm import VLM
from pyvlm.training.conversation import answer, introductions
from pyvlm.training.replies import VLMSpeaker


def load_model(path: str | os.PathLike[str], device: str = "cpu") -> tuple[VLM, Processor]:
    """The model of a run folder, or of a folder that `VLM.save_pretrained` wrote.

    Raises:
        ValueError: there is none, or a file of it is damaged; the message names it. Or no such device.
    """
    folder = model_folder(path)
    if folder is None:
        raise ValueError(
            f"{path} holds no model: expected a run folder with a finished model/, or a folder with "
            f"{CONFIG}; train one with: pyvlm demo"
        )
    if is_checkpoint(folder):
        raise ValueError(f"{path} is of transformers, and a model of pyvlm is needed here")
    check_device(device)
    return VLM.from_pretrained(folder).to(device), Processor.from_pretrained(folder)


def load_speaker(
    path: str | os.PathLike[str], device: str = "cpu", sampling: Sampling | None = None
) -> Speaker:
    """What answers: a model of pyvlm, as `load_model` finds it, or a checkpoint of transformers.

    Args:
        path: a run folder, a folder of either kind of model, or OWNER/NAME of the Hugging Face hub.
        device: where to compute, as torch names it.
        sampling: how tokens are chosen.

    Raises:
        ValueError: as `load_model`, or the checkpoint cannot be had or run:
            see `pyvlm.integrations.transformers.checkpoints.load_checkpoint`.
    """
    sampling = sampling or Sampling()
    folder = model_folder(path)
    if is_hub_id(path) or (folder is not None and is_checkpoint(folder)):
        from pyvlm.integrations.transformers.chat import CheckpointSpeaker
        from pyvlm.integrations.transformers.checkpoints import load_checkpoint

        check_device(device)
        return CheckpointSpeaker(*load_checkpoint(os.fspath(folder or path), device), sampling)
    return VLMSpeaker(*load_model(path, device), sampling)


def model_folder(path: str | os.PathLike[str]) -> Path | None:
    """Where the model of a run folder or of a model's own folder lies; None: there is none."""
    folder = Path(path)
    return next((f for f in (folder, folder / "model") if (f / CONFIG).exists()), None)


def is_hub_id(path: str | os.PathLike[str]) -> bool:
    """Whether this can only be OWNER/NAME of the Hugging Face hub: there is no folder OWNER here, nor is it
    `runs`, where models are trained and asked for before they are there."""
    owner, _, name = os.fspath(path).partition("/")
    return bool(owner and name) and "/" not in name and owner != "runs" and not Path(owner).exists()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder with a config.json is of transformers, whose configurations name a `model_type`."""
    try:
        content = json.loads(read_file(folder / CONFIG))
    except ValueError:
        return False  # whoever reads it says what is wrong with it
    return isinstance(content, dict) and "model_type" in content


def check_device(device: str) -> None:
    """Raises ValueError where torch cannot compute on it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA fails an assertion
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


class Chat:
    """A conversation about pictures, or about none; each `ask` is a further round.

    Args:
        speaker: what answers; see `load_speaker`.
        paths: the pictures of the first question; see `add_image`.
        tell: is told of what was done to a picture, of words that the model does not know, and of a
            conversation that is longer than what the model was trained on.
        system: see `set_system`.

    Attributes:
        pending: parts of the next question, a picture each.

    Raises:
        ValueError: a picture cannot be read, or the model takes no system message.
    """

    def __init__(
        self,
        speaker: Speaker,
        paths: Sequence[str | os.PathLike[str]],
        tell: Callable[[str], None],
        system: str | None = None,
    ) -> None:
        self.speaker, self.tell = speaker, tell
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
        """Shows a picture with the next question.

        Raises:
            ValueError: it cannot be read, or the model does not take it.
        """
        image, inverted = self.speaker.read_picture(path)
        part = {"type": "image", "image": image, "path": os.fspath(path)}
        try:
            self.speaker.encode([{"role": "user", "content": [part]}])
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
        self.speaker.encode([*system, {"role": "user", "content": "?"}])
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
        if unknown := self.speaker.unknown_words(question):
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
        limit, tokens = self.speaker.max_length, self.speaker.total_tokens
        if limit is not None and tokens > limit:
            self.tell(
                f"the conversation has {tokens:,} tokens, and the model was trained on at most {limit:,}: "
                "its answers may suffer; begin a new one"
            )

    def _content(self, question: str) -> str | list[dict[str, Any]]:
        """The pending pictures and the question."""
        if not self.pending:
            return question
        if not self.speaker.numbers_images:
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

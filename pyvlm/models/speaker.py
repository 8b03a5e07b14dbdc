"""What `pyvlm chat` and `pyvlm eval` ask of a model, of whatever library it is."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# As `pyvlm.models.Processor.encode` takes them.
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: see `VLM.generate`; `seed` is that of all answers of a conversation together."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped an answer; `text` is what had been said of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class Speaker(Protocol):
    """A model and its processor, which answer conversations.

    Attributes:
        max_length: tokens of the longest sequence that the model was trained on, where that is known.
        total_tokens: of the last answer and the conversation before it.
        numbers_images: whether words are to say which picture of the conversation each one is.
    """

    total_tokens: int

    @property
    def max_length(self) -> int | None: ...

    @property
    def numbers_images(self) -> bool: ...

    def read_picture(self, path: str | os.PathLike[str]) -> tuple[Any, bool]:
        """A picture as the model takes it, and whether it was inverted.

        Raises:
            ValueError: the file is missing, no image, damaged, or too large; the message names it.
        """

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text` that the vocabulary lacks."""

    def encode(self, messages: Messages) -> Any:
        """A conversation that ends with a question, as `reply` takes it.

        Raises:
            ValueError: a role, a part or an image that the model does not take.
        """

    def reply(self, samples: Sequence[Any], max_new_tokens: int) -> list[str]:
        """Greedy answers to conversations of `encode`, computed together."""

    def answer(self, messages: Messages, write: Callable[[str], None] | None = None) -> str:
        """The answer to a conversation that ends with a question.

        Args:
            messages: the conversation.
            write: called with each new piece of text as soon as later tokens cannot change it.

        Raises:
            Interrupted: in place of KeyboardInterrupt, with what has been said.
            ValueError: as `encode`.
        """

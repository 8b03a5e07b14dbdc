"""A dialogue as messages: how images are introduced and rounds follow each other, in training as in chat."""

from collections.abc import Sequence
from typing import Any

from pyvlm.models.speaker import Messages
from pyvlm.training.dialogue import Dialogue, Round


def introductions(count: int) -> list[str]:
    """The words that stand before each of `count` images."""
    return [f"image {number}:" for number in range(1, count + 1)]


def open_conversation(images: Sequence[Any], question: str) -> Messages:
    """The first turn: every image, introduced by its number and shown, then the question."""
    content: list[dict[str, Any]] = []
    for words, image in zip(introductions(len(images)), images, strict=True):
        content += [{"type": "text", "text": words}, {"type": "image", "image": image}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def answer(messages: Messages, text: str) -> Messages:
    """The conversation with an answer of the assistant's appended."""
    return [*messages, {"role": "assistant", "content": text}]


def ask(messages: Messages, question: str) -> Messages:
    """The conversation with a further question appended."""
    return [*messages, {"role": "user", "content": question}]


def dialogue_messages(dialogue: Dialogue, rounds: Sequence[Round] | None = None) -> Messages:
    """A dialogue with its true answers; `rounds` in place of its own."""
    first, *others = dialogue.rounds if rounds is None else rounds
    messages = answer(open_conversation(list(dialogue.images), first.question), first.reply)
    for asked in others:
        messages = answer(ask(messages, asked.question), asked.reply)
    return messages

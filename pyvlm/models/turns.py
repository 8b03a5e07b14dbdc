"""Dialogues as turns, and the plain way to write them: role tokens.

A template turns them into token ids with one placeholder an image, and says of each whether it is learnt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer


@dataclass(frozen=True)
class Turn:
    """One message: who speaks, and pieces of text with None where an image stands."""

    role: str
    parts: tuple[str | None, ...]


class Written(NamedTuple):
    """Token ids of a dialogue with one placeholder an image, and which of them the assistant must learn."""

    ids: list[int]
    learnt: list[bool]


class Template(Protocol):
    """How turns are written."""

    roles: tuple[str, ...]
    end_token_id: int

    def write(self, turns: Sequence[Turn], add_generation_prompt: bool) -> Written:
        """Raises ValueError where the turns cannot be written as the template is."""


class RoleTokens:
    """A turn is its role's token, its content, each piece of text by itself, and the end token.

    Args:
        tokenizer: knows all the tokens.
        role_ids: the tokens of "user" and "assistant".
        end_token_id, image_token_id: the end of every turn, and the placeholder of an image.
        reserved: the tokens that text may not hold, by id.
    """

    roles: tuple[str, ...] = ("user", "assistant")

    def __init__(
        self,
        tokenizer: Tokenizer,
        role_ids: Mapping[str, int],
        end_token_id: int,
        image_token_id: int,
        reserved: Mapping[int, str],
    ) -> None:
        self.end_token_id = end_token_id
        self._tokenizer, self._role_ids = tokenizer, role_ids
        self._image_token_id, self._reserved = image_token_id, reserved

    def write(self, turns: Sequence[Turn], add_generation_prompt: bool) -> Written:
        ids: list[int] = []
        learnt: list[bool] = []
        for number, turn in enumerate(turns):
            content: list[int] = []
            for part in turn.parts:
                content += [self._image_token_id] if part is None else self._encode(part, number)
            ids += [self._role_ids[turn.role], *content, self.end_token_id]
            learnt += [False] + [turn.role == "assistant"] * (len(content) + 1)
        if add_generation_prompt:
            ids.append(self._role_ids["assistant"])
            learnt.append(False)
        return Written(ids, learnt)

    def _encode(self, text: str, number: int) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if written := [self._reserved[i] for i in ids if i in self._reserved]:
            raise reserved_token_error(number, written[0])
        return ids


def reserved_token_error(number: int, token: str) -> ValueError:
    """What is raised where the text of a message holds a token of the template's."""
    return ValueError(
        f"message {number}: the text holds {token!r}, which only the template may write; "
        "give an image as a part of its own, and other tokens in other words"
    )

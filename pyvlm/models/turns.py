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


class DialogueTemplate(Template, Protocol):
    """A template of dialogues, which also says how a caption alone is written.

    Attributes:
        start_ids: what stands before everything else, such as the token that begins a text.
    """

    start_ids: list[int]

    @property
    def caption_end_id(self) -> int:
        """The last token of a caption. Raises ValueError where there is none."""

    def caption(self, text: str, number: int) -> list[int]:
        """A caption, message `number`, and its end.

        Raises:
            ValueError: it holds a token of the template's.
        """


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
        self.start_ids: list[int] = []
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

    @property
    def caption_end_id(self) -> int:
        return self.end_token_id

    def caption(self, text: str, number: int) -> list[int]:
        return [*self._encode(text, number), self.caption_end_id]

    def _encode(self, text: str, number: int) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if written := [self._reserved[i] for i in ids if i in self._reserved]:
            raise reserved_token_error(number, written[0])
        return ids


class PlainCaption:
    """One image, then its caption, which is learnt to its end: the form that LLaVA's first stage has.

    There is no system message, no role and no instruction: of the user's message the image alone is taken.
    Source: `preprocess_plain` of llava/train/train.py, with the conversation `conv_llava_plain`
    (github.com/haotian-liu/LLaVA), arXiv 2304.08485.

    Args:
        template: of the model's dialogues.
        image_token_id: the placeholder of an image.
    """

    roles: tuple[str, ...] = ("user", "assistant")

    def __init__(self, template: DialogueTemplate, image_token_id: int) -> None:
        self._template, self._image_token_id = template, image_token_id
        self.end_token_id = template.caption_end_id

    def write(self, turns: Sequence[Turn], add_generation_prompt: bool) -> Written:
        expected = self.roles[:1] if add_generation_prompt else self.roles
        if (given := tuple(turn.role for turn in turns)) != expected:
            raise ValueError(
                f'the form "plain" takes the messages {" and ".join(expected)}, got '
                f"{', '.join(given) or 'none'}"
            )
        if (images := turns[0].parts.count(None)) != 1:
            raise ValueError(
                f'message 0: the form "plain" takes one image and its caption, got {images} images'
            )
        start = [*self._template.start_ids, self._image_token_id]
        caption: list[int] = []
        if not add_generation_prompt:
            pieces = [part for part in turns[1].parts if part is not None]
            if len(pieces) < len(turns[1].parts):
                raise ValueError(
                    'message 1: a caption of the form "plain" holds text only, and this one an image'
                )
            caption = self._template.caption("".join(pieces), 1)
        return Written([*start, *caption], [False] * len(start) + [True] * len(caption))


def reserved_token_error(number: int, token: str) -> ValueError:
    """What is raised where the text of a message holds a token of the template's."""
    return ValueError(
        f"message {number}: the text holds {token!r}, which only the template may write; "
        "give an image as a part of its own, and other tokens in other words"
    )

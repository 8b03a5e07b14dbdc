"""A model's own chat template: what it writes, and which characters of that the assistant must learn.

A template says nothing of where an answer starts and ends, so it is asked: contents are replaced by
sentinels, and what stands between these is the template's. Labels go wrong in silence, so a template that
leaves any doubt is refused. The text itself is rendered and tokenised once, as transformers does.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import chain
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

from pyvlm.models.jinja_sandbox import GENERATION_END, GENERATION_START, compile_template
from pyvlm.models.turns import Turn, Written, reserved_token_error

_SENTINEL = re.compile("\ufdd2(\\d+)\ufdd3")
_MARKS = re.compile(f"[{GENERATION_START}{GENERATION_END}\ufdd2\ufdd3]")


class Span(NamedTuple):
    """Characters start ≤ i < stop of a text."""

    start: int
    stop: int


@cache
def shipped_templates() -> dict[str, str]:
    """The chat templates that pyvlm has for models whose folder has none, by name."""
    folder = resources.files("pyvlm.models") / "chat_templates"
    return {
        path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8")
        for path in sorted(folder.iterdir(), key=lambda path: path.name)
        if path.name.endswith(".jinja")
    }


class ChatTemplate:
    """Writes dialogues by a Jinja chat template.

    What is learnt of an assistant's turn is its content and what follows up to the end token, the first
    control token behind the content, and the space before it where the generation prompt leaves this to the
    model ("ASSISTANT:"); where the template marks answers by {% generation %}, what is marked.

    Attributes:
        takes_parts: whether the template takes contents as lists of parts, and not as texts.

    A token that covers both the last characters before an answer and the first of it (": (" may be one) is
    learnt, as it is generated in answering.

    Args:
        source: the template.
        tokenizer: of the model. Its post-processor is taken away: the template alone writes special tokens,
            and some post-processors shorten the offsets that labels are found by.
        special_tokens: by the name that the template calls them (`bos_token`, `eos_token`, ...).
        image_token: an added token of the tokenizer. Where the template takes lists of parts, it writes this
            token itself; otherwise parts are joined as text, the image token between them.

    Raises:
        ValueError: no Jinja; the image token is no token of its own; it cannot be told where an assistant's
            turn starts or ends, or it ends without a control token.
    """

    roles: tuple[str, ...] = ("system", "user", "assistant")

    def __init__(
        self, source: str, tokenizer: Tokenizer, special_tokens: Mapping[str, str], image_token: str
    ) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._tokenizer = tokenizer
        tokenizer.post_processor = None
        added = tokenizer.get_added_tokens_decoder()
        ids = {token.content: i for i, token in added.items()}
        if image_token not in ids:
            raise ValueError(
                f"the tokenizer would split the image token {image_token!r}: add it as a special token"
            )
        self.image_token, self._image_id = image_token, ids[image_token]
        self.takes_parts = self._takes_lists()
        text, spans, literals = self._probe()
        # Special ones, and those that the template writes though the tokenizer does not call them special.
        self._control = {
            i: token.content
            for i, token in added.items()
            if token.special
            or token.content == image_token
            or (token.content in text and not token.content.isspace())
        }
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)
        self.end_token, self._ending = self._find_ending(literals)
        self._check_generation(text, spans)
        self._marked = bool(spans)
        self._opening = "" if spans else self._find_opening(literals)
        self.end_token_id = ids[self.end_token]
        # Where dialogues begin with the token that begins a text, the tokenizer of the model puts it before
        # every text.
        bos = self._special_tokens.get("bos_token")
        self.start_ids = [ids[bos]] if bos in ids and text.startswith(bos) else []

    def write(self, turns: Sequence[Turn], add_generation_prompt: bool) -> Written:
        """Token ids of `turns`, one placeholder an image.

        Raises:
            ValueError: the template refuses the dialogue, leaves out or alters a content, or writes other
                than one placeholder an image; or a text holds a control token.
        """
        for number, turn in enumerate(turns):
            self._check_text(turn, number)
        contents = [self._units(turn) for turn in turns]
        text, marked = self._render(self._messages(turns, contents), add_generation_prompt)
        spans = self._answers(turns, contents, text, add_generation_prompt)
        if self._marked:
            fits = len(marked) == len(spans) and all(
                outer.start <= inner.start and inner.stop <= outer.stop
                for outer, inner in zip(marked, spans, strict=True)
            )
            if not fits:
                raise ValueError("the chat template does not mark every answer by {% generation %}")
            spans = marked
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        images = sum(part is None for turn in turns for part in turn.parts)
        if (written := encoding.ids.count(self._image_id)) != images:
            raise ValueError(
                f"the chat template wrote {self.image_token!r} {written} times for {images} images: "
                "give the token that it writes for an image as the image token"
            )
        return Written(encoding.ids, self._learnt(encoding, spans))

    @property
    def caption_end_id(self) -> int:
        """A newline, as LLaVA has it, and not the end of an answer."""
        ids: list[int] = self._tokenizer.encode("\n", add_special_tokens=False).ids
        if not ids:
            raise ValueError(
                'a caption of the form "plain" ends with a newline, which this tokenizer leaves out'
            )
        return ids[-1]

    def caption(self, text: str, number: int) -> list[int]:
        """A caption, message `number`, and the newline behind it.

        Raises:
            ValueError: it holds a control token.
        """
        self._check_text(Turn("assistant", (text,)), number)
        ids: list[int] = self._tokenizer.encode(f"{text}\n", add_special_tokens=False).ids
        return ids

    def _units(self, turn: Turn) -> list[str]:
        """The texts of a turn that the template places: each part, or all joined where it takes no lists."""
        if self.takes_parts:
            return [part for part in turn.parts if part is not None]
        return ["".join(self.image_token if part is None else part for part in turn.parts)]

    def _messages(self, turns: Sequence[Turn], contents: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """The turns as the template takes them, with `contents` for their texts."""
        messages = []
        for turn, units in zip(turns, contents, strict=True):
            content: str | list[dict[str, str]] = units[0] if not self.takes_parts else []
            if isinstance(content, list):
                texts = iter(units)
                for part in turn.parts:
                    image = {"type": "image", "image": ""}  # templates ask for the key, never for the value
                    content.append(image if part is None else {"type": "text", "text": next(texts)})
            messages.append({"role": turn.role, "content": content})
        return messages

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> tuple[str, list[Span]]:
        """What the template writes, and what of it stands in {% generation %}."""
        template = compile_template(self._source)  # cached there: a compiled one cannot go to other processes
        try:
            marked = template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template can raise anything
            raise ValueError(f"the chat template refuses the dialogue: {error}") from error
        text, spans, start = "", [], 0
        for piece in re.split(f"([{GENERATION_START}{GENERATION_END}])", marked):
            if piece == GENERATION_START:
                start = len(text)
            elif piece == GENERATION_END:
                spans.append(Span(start, len(text)))
            else:
                text += piece
        return text, spans

    def _skeleton(
        self, turns: Sequence[Turn], contents: Sequence[Sequence[str]], add_generation_prompt: bool
    ) -> tuple[list[str], list[int]]:
        """The template's own text before, between and after the units, and the units as they follow."""
        owners = [number for number, units in enumerate(contents) for _ in units]
        names = iter(range(len(owners)))
        sentinels = [[f"\ufdd2{next(names)}\ufdd3" for _ in units] for units in contents]
        text, _ = self._render(self._messages(turns, sentinels), add_generation_prompt)
        pieces = _SENTINEL.split(text)
        literals, order = pieces[::2], [int(name) for name in pieces[1::2]]
        for unit, owner in enumerate(owners):
            if order.count(unit) != 1:
                raise ValueError(
                    f"message {owner}: the chat template writes the content of this {turns[owner].role!r} "
                    f"message {order.count(unit)} times, expected once: give another template"
                )
        return literals, order

    def _answers(
        self,
        turns: Sequence[Turn],
        contents: Sequence[Sequence[str]],
        text: str,
        add_generation_prompt: bool,
    ) -> list[Span]:
        """Where the assistant's contents with their endings lie in `text`, one span a turn."""
        literals, order = self._skeleton(turns, contents, add_generation_prompt)
        units = list(chain.from_iterable(contents))
        places: dict[int, int] = {}  # of each unit in `order`
        spans: dict[int, Span] = {}
        end = len(literals[0])
        placed = text.startswith(literals[0])
        for place, (unit, literal) in enumerate(zip(order, literals[1:], strict=True)):
            start = end
            forms = (form for form in _trimmed(units[unit]) if text.startswith(form + literal, start))
            if not placed or (form := next(forms, None)) is None:
                placed = False
                break
            places[unit], spans[unit] = place, Span(start, start + len(form))
            end = start + len(form) + len(literal)
        if not placed or end != len(text):
            raise ValueError(
                "the chat template alters contents beyond trimming them, or what is around a blank one, so "
                "that it cannot be told what the assistant says: give another template"
            )
        answers, first = [], 0
        for number, (turn, own) in enumerate(zip(turns, contents, strict=True)):
            last = first + len(own) - 1
            if turn.role == "assistant":
                if not own:
                    raise ValueError(f"message {number}: an answer must hold text")
                together = [places[unit] - places[first] for unit in range(first, last + 1)]
                before, behind = literals[places[first]], literals[places[last] + 1]
                usual = before.endswith(self._opening) and behind.startswith(self._ending)
                if not usual or together != list(range(len(own))):
                    raise ValueError(
                        f"message {number}: the chat template does not put this answer between "
                        f"{self._opening!r} and {self._ending!r} as it does others: give another template"
                    )
                start, stop = spans[first].start, spans[last].stop
                answers.append(Span(start - len(self._opening), stop + len(self._ending)))
            first = last + 1
        return answers

    def _learnt(self, encoding: Encoding, spans: Sequence[Span]) -> list[bool]:
        """Which tokens have a character in a span. Control tokens may swallow spaces behind them: these count
        where they start."""
        learnt = []
        remaining = iter(spans)
        span = next(remaining, None)
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            while span is not None and span.stop <= start:
                span = next(remaining, None)
            position = start if token_id in self._control else max(start, stop - 1)
            learnt.append(span is not None and span.start <= position and start < span.stop)
        return learnt

    def _check_text(self, turn: Turn, number: int) -> None:
        """Raises ValueError where the texts of a turn hold control tokens: images apart, none may."""
        joined = "".join(self.image_token if part is None else part for part in turn.parts)
        if mark := _MARKS.search(joined):
            raise ValueError(
                f"message {number}: the text holds U+{ord(mark[0]):X}, which Unicode keeps from texts"
            )
        encoding = self._tokenizer.encode(joined, add_special_tokens=False)
        images = turn.parts.count(None)
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            name = self._control.get(token_id)
            if name is None or (token_id == self._unknown_id and joined[start:stop] != name):
                continue  # an unknown word is no control token, though it may share its id
            images -= name == self.image_token
            if name != self.image_token or images < 0:
                raise reserved_token_error(number, name)

    def _takes_lists(self) -> bool:
        """Whether the template takes contents as lists of parts: it writes the texts in their order, and an
        image where it stands or, as many do, before all texts."""
        self.takes_parts = True
        turn = Turn("user", ("\ufdd20\ufdd3", None, "\ufdd21\ufdd3"))
        try:
            text, _ = self._render(self._messages([turn], [self._units(turn)]), False)
        except ValueError:
            return False
        first, image, last = (text.find(part or self.image_token) for part in turn.parts)
        return -1 not in (first, image, last) and first < last

    def _probe(self) -> tuple[str, list[Span], list[str]]:
        """A dialogue of two rounds: its text, what {% generation %} marks of it, what is the template's."""
        turns = [Turn(role, (role,)) for role in ("user", "assistant") * 2]
        contents = [self._units(turn) for turn in turns]
        literals, order = self._skeleton(turns, contents, False)
        if order != [0, 1, 2, 3]:
            raise ValueError("the chat template does not write messages in their order: give another one")
        sentinels = [[f"\ufdd2{number}\ufdd3"] for number in range(4)]
        return *self._render(self._messages(turns, sentinels), False), literals

    def _find_ending(self, literals: Sequence[str]) -> tuple[str, str]:
        """The end token, and all that the template writes from the last character of an answer to its end."""
        between, after = literals[2], literals[4]
        # Of tokens that start at one place the longest is found, as the tokenizer does.
        names = sorted(self._control.values(), key=len, reverse=True)
        found = re.search("|".join(map(re.escape, names)), after)
        if found is None or not between.startswith(after[: found.end()]):
            raise ValueError(
                f"the chat template does not end every answer with a special token (it writes {between!r} "
                f"between rounds, {after!r} at the end), so that a model could not learn to stop: give "
                f"another template, as text or by name: {', '.join(shipped_templates())}"
            )
        return found[0], after[: found.end()]

    def _find_opening(self, literals: Sequence[str]) -> str:
        """The space between the generation prompt and an answer, which the model has to write."""
        turn = Turn("user", ("user",))
        prompt = self._skeleton([turn], [self._units(turn)], True)[0][-1]
        opening = literals[1].removeprefix(prompt)
        return opening if literals[1].startswith(prompt) and opening.isspace() else ""

    def _check_generation(self, text: str, spans: Sequence[Span]) -> None:
        """Raises ValueError where there is {% generation %} and it does not hold an answer and its ending."""
        answers = [f"\ufdd2{number}\ufdd3{self._ending}" for number in (1, 3)]
        if spans and not (
            len(spans) == 2
            and all(answer in text[slice(*span)] for answer, span in zip(answers, spans, strict=True))
        ):
            raise ValueError(
                f"{{% generation %}} of the chat template must hold every answer and its ending "
                f"{self._ending!r}, and holds {[_SENTINEL.sub('...', text[slice(*span)]) for span in spans]}"
            )


def _trimmed(content: str) -> list[str]:
    """What a template may make of a content, most of it first; `| trim` and stripping newlines are common."""
    return [
        content,
        content.lstrip("\n"),
        content.rstrip("\n"),
        content.strip("\n"),
        content.lstrip(),
        content.rstrip(),
        content.strip(),
    ]

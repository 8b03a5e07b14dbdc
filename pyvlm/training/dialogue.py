"""Dialogues about images whose answers are known: the bundled data, and what accuracy is measured on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

MAX_IMAGES = 9
Split = Literal["train", "test"]
Kind = TypeVar("Kind", bound=str)


@dataclass(frozen=True)
class Round:
    """One question, its answer of one word, and the working that the assistant says before it.

    Saying what it reads before what follows from it makes each word a small step. On digits, one run each of
    about five minutes of one core: 71 % right with bare answers, 86 % with a first form of these.
    """

    kind: str
    question: str
    answer: str
    working: str = ""

    @property
    def reply(self) -> str:
        """All that the assistant says."""
        return f"{self.working} {self.answer}".strip()


@dataclass(frozen=True)
class Dialogue:
    """Images, [h, w] floating in [0, 1] or [h, w, 3] uint8, what each of them shows, and what is asked."""

    images: Sequence[np.ndarray]
    shown: tuple[int | str, ...]
    rounds: tuple[Round, ...]


def draw_rounds(
    questions: Mapping[Kind, float],
    counts: tuple[int, int],
    ask: Callable[[Kind], Round | None],
    rng: np.random.Generator,
) -> tuple[Round, ...]:
    """The rounds of a dialogue.

    Args:
        questions: how often each kind is asked, relative to the others.
        counts: fewest and most rounds.
        ask: makes a round of a kind, or None where its question has no single answer: then another is drawn.
        rng: draws how many, and their kinds.
    """
    kinds = [kind for kind, weight in questions.items() if weight]
    shares = np.array([questions[kind] for kind in kinds])
    wanted = int(rng.integers(counts[0], counts[1] + 1))
    rounds: list[Round] = []
    while len(rounds) < wanted:
        asked = ask(kinds[rng.choice(len(kinds), p=shares / shares.sum())])
        if asked is not None:
            rounds.append(asked)
    return tuple(rounds)


def check_counts(**counts: tuple[int, int]) -> None:
    """Raises ValueError where a pair of fewest and most is in the other order."""
    for name, (low, high) in counts.items():
        if low > high:
            raise ValueError(f"{name} {[low, high]}: give the fewest first, then the most")

"""Dialogues about several images of handwritten digits, made on the fly from scikit-learn's real 8×8 digits.

Sample i of step s is a pure function of (seed, s, i): whoever resumes at step s needs no other state.
The split is by order, as the digits were collected, so that the writers of the test part are not in the
training part.

Shapes: N images, P random numbers an image.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from pyvlm.models.config import Config
from pyvlm.training.augmentation import NUMBERS_PER_IMAGE, augment
from pyvlm.training.dialogue import MAX_IMAGES, Dialogue, Round, Split, check_counts, draw_rounds

IMAGE_SIZE = 8
TRAIN_FRACTION = 0.8
Kind = Literal["which", "sum", "largest", "count"]


# Each maker gives a round, or None where its question has no single answer for these digits.


def _which(digits: Sequence[int], rng: np.random.Generator) -> Round | None:
    i = int(rng.integers(len(digits)))
    return Round("which", f"which digit is in image {i + 1}?", str(digits[i]))


def _sum(digits: Sequence[int], rng: np.random.Generator) -> Round | None:
    if len(digits) < 2:
        return None
    i, j = sorted(rng.choice(len(digits), 2, replace=False))
    question = f"what is the sum of images {i + 1} and {j + 1}?"
    return Round("sum", question, str(digits[i] + digits[j]), f"{digits[i]} + {digits[j]} =")


def _largest(digits: Sequence[int], rng: np.random.Generator) -> Round | None:
    if len(digits) < 2 or digits.count(max(digits)) > 1:
        return None  # of two equal digits neither is the largest
    working = f"{' '.join(map(str, digits))}: {max(digits)} in image"
    return Round(
        "largest", "which image shows the largest digit?", str(digits.index(max(digits)) + 1), working
    )


def _count(digits: Sequence[int], rng: np.random.Generator) -> Round | None:
    # A digit drawn blindly is in few images, and "0" would be right too often.
    digit = int(rng.choice(digits)) if rng.random() < 0.75 else int(rng.integers(10))
    # Each image's digit beside the one asked for, and how many there were so far.
    matches = [
        f"{d} = {digit} {'yes' if d == digit else 'no'} {digits[:i].count(digit)}"
        for i, d in enumerate(digits, start=1)
    ]
    return Round(
        "count",
        f"how many images show a {digit}?",
        str(digits.count(digit)),
        " ".join(matches) + ":",
    )


QUESTIONS: dict[Kind, Callable[[Sequence[int], np.random.Generator], Round | None]] = {
    "which": _which,
    "sum": _sum,
    "largest": _largest,
    "count": _count,
}

Count = Annotated[int, Field(ge=1)]


class DigitsConfig(Config):
    """What dialogues look like.

    Attributes:
        images: fewest and most images of a dialogue.
        rounds: fewest and most questions of a dialogue.
        questions: how often each kind is asked, relative to the others.
        repeat: chance that an image shows the digit of an earlier one, so that counts above 1 are common.
        augment: strength of the random distortions of the images; 0: none.
    """

    source: Literal["digits"] = "digits"
    images: tuple[Count, Count] = (2, 4)
    rounds: tuple[Count, Count] = (3, 5)
    questions: dict[Kind, Annotated[float, Field(ge=0)]] = Field(default=dict.fromkeys(QUESTIONS, 1.0))
    repeat: Annotated[float, Field(ge=0, le=1)] = 0.25
    augment: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _possible(self) -> "DigitsConfig":
        check_counts(images=self.images, rounds=self.rounds)
        if self.images[1] > MAX_IMAGES:
            raise ValueError(f"images {list(self.images)}: a dialogue has at most {MAX_IMAGES}")
        # What can be asked about any digits: a sum takes two images, and equal digits have no largest.
        always: tuple[Kind, ...] = ("which", "sum", "count") if self.images[0] > 1 else ("which", "count")
        if not any(self.questions.get(kind) for kind in always):
            raise ValueError(
                f"questions {self.questions}: some dialogues could ask none; give which or count a weight"
            )
        return self


@cache
def load_split(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The first 80 % of scikit-learn's digits or the last 20 %.

    Returns:
        float32 images [N, 8, 8] in [0, 1], and labels [N].
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    boundary = int(TRAIN_FRACTION * len(digits.target))
    part = slice(boundary) if split == "train" else slice(boundary, None)
    return (digits.images[part] / 16).astype(np.float32), digits.target[part]


@cache
def _indices_by_digit(split: Split) -> tuple[np.ndarray, ...]:
    labels = load_split(split)[1]
    return tuple(np.flatnonzero(labels == digit) for digit in range(10))


class DigitDialogues:
    """An endless source of dialogues.

    Args:
        split: whose digits.
        config: what the dialogues look like.
        seed: together with a step and an index it determines a dialogue.
    """

    def __init__(self, split: Split, config: DigitsConfig, seed: int) -> None:
        self.split, self.config, self.seed = split, config, seed

    def batch(self, step: int, indices: Sequence[int]) -> list[Dialogue]:
        """The dialogues of these indices of a step, images distorted as `config.augment` says."""
        sketches = [self._sketch(step, index) for index in indices]
        images_Nhw = load_split(self.split)[0][np.concatenate([sketch[0] for sketch in sketches])]
        if self.config.augment:
            noise_NP = torch.from_numpy(np.concatenate([sketch[3] for sketch in sketches]))
            images_Nhw = augment(torch.from_numpy(images_Nhw), noise_NP, self.config.augment).numpy()
        ends = np.cumsum([len(sketch[0]) for sketch in sketches])
        images = np.split(images_Nhw, ends[:-1])
        return [
            Dialogue(list(images[i]), digits, rounds) for i, (_, digits, rounds, _) in enumerate(sketches)
        ]

    def _sketch(
        self, step: int, index: int
    ) -> tuple[list[int], tuple[int, ...], tuple[Round, ...], np.ndarray]:
        """Which images, their digits, the rounds, and the random numbers that distort the images."""
        rng = np.random.default_rng([self.seed, step, index, self.split == "test"])
        digits: list[int] = []
        for _ in range(rng.integers(self.config.images[0], self.config.images[1] + 1)):
            repeats = digits and rng.random() < self.config.repeat
            digits.append(int(rng.choice(digits) if repeats else rng.integers(10)))
        chosen = [int(rng.choice(_indices_by_digit(self.split)[digit])) for digit in digits]
        rounds = draw_rounds(
            self.config.questions, self.config.rounds, lambda kind: QUESTIONS[kind](digits, rng), rng
        )
        noise_NP = rng.standard_normal((len(digits), NUMBERS_PER_IMAGE), dtype=np.float32)
        return chosen, tuple(digits), rounds, noise_NP


def vocabulary() -> list[str]:
    """Texts that hold every word of these dialogues."""
    rng = np.random.default_rng(0)
    asked = [make((1, 2), rng) for make in QUESTIONS.values()]
    matches = "yes no"  # whichever of the two did not come up
    numbers = [str(i) for i in range(19)]  # digits, image numbers, counts and sums
    return [*(f"{r.question} {r.reply}" for r in asked if r is not None), matches, *numbers]

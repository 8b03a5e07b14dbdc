"""Dialogues about crops of the photographs that scikit-learn and scikit-image bring along, made on the fly.

Sample i of step s is a pure function of (seed, s, i), as in `pyvlm.training.digits`. Both splits show the
same few photographs in different crops: what they measure is whether training works, not whether a model
knows the world.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from pyvlm.models.config import Config
from pyvlm.training.dialogue import MAX_IMAGES, Dialogue, Round, Split, check_counts, draw_rounds

LONGEST_SIDE = 192  # of a photograph before it is cropped: models of the bundled data see a few dozen pixels
Kind = Literal["what", "where", "upright", "count"]


@cache
def photographs() -> dict[str, np.ndarray]:
    """The word for each photograph, and its pixels, uint8 [h, w, 3]."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    temple, flower = load_sample_images().images
    pictures = {
        "astronaut": data.astronaut(),
        "cat": data.chelsea(),
        "clock": data.clock(),
        "coffee": data.coffee(),
        "coins": data.coins(),
        "flower": flower,
        "galaxies": data.hubble_deep_field(),
        "man": data.camera(),
        "moon": data.moon(),
        "rocket": data.rocket(),
        "temple": temple,
        "text": data.page(),
    }
    return {word: _shrink(picture) for word, picture in pictures.items()}


def _shrink(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture).convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BOX)
    return np.asarray(image)


# Each maker gives a round, or None where its question has no single answer for these images.


def _what(words: Sequence[str], upright: Sequence[bool], rng: np.random.Generator) -> Round | None:
    i = int(rng.integers(len(words)))
    return Round("what", f"what is in image {i + 1}?", words[i])


def _where(words: Sequence[str], upright: Sequence[bool], rng: np.random.Generator) -> Round | None:
    i = int(rng.integers(len(words)))
    if len(words) < 2 or words.count(words[i]) > 1:
        return None
    return Round("where", f"which image shows the {words[i]}?", str(i + 1))


def _upright(words: Sequence[str], upright: Sequence[bool], rng: np.random.Generator) -> Round | None:
    i = int(rng.integers(len(words)))
    return Round("upright", f"is image {i + 1} upright?", "yes" if upright[i] else "no")


def _count(words: Sequence[str], upright: Sequence[bool], rng: np.random.Generator) -> Round | None:
    word = str(rng.choice(list(words)))
    return Round("count", f"how many images show the {word}?", str(words.count(word)))


QUESTIONS: dict[Kind, Callable[[Sequence[str], Sequence[bool], np.random.Generator], Round | None]] = {
    "what": _what,
    "where": _where,
    "upright": _upright,
    "count": _count,
}

Count = Annotated[int, Field(ge=1, le=MAX_IMAGES)]


class PhotosConfig(Config):
    """What dialogues look like.

    Attributes:
        images: fewest and most images of a dialogue.
        rounds: fewest and most questions of a dialogue.
        questions: how often each kind is asked, relative to the others.
        crop: smallest share of a photograph's height, and of its width, that a crop keeps.
        upside_down: share of the crops that are turned upside down.
    """

    source: Literal["photos"] = "photos"
    images: tuple[Count, Count] = (1, 1)
    rounds: tuple[Count, Count] = (1, 2)
    questions: dict[Kind, Annotated[float, Field(ge=0)]] = Field(default={"what": 1.0})
    crop: Annotated[float, Field(gt=0, le=1)] = 0.6
    upside_down: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _possible(self) -> "PhotosConfig":
        check_counts(images=self.images, rounds=self.rounds)
        if not any(weight for kind, weight in self.questions.items() if kind != "where"):
            raise ValueError(
                f"questions {self.questions}: some dialogues could ask none; give what, upright or count "
                "a weight"
            )
        return self


class PhotoDialogues:
    """An endless source of dialogues.

    Args:
        split: whose crops.
        config: what the dialogues look like.
        seed: together with a step and an index it determines a dialogue.
    """

    def __init__(self, split: Split, config: PhotosConfig, seed: int) -> None:
        self.split, self.config, self.seed = split, config, seed

    def batch(self, step: int, indices: Sequence[int]) -> list[Dialogue]:
        """The dialogues of these indices of a step."""
        return [self._dialogue(step, index) for index in indices]

    def _dialogue(self, step: int, index: int) -> Dialogue:
        rng = np.random.default_rng([self.seed, step, index, self.split == "test", 1])
        config, pictures = self.config, photographs()
        count = int(rng.integers(config.images[0], config.images[1] + 1))
        words = [str(word) for word in rng.choice(list(pictures), count)]
        upright = [bool(rng.random() >= config.upside_down) for _ in words]
        images = [
            self._crop(pictures[word], stands, rng) for word, stands in zip(words, upright, strict=True)
        ]
        rounds = draw_rounds(
            config.questions, config.rounds, lambda kind: QUESTIONS[kind](words, upright, rng), rng
        )
        return Dialogue(images, tuple(words), rounds)

    def _crop(self, picture: np.ndarray, upright: bool, rng: np.random.Generator) -> np.ndarray:
        sides = []
        for side in picture.shape[:2]:
            kept = int(np.ceil(side * rng.uniform(self.config.crop, 1)))
            first = int(rng.integers(side - kept + 1))
            sides.append(slice(first, first + kept))
        crop = picture[sides[0], sides[1]]
        return np.ascontiguousarray(crop if upright else crop[::-1])


def vocabulary() -> list[str]:
    """Texts that hold every word of these dialogues."""
    rng = np.random.default_rng(0)
    words = list(photographs())
    asked = [make(words[:2], [True, False], rng) for make in QUESTIONS.values()]
    numbers = [str(i) for i in range(MAX_IMAGES + 1)]
    return [*(f"{r.question} {r.reply}" for r in asked if r is not None), *words, "yes no", *numbers]

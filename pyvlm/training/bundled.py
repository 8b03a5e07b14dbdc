"""The dialogues that pyvlm brings along: one entry a `source`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from pyvlm.models.processor import word_level_tokenizer
from pyvlm.training import digits, photos
from pyvlm.training.conversation import introductions
from pyvlm.training.dialogue import MAX_IMAGES, Dialogue, Split
from pyvlm.training.digits import DigitDialogues, DigitsConfig
from pyvlm.training.photos import PhotoDialogues, PhotosConfig

Bundled = DigitsConfig | PhotosConfig
VOCABULARIES: Mapping[str, Callable[[], list[str]]] = {
    "digits": digits.vocabulary,
    "photos": photos.vocabulary,
}


class Dialogues(Protocol):
    """An endless source: the dialogues of some indices of a step."""

    def batch(self, step: int, indices: Sequence[int]) -> list[Dialogue]: ...


def bundled_dialogues(split: Split, config: Bundled, seed: int) -> Dialogues:
    """The source of a configuration."""
    if isinstance(config, PhotosConfig):
        return PhotoDialogues(split, config, seed)
    return DigitDialogues(split, config, seed)


def words_of(sources: Iterable[str]) -> Tokenizer:
    """A tokenizer whose vocabulary is the words of the bundled sources among `sources`."""
    texts = list(introductions(MAX_IMAGES))
    for source in sorted(set(sources) & set(VOCABULARIES)):
        texts += VOCABULARIES[source]()
    return word_level_tokenizer(texts)

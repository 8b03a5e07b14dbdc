"""From a stage's `data` to encoded samples.

Like `pyvlm.data.source.Source`, everything here is a pure function of seed, step and index.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Discriminator, Tag

from pyvlm._tell import tell
from pyvlm.data.files import FilesConfig, FilesSource
from pyvlm.data.source import Source
from pyvlm.models.processor import Processor, Sample
from pyvlm.models.speaker import Messages
from pyvlm.training.bundled import Dialogues, bundled_dialogues
from pyvlm.training.conversation import dialogue_messages
from pyvlm.training.dialogue import Split
from pyvlm.training.digits import DigitsConfig
from pyvlm.training.photos import PhotosConfig


def _kind(given: Any) -> str:
    """The `source` of a configuration or of what it is made from; digits where it is left out."""
    return str(given.get("source", "digits") if isinstance(given, Mapping) else given.source)


# The `data` of a stage.
Data = Annotated[
    Annotated[DigitsConfig, Tag("digits")]
    | Annotated[PhotosConfig, Tag("photos")]
    | Annotated[FilesConfig, Tag("files")],
    Discriminator(_kind),
]


class SampleSource(Protocol):
    """What the trainer asks for; a source that packs or truncates samples gives them itself."""

    @property
    def epoch_size(self) -> int | None:
        """Samples of one pass over the data; None: it has no end."""
        ...

    def samples(self, step: int, indices: Sequence[int]) -> list[Sample]:
        """One sample an index; steps count from 0 in each stage."""
        ...


class Encoded:
    """The samples of a source of conversations, one each.

    Args:
        source: gives the conversations.
        processor: encodes them.
        epoch_size: see `SampleSource`.
    """

    def __init__(self, source: Source, processor: Processor, epoch_size: int | None = None) -> None:
        self.source, self.processor, self.epoch_size = source, processor, epoch_size

    def samples(self, step: int, indices: Sequence[int]) -> list[Sample]:
        return [self.processor.encode(messages) for messages in self.source.batch(step, indices)]


class DialogueSource:
    """Bundled dialogues as conversations.

    Args:
        dialogues: gives the dialogues.
        first_step: steps of the stages before. Dialogues are numbered through a run, so that two stages of
            the same kind do not see the same ones.
    """

    def __init__(self, dialogues: Dialogues, first_step: int = 0) -> None:
        self.dialogues, self.first_step = dialogues, first_step

    def batch(self, step: int, indices: Sequence[int]) -> list[Messages]:
        drawn = self.dialogues.batch(self.first_step + step + 1, indices)
        return [dialogue_messages(dialogue) for dialogue in drawn]


def make_source(
    data: Data,
    split: Split,
    seed: int,
    processor: Processor,
    *,
    batch_size: int,
    first_step: int = 0,
    tell: Callable[[str], None] = tell,
    cache: Path | None = None,
) -> SampleSource:
    """The samples that a `data` entry describes.

    Args:
        data: of a stage or of the evaluation.
        split: the training part or the held-out one.
        seed: of the recipe.
        processor: encodes conversations.
        batch_size: samples a step, for sources that plan whole epochs.
        first_step: steps of the stages before, for sources without end.
        tell: is told of records that are left out.
        cache: the folder that keeps lengths of files, see `FilesSource`.

    Raises:
        ValueError: the data cannot be read; the message says what is wrong with them.
    """
    if isinstance(data, FilesConfig):
        return FilesSource(data, processor, seed, batch_size, tell, cache)
    return Encoded(DialogueSource(bundled_dialogues(split, data, seed), first_step), processor)

"""Data files as a source of training: read, checked, measured, blended, packed and put in order.

All of it is decided by (config, seed): which samples share a dialogue or a row is drawn once, and their order
anew for each epoch. Nothing depends on what was asked for before.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from pyvlm._tell import tell
from pyvlm.data.bad_records import Report
from pyvlm.data.blending import blend, can_blend, introduce_images
from pyvlm.data.lengths import Arrays, digest, identity, remember, scan_from_arrays, scan_to_arrays
from pyvlm.data.packing import encode, measure, pack_samples
from pyvlm.data.plans import draw, group_by_length, plan_blends, plan_packs
from pyvlm.data.readers import RecordFile
from pyvlm.data.records import Format
from pyvlm.data.scan import Scan, scan
from pyvlm.models.config import Config
from pyvlm.models.processor import Processor, Sample
from pyvlm.models.speaker import Messages

Count = Annotated[int, Field(ge=1)]


class DataFile(Config):
    """One of several files.

    Attributes:
        path: see `pyvlm.data.readers.RecordFile`.
        images: the folder that its image paths are relative to; None: `FilesConfig.images`.
        weight: how often each of its samples comes in an epoch: 2 is twice, 0.5 every other epoch.
    """

    path: str
    images: str | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class BlendConfig(Config):
    """Dialogues of several images out of samples of one; see `pyvlm.data.blending`.

    Attributes:
        most: samples a dialogue; each count from 1 on is as likely.
    """

    most: Annotated[int, Field(ge=2)] = 3


class FilesConfig(Config):
    """Conversations in files.

    Attributes:
        path: a file or folder (see `pyvlm.data.readers.RecordFile`), or several, each by its path or as a
            `DataFile` with a weight. A recipe may leave it to whoever runs it.
        images: the folder that image paths are relative to; None: the one that the file lies in.
        format: of the records; "auto": by their keys.
        max_length: tokens that a sample is cut to, never within an image; None: it is as long as it is.
        group_by_length: batches of samples of like length, with images or without; saves padding.
        packing: fill rows of max_length with samples that do not see each other; a sample is then a row.
        bad_records: whether a record that is no conversation is left out and reported, or an error.
        shuffle: anew in each epoch; without it the records come in their order.
        blend: makes dialogues of several images out of samples of one.
        image_words: written before each image, {n} its number, as "Image {n}:"; None: nothing.
        cache: a folder that keeps the samples' lengths between runs (see `pyvlm.data.lengths`); None: the run
            folder does, for this run alone.
    """

    source: Literal["files"] = "files"
    path: str | Annotated[list[str | DataFile], Field(min_length=1)] | None = None
    images: str | None = None
    format: Format = "auto"
    max_length: Count | None = None
    group_by_length: bool = False
    packing: bool = False
    bad_records: Literal["skip", "error"] = "error"
    shuffle: bool = True
    blend: BlendConfig | None = None
    image_words: str | None = None
    cache: str | None = None

    @property
    def files(self) -> list[DataFile]:
        """One entry a file, each with its folder of images where one is given."""
        if self.path is None:
            raise ValueError(
                "the data are to be read from files, and no path is given: --data PATH gives one"
            )
        paths = [self.path] if isinstance(self.path, str) else self.path
        files = [DataFile(path=file) if isinstance(file, str) else file for file in paths]
        return [file.model_copy(update={"images": file.images or self.images}) for file in files]

    @field_validator("image_words")
    @classmethod
    def _words_are_some(cls, words: str | None) -> str | None:
        if words is not None and not words.strip():
            raise ValueError('give the words before an image, as "Image {n}:", or leave it out')
        return words

    @model_validator(mode="after")
    def _consistent(self) -> "FilesConfig":
        if self.packing and self.max_length is None:
            raise ValueError("packing fills rows of max_length tokens: give max_length")
        if self.packing and self.group_by_length:
            raise ValueError(
                "packing makes rows of one length, which leaves group_by_length nothing to group"
            )
        if not self.shuffle and (self.packing or self.group_by_length or self.blend is not None):
            raise ValueError(
                "packing, group_by_length and blend draw an order of their own: they need shuffle"
            )
        return self


@dataclass(frozen=True, slots=True)
class _Item:
    """A sample of an epoch: the records of each of its conversations, which are several where packed."""

    conversations: tuple[tuple[int, ...], ...]
    length: int
    has_image: bool


class FilesSource:
    """The conversations of `FilesConfig` as samples; see `pyvlm.data.source.Source`.

    Sample i of step s is number s · batch_size + i of an endless sequence of epochs. All records are read
    once at the start, to check and measure them, unless a cache has what was found before.

    Args:
        config: which files, and what becomes of them.
        processor: encodes the conversations.
        seed: of every order and choice.
        batch_size: samples a step, over all processes.
        tell: is told of the records that are left out.
        cache: the folder that keeps lengths where the config names none; None: no folder does.

    Raises:
        ValueError: a file cannot be read or holds nothing to learn from, or has bad records and
            `bad_records` is "error"; the message names them.
    """

    def __init__(
        self,
        config: FilesConfig,
        processor: Processor,
        seed: int,
        batch_size: int,
        tell: Callable[[str], None] = tell,
        cache: Path | None = None,
    ) -> None:
        if config.image_words is not None and processor.config.image_words is not None:
            raise ValueError(
                f"image_words are given twice: {config.image_words!r} of the data and "
                f"{processor.config.image_words!r} of the model; leave out one"
            )
        self.config, self.processor, self.seed, self.batch_size = config, processor, seed, batch_size
        self.cache = cache if config.cache is None else Path(config.cache)
        self.tell = tell
        self.files = [RecordFile(file.path, file.images, config.format) for file in config.files]
        self.weights = [file.weight for file in config.files]
        self.reports: list[Report] = []
        self._items: list[list[_Item]] = []
        for number, file in enumerate(self.files):
            found = scan_from_arrays(self._remember(file, {}, partial(self._scan, file)))
            self.reports.append(found.report)
            _judge(found.report, config.bad_records, tell)
            self._items.append(list(self._plan(number, found)))
        self._drawn = [max(1, round(w * len(i))) for w, i in zip(self.weights, self._items, strict=True)]
        self._order = lru_cache(maxsize=2)(self._plan_epoch)  # an epoch ends in one step and the next begins

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch: each of a file's `weight` times; with packing, rows."""
        return sum(self._drawn)

    def batch(self, step: int, indices: Sequence[int]) -> list[Messages]:
        """The conversations of these indices of a step; with packing, all of their rows one after another."""
        found = self._find(step, indices)
        return [self._conversation(file, records) for file, item in found for records in item.conversations]

    def samples(self, step: int, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices of a step, encoded, cut and packed.

        Raises:
            ValueError: an image cannot be decoded; the message names it and its record.
        """
        samples = []
        for file, item in self._find(step, indices):
            encoded = [self._sample(file, records) for records in item.conversations]
            samples.append(pack_samples(encoded) if self.config.packing else encoded[0])
        return samples

    def _find(self, step: int, indices: Sequence[int]) -> list[tuple[int, _Item]]:
        """File and item of each sample."""
        found = []
        for index in indices:
            epoch, place = divmod(step * self.batch_size + index, self.epoch_size)
            file, number = self._order(epoch)[place].tolist()
            found.append((file, self._items[file][number]))
        return found

    def _plan_epoch(self, epoch: int) -> np.ndarray:
        """File and number of each item of an epoch: int64 [epoch_size, 2]."""
        drawn = []
        for file, (items, count) in enumerate(zip(self._items, self._drawn, strict=True)):
            numbers = draw(epoch * count, count, len(items), (self.seed, file), self.config.shuffle)
            drawn.append(np.stack([np.full_like(numbers, file), numbers], axis=1))
        order = np.concatenate(drawn)
        if not self.config.shuffle:
            return order
        rng = np.random.default_rng([self.seed, len(self.files), epoch])
        if not self.config.group_by_length:
            return order[rng.permutation(len(order))]
        items = [self._items[file][number] for file, number in order.tolist()]
        lengths = np.array([item.length for item in items])
        has_image = np.array([item.has_image for item in items])
        phase = -epoch * len(order) % self.batch_size
        return order[group_by_length(lengths, has_image, self.batch_size, phase, rng)]

    def _plan(self, file: int, found: Scan) -> Iterator[_Item]:
        """The items of a file: groups of records that make a conversation, and packs of such groups."""
        groups = [[i] for i in range(len(found.kept))]
        if self.config.blend is not None:
            most, limit = self.config.blend.most, self.config.max_length
            groups = plan_blends(found.lengths.tolist(), found.passed, most, limit, self.seed)
        records = [tuple(found.kept[members].tolist()) for members in groups]
        sizes = [int(found.lengths[members[0]]) for members in groups]
        if self.config.blend is not None:
            drawn = {"most": self.config.blend.most, "seed": self.seed}
            blended = self._remember(
                self.files[file], drawn, lambda: {"sizes": self._blended_sizes(file, records, sizes)}
            )
            sizes = blended["sizes"].tolist()
        packs = [[g] for g in range(len(groups))]
        if self.config.packing:
            assert self.config.max_length is not None
            packs = plan_packs(sizes, self.config.max_length, self.seed)
        for pack in packs:
            shows = any(found.images[i] for g in pack for i in groups[g])
            yield _Item(tuple(records[g] for g in pack), sum(sizes[g] for g in pack), shows)

    def _blended_sizes(
        self, file: int, records: Sequence[tuple[int, ...]], alone: Sequence[int]
    ) -> np.ndarray:
        """Of blended groups: templates and numbers make a whole longer or shorter than its parts."""
        return np.array(
            [
                size if len(members) == 1 else self._measure(self._conversation(file, members))
                for members, size in zip(records, alone, strict=True)
            ]
        )

    def _scan(self, file: RecordFile) -> Arrays:
        return scan_to_arrays(scan(file, lambda messages: self._measure(self._worded(messages)), can_blend))

    def _remember(self, file: RecordFile, drawn: dict[str, Any], find: Callable[[], Arrays]) -> Arrays:
        """What `find` gives, from the cache where there is one; `drawn` is what it depends on beside all that
        a scan does."""

        def key() -> str:
            return digest(
                self.processor,
                files=identity(file.path),
                images=str(file.images.absolute()),
                format=self.config.format,
                max_length=self.config.max_length,
                image_words=self.config.image_words,
                drawn=drawn,
            )

        return remember(self.cache, key, find, self.tell)

    def _conversation(self, file: int, records: Sequence[int]) -> Messages:
        return self._worded(blend([self.files[file][record].messages for record in records]))

    def _worded(self, messages: Messages) -> Messages:
        words = self.config.image_words
        return messages if words is None else introduce_images(messages, words)

    def _measure(self, messages: Messages) -> int:
        return measure(self.processor, messages, self.config.max_length)

    def _sample(self, file: int, records: Sequence[int]) -> Sample:
        try:
            return encode(self.processor, self._conversation(file, records), self.config.max_length)
        except ValueError as error:
            where = " and ".join(self.files[file].place(record) for record in records)
            raise ValueError(f"{self.files[file].path}, {where}: {error}") from error


def _judge(report: Report, bad_records: str, tell: Callable[[str], None]) -> None:
    """Raises or tells of the bad records of a file."""
    if report.skipped == report.total:
        raise ValueError(f"{report.summary('bad')}: there is nothing to learn from")
    if report.skipped and bad_records == "error":
        raise ValueError(f"{report.summary('bad')}; mend them, or leave them out with bad_records: skip")
    if report.skipped:
        tell(report.summary())

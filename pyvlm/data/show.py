"""`pyvlm data`: what becomes of one record, token by token, and what a whole file holds."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from pyvlm.data.records import Record, parts_of
from pyvlm.data.scan import Scan
from pyvlm.layout import AttentionSpans, TokenLayout
from pyvlm.models.config import VLMConfig
from pyvlm.models.inputs import default_layout
from pyvlm.models.positions import position_ids
from pyvlm.models.processor import IGNORED, Processor, Sample
from pyvlm.models.speaker import Messages
from pyvlm.plotting import count_pairs
from pyvlm.spans import EVERY_CLASS, IMAGE, TEXT

SIDE = 48  # cells of a mask in text: a row fits a terminal of 80
BINS = 8
BAR = 40
MARKS = np.array([".", "1", "2", "+"])
RANGE_NAMES = {EVERY_CLASS: "", 1 << TEXT: "text ", 1 << IMAGE: "image "}


def format_conversation(record: Record) -> str:
    """Where a record stands, and its turns, images by their paths or sizes."""
    lines = [record.where]
    for message in record.messages:
        lines += ["", f"{message['role']}:"]
        lines += [f"  {line}" for part in parts_of([message]) for line in _shown(part).splitlines()]
    return "\n".join(lines)


def format_sample(sample: Sample, layout: TokenLayout, config: VLMConfig, processor: Processor) -> str:
    """A table of tokens, one line each and one an image, and the mask of the attention rule.

    Args:
        sample: of `Processor.encode`, or packed.
        layout: of `sample_layout`.
    """
    spans = spans_of(layout, config)
    positions = position_ids(layout, config.position_scheme, [config.token_grids])[0].tolist()
    rows = [("place", "id", "text", "label", "kind", "position", "sees")]
    for start, stop in _runs(layout):
        last = stop - 1
        image = int(layout.image[0, start])
        token = processor.tokenizer.id_to_token(int(sample["input_ids"][start])) or "?"
        label = int(sample["labels"][start])
        rows.append(
            (
                _span(start, last),
                str(int(sample["input_ids"][start])),
                token if stop - start == 1 else f"{token} ×{stop - start}",  # noqa: RUF001
                "·" if label == IGNORED else str(label),
                "text" if image < 0 else f"image {image + 1}",
                _span(positions[start], positions[last]),
                " … ".join(dict.fromkeys(_sees(spans, i) for i in (start, last))),
            )
        )
    learnt = int((sample["labels"][1:] != IGNORED).sum())
    title = (
        f"{len(sample['input_ids'])} tokens, {learnt} of them learnt, {int(layout.image.max()) + 1} images"
    )
    rule = config.language.attention_rule
    return "\n".join([title, "", *_table(rows), "", f"mask of rule {rule}:", "", *draw_mask(spans)])


def sample_layout(sample: Sample, config: VLMConfig) -> TokenLayout:
    """The layout of one sample as `VLM.forward` makes it."""
    rows = {name: sample[name][None] for name in ("input_ids", "labels", "documents") if name in sample}
    return default_layout(config, **rows, image_sizes=sample.get("image_sizes"))


def spans_of(layout: TokenLayout, config: VLMConfig) -> AttentionSpans:
    """What each token sees in the layers that have the language model's window, where it has one."""
    return layout.spans(config.language.attention_rule, config.language.window)


def draw_mask(spans: AttentionSpans, side: int = SIDE) -> Iterator[str]:
    """The first row's mask as lines of text, queries down and keys across, in at most side × side cells."""
    queries, keys = spans.bounds.shape[1], spans.key_class.shape[1]
    cell = -(-max(queries, keys) // side)
    first, second, both = count_pairs(spans, 0, cell, cell) > 0
    cells = np.where(both | (first & second), 3, np.where(second, 2, first.astype(int)))
    yield from ("".join(row) for row in MARKS[cells])
    yield ""
    names = [
        f"{mark} {RANGE_NAMES.get(mask, '')}keys"
        for mark, mask in zip("12", spans.range_classes, strict=False)
    ]
    if len(names) == 2:
        names.append("+ both")
    size = f"; a cell is {cell} by {cell} tokens" if cell > 1 else ""
    yield f"seen: {', '.join(names)}; . nothing{size}"


def save_mask(spans: AttentionSpans, path: str | os.PathLike[str]) -> None:
    """Writes the first row's mask as a picture."""
    figure: Any = spans.plot().figure
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be written ({error})") from error


def count_words(messages: Messages) -> int:
    """Words of a conversation: its length for those who have no tokenizer."""
    return sum(len(part["text"].split()) for part in parts_of(messages) if part["type"] == "text")


def format_scan(found: Scan, unit: str) -> str:
    """What a file holds: counts, a histogram of lengths in `unit`, and its bad records."""
    report = found.report
    lines = [f"{report.name}: {report.total:,} records, {len(found.kept):,} of them good"]
    if len(found.kept):
        without = int((found.images == 0).sum())
        lines += [
            f"turns: {_spread(found.turns)}",
            f"images: {_spread(found.images)}; {without:,} records have none",
            f"{unit}: {_spread(found.lengths)}",
            "",
            *_histogram(found.lengths),
        ]
    return "\n".join([*lines, "", report.summary("bad")])


def _shown(part: dict[str, Any]) -> str:
    if part["type"] == "text":
        return part["text"]
    image = part["image"]
    what = f"{image.width} by {image.height} pixels" if isinstance(image, Image.Image) else image
    return f"<image: {what}>"


def _runs(layout: TokenLayout) -> Iterator[tuple[int, int]]:
    """First token and end of each line of the table: the tokens of an image share one."""
    image, document = layout.image[0], layout.document[0]
    same = (image.diff() == 0) & (image[1:] >= 0) & (document.diff() == 0)
    starts = [0, *((~same).nonzero()[:, 0] + 1).tolist()]
    yield from zip(starts, [*starts[1:], layout.length], strict=True)


def _sees(spans: AttentionSpans, query: int) -> str:
    """The ranges of a query that have keys which it may see."""
    seen = []
    for (lo, hi), mask in zip(spans.bounds[0, query].tolist(), spans.range_classes, strict=True):
        if ((torch.tensor(mask) >> spans.key_class[0, lo:hi].long()) & 1).any():
            seen.append(f"{RANGE_NAMES.get(mask, '')}{_span(lo, hi - 1)}")
    return ", ".join(seen) or "nothing"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows as aligned columns; numbers stand on the right of the first two."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if i < 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _spread(counts: np.ndarray) -> str:
    return f"{counts.sum():,}, {counts.min():,} to {counts.max():,} a record, {counts.mean():,.1f} on average"


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    """A line a bin of whole numbers: from, to, how many, and a bar."""
    width = -(-(int(lengths.max()) - int(lengths.min()) + 1) // BINS)
    counts = np.bincount((lengths - lengths.min()) // width)
    digits, most = len(f"{lengths.max() + width:,}"), len(f"{counts.max():,}")
    for number, count in enumerate(counts.tolist()):
        low = int(lengths.min()) + number * width
        bar = "█" * round(BAR * count / counts.max())
        yield f"{low:>{digits},} to {low + width - 1:>{digits},}  {count:>{most},} {bar}".rstrip()

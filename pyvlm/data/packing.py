"""Conversations as samples, cut to a length, and put together into rows without seeing each other.

Shapes: L tokens of a sample.
"""

from collections.abc import Sequence

import torch
from PIL import Image

from pyvlm.data.bad_records import BadRecord
from pyvlm.data.records import decode_image, images_of
from pyvlm.models.processor import IGNORED, Processor, Sample
from pyvlm.models.speaker import Messages


def encode(processor: Processor, messages: Messages, max_length: int | None = None) -> Sample:
    """A conversation as a sample, cut where it is longer than `max_length`."""
    for image in images_of(messages):
        if isinstance(image, Image.Image):  # of a path the processor says so itself
            decode_image(image)
    sample = processor.encode(messages)
    if max_length is None:
        return sample
    config = processor.config
    tokens, maps = [config.tokens_per_image] * len(sample["images"]), None
    if config.tiling is not None:
        sizes = [(height, width) for height, width in sample["image_sizes"].tolist()]
        tokens = [
            config.tiling.num_tokens(size, config.image.size, config.tokens_per_image) for size in sizes
        ]
        maps = [config.tiling.num_maps(size, config.image.size) for size in sizes]
    return truncate(sample, max_length, processor.image_token_id, tokens, maps)


def measure(processor: Processor, messages: Messages, max_length: int | None = None) -> int:
    """Tokens of a conversation after the cut; the images of those that it shortens are decoded.

    Raises:
        BadRecord: the cut leaves nothing to learn.
    """
    length = processor.length(messages)
    if max_length is None or length <= max_length:
        return length
    sample = encode(processor, messages, max_length)
    if not learns(sample):
        raise BadRecord("nothing to learn within max_length", f"{length} tokens")
    return len(sample["input_ids"])


def pack_samples(samples: Sequence[Sample]) -> Sample:
    """Samples one after another as documents of one row.

    The model lets no document see another, counts positions anew in each, and learns nothing from the last
    token of one about the first of the next.

    Returns:
        input_ids, labels and images of all, and documents int32 [L], which counts them from 0. What a
        document begins with has no label, since nothing precedes it.

    Raises:
        ValueError: there are none.
    """
    if not samples:
        raise ValueError("a pack needs at least one sample")
    packed = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
    sizes = torch.tensor([len(sample["input_ids"]) for sample in samples])
    packed["documents"] = torch.arange(len(samples), dtype=torch.int32).repeat_interleave(sizes)
    packed["labels"][(sizes.cumsum(0) - sizes)[sizes > 0]] = IGNORED
    return packed


def truncate(
    sample: Sample,
    max_length: int,
    image_token_id: int,
    image_tokens: Sequence[int],
    image_maps: Sequence[int] | None = None,
) -> Sample:
    """The first `max_length` tokens at most, and never a part of an image.

    Args:
        sample: of `Processor.encode`.
        max_length: tokens to keep.
        image_token_id: the placeholder's.
        image_tokens: placeholders of each image.
        image_maps: rows of `images` that each image has, its tiles; None: one.

    Returns:
        The sample cut at its end; where the cut falls into an image, before that image. Images whose
        placeholders are gone are gone too. A sample that is short enough is given back as it is.

    Raises:
        ValueError: the placeholders or the rows are not those of the images.
    """
    ids = sample["input_ids"]
    if len(ids) <= max_length:
        return sample
    maps = [1] * len(image_tokens) if image_maps is None else list(image_maps)
    places = (ids == image_token_id).nonzero()[:, 0]
    if sum(image_tokens) != len(places) or sum(maps) != len(sample["images"]):
        raise ValueError(
            f"{len(image_tokens)} images of {sum(image_tokens)} tokens and {sum(maps)} maps, but the sample "
            f"has {len(places)} placeholders and {len(sample['images'])} maps: they must agree"
        )
    keep, kept = max_length, 0
    for block in places.split(list(image_tokens)):
        if int(block[-1]) >= max_length:
            keep = min(keep, int(block[0]))
            break
        kept += 1
    counts = {"input_ids": keep, "labels": keep, "images": sum(maps[:kept])}
    return {name: values[: counts.get(name, kept)] for name, values in sample.items()}


def learns(sample: Sample) -> bool:
    """Whether any label can be learnt: the first token has nothing before it to be told from."""
    return bool((sample["labels"][1:] != IGNORED).any())

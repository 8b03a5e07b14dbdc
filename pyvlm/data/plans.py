"""Which samples come when: pure functions of a seed and a number, so that nothing has to be remembered.

N samples; a plan is the order of an epoch, a list of groups, or a list of packs.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

MEGABATCH = 50  # batches sorted together; transformers' length-grouped sampler takes as many
WINDOW = 1024  # samples packed together: wide enough for full packs, and packs stay a mixture of lengths


def draw(start: int, count: int, size: int, seed: Sequence[int], shuffle: bool = True) -> np.ndarray:
    """Numbers start to start + count − 1 of an endless walk through `size` samples: int64 [count].

    The walk is one permutation after another, each of (seed, its number), so that every `size` of it, counted
    from 0, are all samples once.
    """
    first, last = start // size, (start + count - 1) // size
    passes = [
        np.random.default_rng([*seed, number]).permutation(size) if shuffle else np.arange(size)
        for number in range(first, last + 1)
    ]
    return np.concatenate(passes)[start - first * size :][:count]


def group_by_length(
    lengths: np.ndarray, has_image: np.ndarray, batch_size: int, phase: int, rng: np.random.Generator
) -> np.ndarray:
    """An order of N samples whose batches are of like length, and of one kind, with images or without.

    After LLaVA's LengthGroupedSampler (llava/train/llava_trainer.py): samples are shuffled, megabatches of
    them sorted by length, cut into batches, and the batches shuffled. What is left over of the two kinds
    makes one mixed batch, or the ends of the epoch.

    Args:
        lengths: [N], in tokens.
        has_image: bool [N].
        batch_size: samples a batch.
        phase: how many samples of the epoch belong to a batch that the epoch before it began.
        rng: decides all of it.

    Returns:
        int64 [N], a permutation.
    """
    total = len(lengths)
    order = rng.permutation(total)
    if phase >= total:
        return order
    batches: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for kind in (True, False):
        samples = order[has_image[order] == kind]
        full = len(samples) - len(samples) % batch_size
        rest.append(samples[full:])
        for start in range(0, full, MEGABATCH * batch_size):
            mega = samples[start : min(start + MEGABATCH * batch_size, full)]
            mega = mega[np.argsort(-lengths[mega], kind="stable")]
            batches += np.split(mega, len(mega) // batch_size)
    batches = [batches[i] for i in rng.permutation(len(batches))]
    ends = phase + (total - phase) % batch_size
    while sum(map(len, rest)) < ends:
        rest.append(batches.pop())
    mixed = np.concatenate(rest)
    if len(mixed) > ends:
        batches.append(mixed[ends:])
    return np.concatenate([mixed[:phase], *batches, mixed[phase:ends]])


def plan_packs(lengths: Sequence[int], max_length: int, seed: int, window: int = WINDOW) -> list[list[int]]:
    """Which samples share a row: best fit decreasing within windows of a shuffled order.

    Args:
        lengths: of each sample, in tokens.
        max_length: that no pack exceeds.
        seed: of the order; a sample shares its pack with samples of its window only.
        window: samples packed together.

    Returns:
        The samples of each pack; each sample is in exactly one.

    Raises:
        ValueError: a sample is longer than max_length, or of no length.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and (sizes.min() < 1 or sizes.max() > max_length):
        i = int(np.flatnonzero((sizes < 1) | (sizes > max_length))[0])
        raise ValueError(
            f"sample {i} has {sizes[i]} tokens; a pack takes 1 to {max_length}: truncate it first"
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    packs: list[list[int]] = []
    for start in range(0, len(order), window):
        samples = order[start : start + window]
        free: list[tuple[int, int]] = []  # room and number of each pack of this window, rising
        for i in samples[np.argsort(-sizes[samples], kind="stable")].tolist():
            size = int(sizes[i])
            best = bisect_left(free, (size, -1))
            if best < len(free):
                room, number = free.pop(best)
            else:
                room, number = max_length, len(packs)
                packs.append([])
            packs[number].append(i)
            insort(free, (room - size, number))
    return packs


def plan_blends(
    lengths: Sequence[int], blendable: np.ndarray, most: int, max_length: int | None, seed: int
) -> list[list[int]]:
    """Which samples become one dialogue of several images: runs of 1 to `most` of a shuffled order.

    Args:
        lengths: of each sample, in tokens.
        blendable: bool [N]; the others stay alone.
        most: samples a dialogue; each count from 1 on is as likely.
        max_length: a dialogue is closed before it grows longer.
        seed: of the order and the counts.

    Returns:
        The samples of each dialogue; each sample is in exactly one.
    """
    rng = np.random.default_rng(seed)
    blends: list[list[int]] = [[int(i)] for i in np.flatnonzero(~blendable)]
    wanted = tokens = 0
    for i in rng.permutation(np.flatnonzero(blendable)).tolist():
        tokens += lengths[i]
        if wanted == 0 or (max_length is not None and tokens > max_length):
            wanted, tokens = int(rng.integers(1, most + 1)), lengths[i]
            blends.append([])
        blends[-1].append(i)
        wanted -= 1
    return blends

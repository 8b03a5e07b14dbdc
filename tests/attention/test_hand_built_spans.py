"""Masks that no rule makes, written as `AttentionSpans` by hand: their pairs, and the op's values on them.

Each mask is also spelled out pair by pair, from its paper; the op is then held against the definition.
"""

import pytest
import torch
from attention.checks import assert_results_close
from attention.random_inputs import random_qkv
from torch import Tensor

from pyvlm.layout import IMAGE, PADDING, TEXT, AttentionSpans

NOISE = 3  # a class of our own: latents being denoised


def spans_of(
    rows: list[list[list[tuple[int, int]]]], classes: Tensor, masks: tuple[int, ...]
) -> AttentionSpans:
    return AttentionSpans(torch.tensor(rows, dtype=torch.int32), classes, masks, separate=False)


def assert_right(spans: AttentionSpans, expected_BQK: Tensor, dtype: torch.dtype, backend: str) -> None:
    assert torch.equal(spans.dense().any(1), expected_BQK)
    batch, queries, keys = expected_BQK.shape
    q, k, v = random_qkv(batch, 4, 2, queries, keys, 16, dtype)
    assert_results_close(backend, q, k, v, spans)


def bagel_row(segments: list[tuple[int, int]]) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Class and ranges of every token of one row."""
    classes: list[int] = []
    ranges: list[list[tuple[int, int]]] = []
    for kind, length in segments:
        start, end = len(classes), len(classes) + length
        classes += [kind] * length
        for i in range(start, end):
            if kind == NOISE:
                ranges.append([(0, start), (start, end)])  # what is clean, and its own noise
            elif kind == IMAGE:
                ranges.append([(0, end), (0, 0)])
            else:
                ranges.append([(0, i + 1) if kind == TEXT else (0, 0), (0, 0)])
    return classes, ranges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bagel_noise_is_seen_by_its_own_segment_only(dtype: torch.dtype, backend: str) -> None:
    """BAGEL (arXiv 2505.14683): a token sees what is before it, and all of its own image.

    The latents of an image that is being made are hidden from all that follow, which see its clean copy.
    """
    rows = [
        [(TEXT, 9), (IMAGE, 14), (TEXT, 5), (NOISE, 12), (IMAGE, 12), (TEXT, 4), (NOISE, 7), (TEXT, 6)],
        [(NOISE, 20), (TEXT, 13), (NOISE, 1), (NOISE, 8), (IMAGE, 9), (TEXT, 11), (PADDING, 7)],
    ]
    columns = [bagel_row(row) for row in rows]
    classes = torch.tensor([classes for classes, _ in columns], dtype=torch.uint8)
    clean = 1 << TEXT | 1 << IMAGE
    spans = spans_of([ranges for _, ranges in columns], classes, (clean, 1 << NOISE))

    expected = torch.zeros(2, 69, 69, dtype=torch.bool)
    for b, row in enumerate(rows):
        tokens = [(kind, s) for s, (kind, length) in enumerate(row) for _ in range(length)]
        for i, (kind_i, segment_i) in enumerate(tokens):
            for j, (kind_j, segment_j) in enumerate(tokens):
                same_image = segment_i == segment_j and kind_i != TEXT
                hidden = kind_j == NOISE and segment_i != segment_j
                padding = PADDING in (kind_i, kind_j)
                expected[b, i, j] = (j <= i or same_image) and not hidden and not padding
    assert_right(spans, expected, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_branches_of_a_message_tree_share_an_image(dtype: torch.dtype, backend: str) -> None:
    """Molmo's packing (arXiv 2409.17146): several questions about one image, which is encoded once.

    Each question and its answer see the image and the text with it, and themselves up to each token, but not
    one another.
    """
    trees = [[(3, 20, 2), (11, 7, 19, 5)], [(0, 31, 0), (1, 30)]]  # text, image, text; then the branches
    kinds, rows, owners = [], [], []
    for (before, image, after), branches in trees:
        prefix = before + image + after
        kind = [TEXT] * before + [IMAGE] * image + [TEXT] * (after + sum(branches))
        ranges = []
        for i in range(prefix):
            of_image = before <= i < before + image
            ranges.append([(0, before + image if of_image else i + 1), (0, 0)])
        owner = [-1] * prefix
        for number, length in enumerate(branches):
            start = len(owner)
            ranges += [[(0, prefix), (start, i + 1)] for i in range(start, start + length)]
            owner += [number] * length
        padding = 67 - len(kind)
        kinds.append(kind + [PADDING] * padding)
        rows.append(ranges + [[(0, 0), (0, 0)]] * padding)
        owners.append(owner)
    classes = torch.tensor(kinds, dtype=torch.uint8)
    every = 1 << TEXT | 1 << IMAGE
    spans = spans_of(rows, classes, (every, every))

    expected = torch.zeros(2, 67, 67, dtype=torch.bool)
    for b, owner in enumerate(owners):
        for i, branch_i in enumerate(owner):
            for j, branch_j in enumerate(owner):
                both_image = kinds[b][i] == kinds[b][j] == IMAGE
                expected[b, i, j] = (j <= i or both_image) and branch_j in (-1, branch_i)
    assert_right(spans, expected, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "block"), [(60, 4), (45, 16), (7, 7), (5, 1)], ids=str)
def test_block_diffusion(length: int, block: int, dtype: torch.dtype, backend: str) -> None:
    """BD3-LM (arXiv 2503.09573): the noisy sequence, then the clean one, in one row.

    A noisy block sees itself and the clean blocks before it; a clean block, the clean ones up to itself.
    """
    row = []
    for i in range(length):
        start = i // block * block
        row.append([(start, min(start + block, length)), (length, length + start)])
    for i in range(length):
        end = min((i // block + 1) * block, length)
        row.append([(0, 0), (length, length + end)])
    classes = torch.full((1, 2 * length), TEXT, dtype=torch.uint8)
    spans = spans_of([row], classes, (1 << TEXT, 1 << TEXT))

    expected = torch.zeros(1, 2 * length, 2 * length, dtype=torch.bool)
    for i in range(2 * length):
        for j in range(2 * length):
            (clean_i, at_i), (clean_j, at_j) = divmod(i, length), divmod(j, length)
            block_i, block_j = at_i // block, at_j // block
            if clean_i == clean_j == 1:
                expected[0, i, j] = block_j <= block_i
            elif clean_j == 1:
                expected[0, i, j] = block_j < block_i
            else:
                expected[0, i, j] = clean_i == 0 and block_j == block_i
    assert_right(spans, expected, dtype, backend)

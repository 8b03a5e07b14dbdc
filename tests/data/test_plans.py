"""Orders, packs and blends: each sample exactly once, within the length, a function of the seed alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvlm.data.plans import draw, group_by_length, plan_blends, plan_packs

seeds = st.integers(0, 5)


@given(size=st.integers(1, 40), start=st.integers(0, 200), count=st.integers(1, 60), seed=seeds)
def test_a_walk_is_one_permutation_after_another(size: int, start: int, count: int, seed: int) -> None:
    whole = draw(0, start + count, size, (seed, 1))
    assert draw(start, count, size, (seed, 1)).tolist() == whole[start:].tolist()
    for first in range(0, len(whole) - size + 1, size):
        assert sorted(whole[first : first + size]) == list(range(size))


def test_walks_differ_by_pass_and_seed() -> None:
    first, second = np.split(draw(0, 200, 100, (0,)), 2)
    assert first.tolist() != second.tolist()
    assert first.tolist() != draw(0, 100, 100, (1,)).tolist()
    assert draw(3, 4, 5, (0,), shuffle=False).tolist() == [3, 4, 0, 1]


@given(
    samples=st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=80),
    batch_size=st.integers(1, 12),
    epoch=st.integers(0, 7),
    seed=seeds,
)
def test_groups_are_permutations_of_batches_of_one_kind(samples, batch_size, epoch, seed) -> None:
    lengths, has_image = np.array([s[0] for s in samples]), np.array([s[1] for s in samples])
    phase = -epoch * len(samples) % batch_size
    order = group_by_length(lengths, has_image, batch_size, phase, np.random.default_rng(seed))
    again = group_by_length(lengths, has_image, batch_size, phase, np.random.default_rng(seed))
    assert order.tolist() == again.tolist()
    assert sorted(order) == list(range(len(samples)))
    mixed = 0
    for first in range(phase, len(samples) - batch_size + 1, batch_size):
        mixed += len(set(has_image[order[first : first + batch_size]])) > 1
    assert mixed <= 1


def test_batches_are_of_like_length() -> None:
    rng = np.random.default_rng(0)
    lengths, has_image = rng.integers(1, 1000, 4000), rng.random(4000) < 0.5
    order = group_by_length(lengths, has_image, 16, 0, rng)
    spread = np.ptp(lengths[order].reshape(-1, 16), axis=1)
    assert np.median(spread) < 50  # shuffled, it is about 880
    firsts = lengths[order][::16]
    assert np.corrcoef(firsts[:-1], firsts[1:])[0, 1] < 0.3  # and the batches are not in order of length


@given(
    lengths=st.lists(st.integers(1, 20), max_size=60),
    extra=st.integers(0, 30),
    window=st.integers(1, 70),
    seed=seeds,
)
def test_packs_hold_each_sample_once_within_the_length(lengths, extra, window, seed) -> None:
    longest = max([*lengths, 1]) + extra
    packs = plan_packs(lengths, longest, seed, window)
    assert packs == plan_packs(lengths, longest, seed, window)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(pack and sum(lengths[i] for i in pack) <= longest for pack in packs)


def test_packs_are_full() -> None:
    lengths = np.random.default_rng(0).integers(50, 800, 5000).tolist()
    packs = plan_packs(lengths, 2048, seed=0)
    assert sum(lengths) / (2048 * len(packs)) > 0.98
    assert packs != plan_packs(lengths, 2048, seed=1)
    # Best fit: of the packs with room for it, a sample goes to the fullest.
    assert sorted(map(sorted, plan_packs([6, 5, 4, 3, 2], 10, seed=0))) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("lengths", [[3, 11], [3, 0]])
def test_packs_refuse_what_does_not_fit(lengths) -> None:
    with pytest.raises(ValueError, match=rf"sample 1 has {lengths[1]} tokens; a pack takes 1 to 10"):
        plan_packs(lengths, 10, seed=0)


@given(
    samples=st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=60),
    most=st.integers(2, 5),
    max_length=st.none() | st.integers(1, 50),
    seed=seeds,
)
def test_blends_hold_each_sample_once(samples, most, max_length, seed) -> None:
    lengths, blendable = [s[0] for s in samples], np.array([s[1] for s in samples], dtype=bool)
    blends = plan_blends(lengths, blendable, most, max_length, seed)
    assert blends == plan_blends(lengths, blendable, most, max_length, seed)
    assert sorted(i for blend in blends for i in blend) == list(range(len(samples)))
    for blend in blends:
        assert 1 <= len(blend) <= most
        assert len(blend) == 1 or all(blendable[i] for i in blend)
        assert len(blend) == 1 or max_length is None or sum(lengths[i] for i in blend) <= max_length


def test_each_count_is_as_likely() -> None:
    blends = plan_blends([1] * 6000, np.ones(6000, dtype=bool), 3, None, seed=0)
    counts = np.bincount([len(blend) for blend in blends], minlength=4)[1:]
    assert (np.abs(counts / len(blends) - 1 / 3) < 0.03).all()

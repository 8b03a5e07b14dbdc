"""Whether an answer is right: normalised exact match, VQA accuracy, and how sure their means are.

The rules are those of the VQA evaluation code (github.com/GT-Vision-Lab/VQA, vqaEval.py; Antol et al., "VQA:
Visual Question Answering", arXiv 1505.00468, and Goyal et al., arXiv 1612.00837). There, answers are compared
as they are where all humans gave the same one; here they are always normalised, as later evaluators do.
"""

import math
import re
from collections.abc import Sequence

import numpy as np

# Leaving one out of fewer, no answer could reach the three matches that count as right.
FEWEST_HUMANS = 4
RESAMPLES = 2000
Z95 = 1.959963984540054  # of the normal distribution: 95 % lie within so many deviations

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(_NUMBER_WORDS.split())}
_GROUPED_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# Written without one of their apostrophes, they get it back. Those that would then be other words ("she'd",
# "we're") are missing in the original, too.
_WITH_APOSTROPHE = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _WITH_APOSTROPHE.split()
    for i, c in enumerate(word)
    if c == "'"
} | {"somebody'd": "somebodyd"}  # a slip of the original, kept so that figures are comparable


def normalize_answer(text: str) -> str:
    """Lower case, without articles and punctuation, number words up to ten as digits, apostrophes put back.

    A punctuation mark becomes a blank, or nothing where one of its kind stands beside a blank or where the
    text has grouped digits ("1,000"); a period goes unless a digit follows it.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = _GROUPED_DIGITS.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        dropped = grouped or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if dropped else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def is_exact_match(given: str, answers: Sequence[str]) -> bool:
    """Whether an answer is, normalised, one of those expected."""
    return normalize_answer(given) in map(normalize_answer, answers)


def vqa_accuracy(given: str, answers: Sequence[str]) -> float:
    """min(matches / 3, 1), averaged over the humans' answers without each one of them in turn.

    With fewer than `FEWEST_HUMANS` answers, which are then alternatives and no vote: 1 for an exact match,
    otherwise 0.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("an accuracy needs at least one expected answer")
    if len(answers) < FEWEST_HUMANS:
        return float(is_exact_match(given, answers))
    normalized = normalize_answer(given)
    matches = sum(normalize_answer(answer) == normalized for answer in answers)
    without_a_match, without_another = min((matches - 1) / 3, 1), min(matches / 3, 1)
    return (matches * without_a_match + (len(answers) - matches) * without_another) / len(answers)


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); for no questions, all of [0, 1]."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = right / total, Z95 * Z95
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap_interval(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean of scores in [0, 1], from `RESAMPLES` seeded resamples (percentiles).

    Where all scores are 0 or 1, it is Wilson's: resamples of nothing but 1 would claim certainty.
    """
    values = np.asarray(scores, np.float64)
    if not ((values > 0) & (values < 1)).any():
        return wilson_interval(int(values.sum()), len(values))
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

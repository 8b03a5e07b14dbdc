import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvlm.training.vqa_metrics import (
    bootstrap_interval,
    is_exact_match,
    normalize_answer,
    vqa_accuracy,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Yes", "yes"),
        ("  a\tred\nball ", "red ball"),
        ("The man and an  Apple", "man and apple"),
        ("theatre", "theatre"),
        ("none", "0"),
        ("two or ten", "2 or 10"),
        ("eleven", "eleven"),
        ("someone", "someone"),
        # Punctuation beside a blank goes; within a word it becomes a blank.
        ("red, white and blue", "red white and blue"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),  # one of its kind beside a blank is enough
        ("what?!", "what"),
        ('"stop"', "stop"),
        # Grouped digits: all punctuation goes.
        ("1,000", "1000"),
        ("1,000 miles/hour", "1000 mileshour"),
        # A period goes unless a digit follows it.
        ("3.5", "3.5"),
        ("3.5 m.", "3.5 m"),
        ("U.S.", "us"),
        (".5", ".5"),
        ("the end.", "end"),
        ("12:30", "12:30"),  # colons and apostrophes stay
        ("dog's", "dog's"),
        # Contractions get the apostrophe that they lack.
        ("dont", "don't"),
        ("DONT", "don't"),
        ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("oclock", "o'clock"),
        ("yall'd've", "y'all'd've"),
        ("twas", "'twas"),
        ("Im", "im"),  # as in the original, whose entry for it is in capitals
        ("shed", "shed"),
        ("well", "well"),
        ("somebody'd", "somebodyd"),
        ("", ""),
        ("a", ""),
    ],
)
def test_answers_are_normalised_as_in_the_vqa_evaluation(text, normalized):
    assert normalize_answer(text) == normalized


@given(st.text(st.sampled_from("ab the1,.-'?\n "), max_size=12))
def test_blanks_and_case_do_not_matter(text):
    assert normalize_answer(f" \n{text.upper()}\t") == normalize_answer(text)
    assert is_exact_match(text, ["something else", text])


def by_leaving_one_out(given, answers):
    """The definition, answer by answer."""
    scores = []
    for i in range(len(answers)):
        others = answers[:i] + answers[i + 1 :]
        scores.append(min(sum(answer == given for answer in others) / 3, 1))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("people", [4, 5, 10])
def test_vqa_accuracy_is_the_mean_over_all_but_one(people):
    for matches in range(people + 1):
        answers = ["cat"] * matches + ["dog"] * (people - matches)
        assert vqa_accuracy("The cat.", answers) == pytest.approx(by_leaving_one_out("cat", answers))
    ten = [vqa_accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) for matches in range(11)]
    assert ten == pytest.approx([0, 0.3, 0.6, 0.9, *[1.0] * 7])


def test_few_answers_are_alternatives():
    assert vqa_accuracy("two", ["2"]) == 1
    assert vqa_accuracy("a cat", ["dog", "cat", "mouse"]) == 1
    assert vqa_accuracy("cow", ["dog", "cat", "mouse"]) == 0
    with pytest.raises(ValueError, match="at least one expected answer"):
        vqa_accuracy("cow", [])


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # R: prop.test(x, n, correct = FALSE)
        (15, 50, 0.1910, 0.4375),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


def test_bootstrap_interval_is_that_of_the_mean():
    scores = list(itertools.islice(itertools.cycle([0.0, 0.3, 0.6, 1.0]), 400))
    low, high = bootstrap_interval(scores)
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores) / len(scores))
    assert (low, high) == pytest.approx((mean - 1.96 * deviation, mean + 1.96 * deviation), abs=0.005)
    assert bootstrap_interval(scores) == (low, high)
    assert bootstrap_interval([1.0] * 10) == wilson_interval(10, 10)
    assert bootstrap_interval([]) == (0.0, 1.0)

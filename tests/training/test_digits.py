import re

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pyvlm.training.augmentation import NUMBERS_PER_IMAGE, augment
from pyvlm.training.conversation import dialogue_messages
from pyvlm.training.digits import QUESTIONS, DigitDialogues, DigitsConfig, load_split


def true_answer(digits: tuple[int, ...], question: str) -> str:
    """Worked out from the words alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if question.startswith("which digit"):
        return str(digits[numbers[0] - 1])
    if question.startswith("what is the sum"):
        return str(sum(digits[n - 1] for n in numbers))
    if question.startswith("how many"):
        return str(sum(d == numbers[0] for d in digits))
    assert question == "which image shows the largest digit?"
    assert sum(d == max(digits) for d in digits) == 1, "the largest digit must be in one image only"
    return str(1 + max(range(len(digits)), key=lambda i: digits[i]))


def test_every_answer_is_right_and_every_kind_is_asked():
    kinds = []
    for dialogue in DigitDialogues("train", DigitsConfig(), seed=3).batch(0, range(200)):
        assert 2 <= len(dialogue.images) == len(dialogue.shown) <= 4
        assert 3 <= len(dialogue.rounds) <= 5
        for asked in dialogue.rounds:
            assert asked.answer == true_answer(dialogue.shown, asked.question)
            assert asked.reply.split()[-1] == asked.answer
            kinds.append(asked.kind)
    for kind in ("which", "sum", "largest", "count"):
        assert kinds.count(kind) > 0.1 * len(kinds)


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        ("which", r"3|5"),
        ("sum", r"3 \+ 5 = 8"),
        ("largest", r"3 5: 5 in image 2"),
        ("count", r"3 .*5 .*: (0|1)"),
    ],
)
def test_answers_show_their_working(kind, reply):
    asked = QUESTIONS[kind]((3, 5), np.random.default_rng(0))
    assert re.fullmatch(reply, asked.reply)


def test_images_show_the_digits_of_their_own_split():
    images, labels = load_split("test")
    by_pixels = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for dialogue in DigitDialogues("test", DigitsConfig(), seed=0).batch(0, range(50)):
        for image, digit in zip(dialogue.images, dialogue.shown, strict=True):
            assert by_pixels[image.tobytes()] == digit


def test_split_is_by_order_and_complete():
    from sklearn.datasets import load_digits

    (train, _), (test, _) = load_split("train"), load_split("test")
    assert len(train) == 1437
    np.testing.assert_array_equal(np.concatenate([train, test]) * 16, load_digits().images)


def test_a_sample_depends_on_seed_step_and_index_only():
    source = DigitDialogues("train", DigitsConfig(augment=1.0), seed=5)
    together, alone = source.batch(7, range(4)), source.batch(7, [2])[0]
    np.testing.assert_array_equal(together[2].images, alone.images)
    assert (together[2].shown, together[2].rounds) == (alone.shown, alone.rounds)
    others = [
        source.batch(8, [2])[0],
        source.batch(7, [3])[0],
        DigitDialogues("train", source.config, 6).batch(7, [2])[0],
    ]
    assert all(other.rounds != alone.rounds for other in others)


def test_every_word_of_dialogues_is_in_the_vocabulary(small_recipe):
    processor = small_recipe().processor()
    nine = DigitsConfig(images=(2, 9))
    for dialogue in DigitDialogues("train", nine, seed=1).batch(0, range(100)):
        for message in dialogue_messages(dialogue):
            parts = (
                message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
            )
            assert not [
                word for part in parts if "text" in part for word in processor.unknown_words(part["text"])
            ]


def test_augmentation_changes_images_but_keeps_their_range_and_independence():
    images = torch.from_numpy(load_split("train")[0][:5])
    noise = torch.randn(5, NUMBERS_PER_IMAGE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(augment(images, noise, 0.0), images, rtol=0, atol=1e-6)
    changed = augment(images, noise, 1.0)
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert ((changed - images).abs().amax((1, 2)) > 0.1).all()
    torch.testing.assert_close(augment(images[3:4], noise[3:4], 1.0), changed[3:4], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": (3, 2)}, "fewest first"),
        ({"images": (2, 10)}, "at most 9"),
        ({"rounds": (0, 1)}, "greater than or equal to 1"),
        ({"questions": {"largest": 1.0}}, "could ask none"),  # two images of one digit have no largest
        ({"images": (1, 2), "questions": {"sum": 1.0}}, "could ask none"),
    ],
)
def test_impossible_dialogues_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DigitsConfig(**settings)

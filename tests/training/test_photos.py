import numpy as np
import pytest

from pyvlm.models.processor import word_level_tokenizer
from pyvlm.training.photos import QUESTIONS, PhotoDialogues, PhotosConfig, photographs, vocabulary

SEVERAL = PhotosConfig(images=(2, 4), rounds=(3, 5), questions=dict.fromkeys(QUESTIONS, 1.0), upside_down=0.5)


def test_photographs_are_small_and_in_colour() -> None:
    pictures = photographs()
    assert len(pictures) == 12
    for word, picture in pictures.items():
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3, word
        assert max(picture.shape) == 192, word
        assert picture.std() > 10, word


def test_answers_are_true_of_the_images() -> None:
    for dialogue in PhotoDialogues("train", SEVERAL, seed=3).batch(0, range(60)):
        assert 2 <= len(dialogue.images) == len(dialogue.shown) <= 4
        assert 3 <= len(dialogue.rounds) <= 5
        for asked in dialogue.rounds:
            words = asked.question.rstrip("?").split()
            match asked.kind:
                case "what":
                    assert asked.answer == dialogue.shown[int(words[-1]) - 1]
                case "where":
                    assert dialogue.shown[int(asked.answer) - 1] == words[-1]
                    assert dialogue.shown.count(words[-1]) == 1
                case "count":
                    assert int(asked.answer) == dialogue.shown.count(words[-1]) > 0
                case "upright":
                    picture = photographs()[dialogue.shown[int(words[2]) - 1]]
                    image = dialogue.images[int(words[2]) - 1]
                    assert is_within(image if asked.answer == "yes" else image[::-1], picture)


def is_within(crop: np.ndarray, picture: np.ndarray) -> bool:
    height, width = crop.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], (height, width))
    corners = (windows[..., 0, 0] == crop[0, 0, 0]) & (windows[..., -1, -1] == crop[-1, -1, 0])
    return any(np.array_equal(picture[r : r + height, c : c + width], crop) for r, c in np.argwhere(corners))


def test_a_sample_depends_on_seed_step_index_and_split_only() -> None:
    source = PhotoDialogues("train", SEVERAL, seed=5)
    together, alone = source.batch(7, range(4))[2], source.batch(7, [2])[0]
    assert together.rounds == alone.rounds
    assert all(np.array_equal(a, b) for a, b in zip(together.images, alone.images, strict=True))
    others = [
        source.batch(8, [2])[0],
        source.batch(7, [3])[0],
        PhotoDialogues("train", SEVERAL, 6).batch(7, [2])[0],
        PhotoDialogues("test", SEVERAL, 5).batch(7, [2])[0],
    ]
    assert all(other.rounds != alone.rounds for other in others)


def test_vocabulary_holds_every_word() -> None:
    tokenizer = word_level_tokenizer(vocabulary())
    for dialogue in PhotoDialogues("test", SEVERAL, seed=1).batch(0, range(200)):
        for asked in dialogue.rounds:
            assert "<unk>" not in tokenizer.encode(f"{asked.question} {asked.reply}").tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": (3, 2)}, "give the fewest first"),
        ({"questions": {"where": 1.0}}, "give what, upright or count a weight"),
        ({"images": (1, 10)}, "less than or equal to 9"),
    ],
)
def test_impossible_dialogues_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhotosConfig(**given)

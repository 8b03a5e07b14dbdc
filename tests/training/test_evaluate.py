import numpy as np
import pytest
import torch

from pyvlm.models.vlm import VLM
from pyvlm.training import evaluate as evaluation
from pyvlm.training.digits import Dialogue, DigitDialogues, DigitsConfig, Round
from pyvlm.training.evaluate import Asked, accuracy_table, commonest_answers, evaluate, expert_load


def dialogues_of(*rounds: list[Round]) -> list[Dialogue]:
    return [Dialogue(np.zeros((2, 8, 8), np.float32), (1, 2), tuple(asked)) for asked in rounds]


def test_later_rounds_see_the_models_own_answers(monkeypatch):
    seen = []

    def reply(model, processor, conversations):
        seen.append(conversations)
        return [f"so it is {len(messages)}" for messages in conversations]

    monkeypatch.setattr(evaluation, "reply", reply)
    first, second = Round("which", "a?", "1"), Round("sum", "b?", "4")
    result = evaluate(None, None, dialogues_of([first, second], [first]))
    assert [len(conversations) for conversations in seen] == [2, 1]  # the shorter dialogue ends by itself
    assert [message["content"] for message in seen[1][0][1:]] == ["so it is 1", "b?"]
    assert [(asked.given, asked.right) for asked in result.asked] == [
        ("so it is 1", True),
        ("so it is 3", False),
        ("so it is 1", True),
    ]
    table = accuracy_table(result, {"which": "2", "sum": "4"})
    assert [(row["kind"], row["questions"], row["accuracy"], row["baseline"]) for row in table] == [
        ("sum", 1, 0.0, 1.0),
        ("which", 2, 1.0, 0.0),
        ("all", 3, pytest.approx(2 / 3), pytest.approx(1 / 3)),
    ]


@pytest.mark.parametrize(
    ("given", "right"),
    [("12", True), ("5 + 7 = 12", True), ("12 = 5 + 7", False), ("112", False), ("", False)],
)
def test_the_last_word_is_the_answer(given, right):
    assert Asked("sum", "?", "12", given).right == right


def test_batched_answers_are_those_of_one_dialogue_alone(small_recipe):
    torch.manual_seed(0)
    recipe = small_recipe(model={"initializer_range": 0.5})  # so that answers differ between dialogues
    model, processor = VLM(recipe.model).double(), recipe.processor()
    dialogues = DigitDialogues("test", DigitsConfig(), 0).batch(0, range(7))
    together = [asked.given for asked in evaluate(model, processor, dialogues, batch_size=7).asked]
    alone = [asked.given for asked in evaluate(model, processor, dialogues, batch_size=1).asked]
    assert together == alone
    assert len(set(alone)) > 1


def test_commonest_answers_beat_all_others():
    config = DigitsConfig(rounds=(1, 1))
    baseline = commonest_answers(config, seed=0, dialogues=300)
    assert baseline.keys() == {"which", "sum", "largest", "count"}
    asked = [d.rounds[0] for d in DigitDialogues("train", config, 0).batch(0, range(300))]
    for kind, answer in baseline.items():
        answers = [a.answer for a in asked if a.kind == kind]
        assert answers.count(answer) == max(map(answers.count, answers))


def test_expert_load_is_a_share_of_each_modality(small_recipe):
    recipe = small_recipe()
    dialogues = DigitDialogues("test", DigitsConfig(), 0).batch(0, range(5))
    (load,) = expert_load(VLM(recipe.model), recipe.processor(), dialogues)
    assert set(load) == {"text", "image"}
    for shares in load.values():
        assert len(shares) == 2
        assert sum(shares) == pytest.approx(1)
    # Expert choice: each expert takes as many tokens of an image.
    assert load["image"] == pytest.approx([0.5, 0.5])

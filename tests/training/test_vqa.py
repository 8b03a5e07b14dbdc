import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from pyvlm.models.speaker import Sampling
from pyvlm.models.vlm import VLM
from pyvlm.training.digits import load_split
from pyvlm.training.pictures import write_pictures
from pyvlm.training.replies import VLMSpeaker, reply
from pyvlm.training.vqa import Question, Skipped, read_questions
from pyvlm.training.vqa_evaluation import (
    Prediction,
    answer_questions,
    format_rows,
    keep_predictions,
    summarize,
)


@pytest.fixture
def folder(tmp_path):
    write_pictures(list(load_split("test")[0][:3]), ["a.png", "b.png", "c.png"], tmp_path)
    return tmp_path


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path, strict=False):
    told = []
    skipped = Skipped(told.append, strict)
    return list(read_questions(path, skipped)), skipped, told


def shape(messages):
    """Roles and what follows one another in their contents."""
    return [
        (
            m["role"],
            m["content"]
            if isinstance(m["content"], str)
            else [p.get("text", p.get("image")) for p in m["content"]],
        )
        for m in messages
    ]


def test_vqa_records(folder):
    path = lines(
        folder / "vqa.jsonl",
        {"image": "a.png", "question": "what?", "answer": "a cat", "type": "object"},
        {"image": ["a.png", "b.png"], "question": "is <image> as <image>?", "answers": ["yes", "no"]},
        {"question": "how many?", "answers": [{"answer": "2", "answer_id": 1}, {"answer": "3"}]},
        {"image": "a.png", "question": "how many?", "answer": 2},
    )
    questions, skipped, _ = read(path)
    a, b = (str(folder / name) for name in ("a.png", "b.png"))
    assert [shape(question.messages) for question in questions] == [
        [("user", [a, "what?"])],
        [("user", ["is ", a, " as ", b, "?"])],
        [("user", "how many?")],
        [("user", [a, "how many?"])],
    ]
    assert [question.answers for question in questions] == [("a cat",), ("yes", "no"), ("2", "3"), ("2",)]
    assert [question.kind for question in questions] == ["object", "", "", ""]
    assert questions[1].where == f"{path}, line 2"
    assert not skipped.counts


def test_every_turn_of_the_assistant_is_a_question(folder):
    llava = {
        "image": "a.png",
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "a cat"},
            {"from": "human", "value": "where?"},
            {"from": "gpt", "value": "on a mat"},
        ],
    }
    parts = [{"type": "image", "image": "b.png"}, {"type": "image"}, {"type": "text", "text": "which?"}]
    messages = {
        "type": "talk",
        "images": ["c.png"],
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": "both"}]},
        ],
    }
    (folder / "talk.json").write_text(json.dumps([llava, messages], indent=1))
    first, second, third = read(folder / "talk.json")[0]
    asked = [("system", "be brief"), ("user", [str(folder / "a.png"), "\nwhat?"])]
    assert (shape(first.messages), first.answers) == (asked, ("a cat",))
    assert shape(second.messages) == [*asked, ("assistant", "a cat"), ("user", "where?")]
    assert second.answers == ("on a mat",)
    assert shape(third.messages) == [("user", [str(folder / "b.png"), str(folder / "c.png"), "which?"])]
    assert (third.answers, third.kind) == (("both",), "talk")
    assert third.where.endswith("talk.json, record 2")


BAD = [
    ("{broken", "broken JSON"),
    ("[]", "not an object"),
    ('{"question": "what?"}', "no answer"),
    ('{"question": "what?", "answers": []}', "no answer"),
    ('{"question": "what?", "answers": [null]}', "no answer"),
    ('{"question": "what?", "answers": "yes"}', "no answer"),
    ('{"question": " ", "answer": "yes"}', "no question"),
    ('{"what": 1}', "no conversation"),
    ('{"messages": []}', "zero turns"),
    ('{"question": "what?", "answer": "yes", "image": "d.png"}', "missing image"),
    ('{"question": "what?", "answer": "yes", "image": 3}', "missing image"),
    ('{"question": "<image><image>?", "answer": "yes", "image": "a.png"}', "wrong count of <image>"),
    ('{"question": "<image>?", "answer": "yes", "image": ["a.png", "b.png"]}', "wrong count of <image>"),
    ('{"messages": [{"role": "user", "content": "hi"}]}', "no assistant turn"),
    ('{"messages": [{"role": "robot", "content": "hi"}]}', "unknown role"),
    ('{"messages": [{"role": "user", "content": 1}]}', "no text"),
    ('{"messages": ["hi"]}', "not an object"),
]
GOOD = '{"question": "what?", "answer": "yes"}'


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_records_are_named_counted_and_skipped(folder, line, reason):
    path = folder / "vqa.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    questions, skipped, told = read(path)
    assert len(questions) == 2
    assert skipped.counts == {reason: 1}
    assert told[0].startswith(f"skipped {path}, line 3: {reason}")
    assert skipped.summary() == f"1 records skipped: 1 {reason}"
    with pytest.raises(ValueError, match=f"line 3: {reason}"):
        read(path, strict=True)


def test_many_bad_records_are_counted_and_the_first_named(folder):
    path = folder / "vqa.jsonl"
    path.write_text("\n".join([GOOD, *[line for line, _ in BAD] * 4]))
    _, skipped, told = read(path)
    assert skipped.counts == {reason: 4 * n for reason, n in Counter(reason for _, reason in BAD).items()}
    assert sum("no answer" in line for line in told) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no question"),
        ("{}", "holds no question"),
        ("[1,", "not valid JSON"),
        (None, "cannot be read"),
    ],
)
def test_a_file_without_questions_is_an_error(folder, content, message):
    if content is not None:
        (folder / "vqa.json").write_text(content)
    with pytest.raises(ValueError, match=rf"vqa\.json.*{message}"):
        read(folder / "vqa.json")


@pytest.fixture
def model(small_recipe):
    torch.manual_seed(0)
    recipe = small_recipe(model={"initializer_range": 0.5})
    return VLMSpeaker(VLM(recipe.model).double(), recipe.processor(), Sampling())


def digit_questions(folder):
    asked = ["which digit is in image 1?", "how many images show a 3?", "image 1"]
    records = [
        {"image": name, "question": question, "answer": "3"}
        for name in ("a.png", "b.png", "c.png")
        for question in asked
    ]
    return read(lines(folder / "vqa.jsonl", *records, {"question": "which digit", "answer": "3"}))[0]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_are_those_of_each_question_alone(folder, model, batch_size):
    questions = digit_questions(folder)
    skipped = Skipped([].append)
    options = {"batch_size": batch_size, "max_new_tokens": 6, "progress": False}
    predictions = list(answer_questions(model, questions, skipped, **options))
    assert [prediction.question for prediction in predictions] == questions
    images = load_split("test")[0]
    alone = []
    for i, question in enumerate(questions):
        content = question.messages[0]["content"]
        if i < 9:
            # The picture on disk holds the digit in 8 bits.
            strokes = np.round(255 * images[i // 3]) / 255
            content = [{"type": "image", "image": strokes.astype(np.float32)}, content[1]]
        alone += reply(model.model, model.processor, [[{"role": "user", "content": content}]], 6)
    assert [prediction.given for prediction in predictions] == [text.strip() for text in alone]
    assert len(set(alone)) > 2


def test_an_instruction_stands_behind_every_question(folder, model, monkeypatch):
    processor = model.processor
    seen, encode = [], processor.encode
    monkeypatch.setattr(processor, "encode", lambda m, **k: (seen.append(m), encode(m, **k))[1])
    questions = digit_questions(folder)[-2:]
    list(answer_questions(model, questions, Skipped([].append), instruction="in one word", progress=False))
    assert [[part.get("text") for part in m[0]["content"]] for m in seen] == [
        [None, "image 1", "\nin one word"],
        ["which digit", "\nin one word"],
    ]


def test_a_damaged_image_is_skipped_and_the_rest_of_its_batch_is_not(folder, model):
    questions = digit_questions(folder)
    (folder / "b.png").write_bytes(b"torn")
    told = []
    skipped = Skipped(told.append)
    predictions = list(
        answer_questions(model, questions, skipped, batch_size=4, max_new_tokens=2, progress=False)
    )
    assert len(predictions) == 7
    assert skipped.counts == {"cannot be encoded": 3}
    assert "line 4: cannot be encoded" in told[0]
    assert "b.png" in told[0]
    with pytest.raises(ValueError, match="line 4"):
        list(answer_questions(model, questions, Skipped(told.append, strict=True), progress=False))


def test_pictures_in_colour_stay_so(folder, small_recipe, monkeypatch):
    recipe = small_recipe(model={"image": {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}})
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "rgb.png")
    questions = read(lines(folder / "v.jsonl", {"image": "rgb.png", "question": "what", "answer": "x"}))[0]
    vlm, seen = VLM(recipe.model), []
    features = vlm.image_features
    monkeypatch.setattr(vlm, "image_features", lambda images: (seen.append(images), features(images))[1])
    list(
        answer_questions(
            VLMSpeaker(vlm, recipe.processor(), Sampling()), questions, Skipped([].append), progress=False
        )
    )
    expected = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(seen[0], expected)


def prediction(given, answers, kind=""):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]}
    ]
    return Prediction(Question(messages, tuple(answers), kind, "file, line 1"), given)


def test_summary_by_type():
    people = ["cat"] * 2 + ["dog"] * 8
    predictions = [
        prediction("A cat!", people, "animal"),
        prediction("dog", people, "animal"),
        prediction("2", ["two"], "count"),
        prediction("3", ["two"], "count"),
        prediction("3", ["two"]),
    ]
    none, animal, count, both = rows = summarize(predictions)
    assert [row["type"] for row in rows] == ["(none)", "animal", "count", "all"]
    assert [row["questions"] for row in rows] == [1, 2, 2, 5]
    assert [row["exact_match"] for row in rows] == [0, 1, 0.5, pytest.approx(0.6)]
    assert [none["vqa_accuracy"], count["vqa_accuracy"]] == [None, None]
    assert animal["vqa_accuracy"] == pytest.approx(0.8)
    assert both["vqa_accuracy"] == pytest.approx(2.6 / 5)
    for row in (animal, both):
        low, high = row["vqa_accuracy_interval"]
        assert low < row["vqa_accuracy"] < high
    table = format_rows(rows).splitlines()
    assert table[0].split() == ["type", "asked", "exact", "95", "%", "VQA", "95", "%"]
    assert table[2].split()[:3] == ["animal", "2", "100.0%"]
    assert "80.0%" in table[2]
    assert len({line.index("%") for line in table[1:]}) == 1
    assert [row["type"] for row in summarize(predictions[-1:])] == ["all"]
    with pytest.raises(ValueError, match="no question"):
        summarize([])


def test_predictions_are_written_as_they_come(tmp_path):
    path, made = tmp_path / "out.jsonl", [prediction("2", ["two", "3"], "count"), prediction("é", ["e"])]

    def stream():
        yield made[0]
        assert len(path.read_text().splitlines()) == 1
        yield made[1]

    assert keep_predictions(stream(), path) == made
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {
        "where": "file, line 1",
        "type": "count",
        "question": "<image>what?",
        "answers": ["two", "3"],
        "prediction": "2",
        "exact_match": True,
        "vqa_accuracy": 1.0,
    }
    assert (second["prediction"], second["exact_match"]) == ("é", False)
    assert keep_predictions(iter(made), None) == made

"""Data files as a source of samples: order, resuming, mixing, lengths, packing, blending, bad records."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from pyvlm.data.blending import introduce_images
from pyvlm.data.files import DataFile, FilesConfig, FilesSource
from pyvlm.data.records import images_of, parts_of
from pyvlm.models import ImageConfig, Processor, ProcessorConfig, word_level_tokenizer
from pyvlm.models.processor import IGNORED
from pyvlm.training.recipe import load_recipe

NAMES = [f"n{i}" for i in range(40)]


@pytest.fixture(scope="module")
def processor() -> Processor:
    config = ProcessorConfig(image=ImageConfig(size=4), tokens_per_image=5)
    return Processor(word_level_tokenizer([*NAMES, "Image 1 2 3 4 :", "a b"]), config)


def llava(name: str, words: int = 1, images: int = 0, answer: str = "b") -> dict:
    question = " ".join(["<image>"] * images + [name] + ["a"] * words)
    record = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    return record | ({"image": ["red.png"] * images} if images else {})


@pytest.fixture
def write(tmp_path: Path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")

    def to(records, name: str = "data.jsonl") -> str:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / name).write_text("\n".join(lines))
        return str(tmp_path / name)

    return to


def records(count: int, images: int = 0) -> list[dict]:
    """Each of another length and name."""
    return [llava(NAMES[i], words=1 + 3 * i % 7, images=images) for i in range(count)]


def source_of(processor, path, batch_size=4, seed=3, **options) -> FilesSource:
    return FilesSource(FilesConfig(path=path, **options), processor, seed, batch_size)


def names(conversations) -> list[str]:
    return [
        word
        for messages in conversations
        for part in parts_of(messages)
        for word in part.get("text", "").split()
        if word in NAMES
    ]


def epochs(source: FilesSource, count: int) -> list[str]:
    """The names in the order of the first epochs, rounded up to whole steps."""
    steps = -(-count * source.epoch_size // source.batch_size)
    return [name for s in range(steps) for name in names(source.batch(s, range(source.batch_size)))]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 23])
@pytest.mark.parametrize("options", [{}, {"group_by_length": True}])
def test_each_record_comes_once_an_epoch(processor, write, batch_size, options) -> None:
    path = write([*records(7), *records(17, images=1)[7:]])
    source = source_of(processor, path, batch_size, **options)
    assert source.epoch_size == 17
    seen = epochs(source, 3)
    whole = [seen[i * 17 : (i + 1) * 17] for i in range(3)]
    for epoch in whole:
        assert sorted(epoch) == sorted(NAMES[:17])
    assert whole[0] != whole[1] != whole[2]


@pytest.mark.parametrize("options", [{}, {"group_by_length": True}, {"packing": True, "max_length": 24}])
def test_samples_depend_on_nothing_that_was_asked_before(processor, write, options) -> None:
    path = write(records(13, images=1))
    source = source_of(processor, path, **options)
    forward = [source.samples(step, range(4)) for step in range(6)]
    other = source_of(processor, path, **options)  # as after a restart, from the middle, by two processes
    for step in (5, 2, 4):
        halves = other.samples(step, [1, 3]), other.samples(step, [0, 2])
        resumed = [halves[1][0], halves[0][0], halves[1][1], halves[0][1]]
        for ours, theirs in zip(resumed, forward[step], strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    differently = source_of(processor, path, seed=4, **options)
    assert epochs(differently, 2) != epochs(source, 2)


def test_without_shuffling_records_come_in_their_order(processor, write) -> None:
    source = source_of(processor, write(records(6)), shuffle=False)
    assert epochs(source, 2) == NAMES[:6] * 2


def test_batches_are_of_like_length_and_one_kind(processor, write) -> None:
    path = write([*records(20), *records(40, images=1)[20:]])
    source = source_of(processor, path, batch_size=5, group_by_length=True)
    spread, images = [], []
    for step in range(8):
        samples = source.samples(step, range(5))
        spread.append(np.ptp([len(sample["input_ids"]) for sample in samples]))
        images.append({len(sample["images"]) for sample in samples})
    assert all(len(kinds) == 1 for kinds in images)
    assert np.mean(spread) <= 2
    # Where epochs are no whole steps, the next ones begin in the middle of one and are grouped from there.
    odd = source_of(processor, path, batch_size=7, group_by_length=True)
    kinds = [{len(s["images"]) for s in odd.samples(step, range(7))} for step in range(40)]
    assert sum(len(kind) > 1 for kind in kinds) <= 14  # one at each border, and one of what is left over
    shuffled = source_of(processor, path, batch_size=5)
    assert any(len({len(s["images"]) for s in shuffled.samples(i, range(5))}) > 1 for i in range(8))


def test_files_are_mixed_by_weight(processor, write) -> None:
    one, two, three = (write(records(n), f"{n}.jsonl") for n in (10, 4, 6))
    files = [one, DataFile(path=two, weight=2), {"path": three, "weight": 0.5}]
    source = source_of(processor, files)
    assert source.epoch_size == 10 + 8 + 3
    both = Counter(epochs(source, 4)[: 4 * source.epoch_size])
    assert both[NAMES[9]] == 4  # once an epoch
    assert both[NAMES[5]] == 4 + 2  # and every other one
    assert both[NAMES[0]] == 4 + 8 + 2  # and twice


def test_files_are_interleaved_anew_in_each_epoch(processor, write) -> None:
    one, two = write(records(9), "one.jsonl"), write(records(18)[9:], "two.jsonl")
    source = source_of(processor, [one, two], batch_size=18)
    first, second = ([name in NAMES[:9] for name in names(source.batch(e, range(18)))] for e in (0, 1))
    assert sum(first) == sum(second) == 9
    assert first != second


def test_packed_rows_are_full_of_whole_samples(processor, write) -> None:
    path = write([*records(20), *records(40, images=1)[20:]])
    source = source_of(processor, path, packing=True, max_length=40)
    alone = source_of(processor, path, shuffle=False).samples(0, range(40))
    assert source.epoch_size < 16
    unseen = sorted(sample["input_ids"].tolist() for sample in alone)
    for i in range(source.epoch_size):
        (row,) = source.samples(0, [i])
        assert len(row["input_ids"]) <= 40
        sizes = row["documents"].bincount().tolist()
        for ids in row["input_ids"].split(sizes):
            unseen.remove(ids.tolist())
        assert names(source.batch(0, [i])) == [
            name for name in map(processor.tokenizer.id_to_token, row["input_ids"].tolist()) if name in NAMES
        ]
    assert unseen == []


def test_long_samples_are_cut_before_an_image(processor, write) -> None:
    turns = [("human", "n1 a"), ("gpt", "b"), ("human", "<image> a"), ("gpt", "b")]
    long = {"conversations": [{"from": w, "value": v} for w, v in turns], "image": "red.png"}
    source = source_of(processor, write([long]), max_length=12, batch_size=1)
    (sample,) = source.samples(0, [0])
    assert len(sample["images"]) == 0
    assert len(sample["input_ids"]) == 8  # <user> n1 a <end> <assistant> b <end> <user>
    assert (sample["labels"] != IGNORED).sum() == 2


def test_blended_samples_introduce_their_images(processor, write) -> None:
    two = llava(NAMES[20], images=2)
    system = {"messages": [{"role": "user", "content": NAMES[21]}, {"role": "assistant", "content": "b"}]}
    path = write([*records(20, images=1), two, system])
    options = {"blend": {"most": 3}, "image_words": "Image {n}:"}
    source = source_of(processor, path, batch_size=1, **options)
    assert sorted(epochs(source, 1)) == sorted(NAMES[:22])
    counts = Counter()
    for i in range(source.epoch_size):
        (messages,) = source.batch(i, [0])
        counts[len(images_of(messages))] += 1
        parts = list(parts_of(messages))
        words = [parts[k - 1]["text"] for k, part in enumerate(parts) if part["type"] == "image"]
        assert words == [f"Image {n}:" for n in range(1, len(words) + 1)]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        if NAMES[20] in names([messages]) or NAMES[21] in names([messages]):
            assert len(messages) == 2  # of two images or of none: they stay alone
        (sample,) = source.samples(i, [0])
        assert len(sample["images"]) == len(words)
    assert counts[0] == 1
    assert counts[3] >= 2
    limited = source_of(processor, path, batch_size=1, max_length=30, packing=True, **options)
    for i in range(limited.epoch_size):
        (row,) = limited.samples(0, [i])
        assert len(row["input_ids"]) <= 30
        assert (row["labels"] != IGNORED).sum() == 2 * len(names(limited.batch(0, [i])))  # nothing was cut


def test_words_are_written_before_each_image() -> None:
    image = {"type": "image", "image": "x"}
    messages = [{"role": "user", "content": [image, image]}, {"role": "assistant", "content": "Image {n}:"}]
    introduced = introduce_images(messages, "No. {n}")
    assert [part.get("text") for part in introduced[0]["content"]] == ["No. 1", None, "No. 2", None]
    assert introduced[1] == messages[1]
    assert len(messages[0]["content"]) == 2


BAD = [
    "{",
    llava("n0", images=1) | {"image": "no.png"},
    llava("n1") | {"image": "red.png"},
    llava("n2", words=30),
    llava("n3 <end>"),
]


def test_bad_records_are_told_of_or_an_error(processor, write, tmp_path, capsys) -> None:
    path = write([*records(3), *BAD, *records(9)[3:]])
    told: list[str] = []
    config = FilesConfig(path=path, max_length=20, bad_records="skip")
    source = FilesSource(config, processor, 0, 4, told.append)
    assert sorted(epochs(source, 1)[:9]) == sorted(NAMES[:9])
    (report,) = source.reports
    assert (report.skipped, report.total) == (5, 14)
    assert told == [report.summary()]
    assert told[0].startswith(f"{path}: 5 of 14 records skipped: 1 broken JSON (line 4: Expecting")
    for part in (
        "1 missing image (line 5: no.png)",
        "1 wrong count of <image> (line 6: 0 for 1 images)",
        "1 nothing to learn within max_length (line 7: 36 tokens)",
        "1 refused by the processor (line 8: message 0: the text holds '<end>'",
    ):
        assert part in told[0]
    source_of(processor, path, max_length=20, bad_records="skip")
    assert capsys.readouterr().err == f"pyvlm: {told[0]}\n"  # unless somebody else is to be told
    with pytest.raises(ValueError, match=r"5 of 14 records bad: .*; mend them, or leave them out"):
        source_of(processor, path, max_length=20)
    for nothing in (write(BAD[:1], "a.jsonl"), write([], "b.jsonl")):
        with pytest.raises(ValueError, match=r"nothing to learn from|holds no records"):
            source_of(processor, nothing, bad_records="skip")


def test_an_image_that_is_damaged_later_is_named(processor, write, tmp_path) -> None:
    source = source_of(processor, write(records(1, images=1)), batch_size=1)
    (tmp_path / "red.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"data\.jsonl, line 1: .*red\.png': not an image"):
        source.samples(0, [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "give max_length"),
        ({"packing": True, "max_length": 9, "group_by_length": True}, "nothing to group"),
        ({"group_by_length": True, "shuffle": False}, "need shuffle"),
        ({"blend": {}, "shuffle": False}, "need shuffle"),
        ({"blend": {"most": 1}}, "greater than or equal to 2"),
        ({"image_words": " "}, "give the words before an image"),
        ({"path": []}, "at least 1"),
        ({"path": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"max_lenght": 3}, "Extra inputs"),
    ],
)
def test_configs_that_contradict_themselves(options, message) -> None:
    with pytest.raises(ValidationError, match=message):
        FilesConfig.model_validate({"source": "files", "path": "a.jsonl", **options})


def test_each_file_may_have_its_own_folder_of_images() -> None:
    config = FilesConfig(path=["a.json", {"path": "b.json", "images": "there"}], images="here")
    assert [(file.path, file.images) for file in config.files] == [("a.json", "here"), ("b.json", "there")]


def test_image_words_of_data_and_model_are_not_both_written(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    processor = load_recipe("demo").processor()
    processor.config = processor.config.model_copy(update={"image_words": "image {n}: "})
    with pytest.raises(ValueError, match="image_words are given twice"):
        FilesSource(FilesConfig(path=str(data), image_words="Image {n}:"), processor, 0, 1)

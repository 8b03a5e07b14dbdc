"""Lengths that are kept: found again, never found where anything has changed, whole or not there."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyvlm.data import files
from pyvlm.data.files import FilesConfig, FilesSource
from pyvlm.models import ImageConfig, Processor, ProcessorConfig, word_level_tokenizer
from pyvlm.training.recipe import load_recipe
from pyvlm.training.runfolder import RunFolder

NAMES = [f"n{i}" for i in range(24)]


def make_processor(words=(), **changes) -> Processor:
    config = ProcessorConfig(image=ImageConfig(size=4), tokens_per_image=5)
    return Processor(word_level_tokenizer([*NAMES, "a b Image 1 2 3 :", *words]), config).changed(**changes)


def record(name: str) -> dict:
    turns = [{"from": "human", "value": f"<image> {name}"}, {"from": "gpt", "value": "b a"}]
    return {"image": "red.png", "conversations": turns}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    (tmp_path / "data.json").write_text(json.dumps([record(name) for name in NAMES]))
    return tmp_path / "data.json"


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """The files that are scanned, one entry a scan."""
    seen = []

    def scan(file, *rest):
        seen.append(file.path.name)
        return original(file, *rest)

    original = files.scan
    monkeypatch.setattr(files, "scan", scan)
    return seen


def open_source(data: Path, cache: Path | None, processor=None, tell=pytest.fail, seed=0, **options):
    config = FilesConfig(path=str(data), **options)
    return FilesSource(config, processor or make_processor(), seed, 4, tell, cache)


OPTIONS = [
    {},
    {"group_by_length": True},
    {"max_length": 32, "packing": True},
    {"max_length": 64, "packing": True, "blend": {"most": 3}, "image_words": "Image {n}:"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_was_found_is_not_looked_for_again(data, tmp_path, scans, monkeypatch, options) -> None:
    fresh = open_source(data, None, **options)
    first = open_source(data, tmp_path / "cache", **options)
    assert scans == ["data.json"] * 2
    monkeypatch.setattr(files, "measure", lambda *_: pytest.fail("measured again"))
    again = open_source(data, tmp_path / "cache", **options)
    assert len(scans) == 2
    assert again.epoch_size == first.epoch_size == fresh.epoch_size
    for step in range(3):
        assert again.batch(step, range(4)) == first.batch(step, range(4)) == fresh.batch(step, range(4))
    assert [vars(report) for report in again.reports] == [vars(report) for report in fresh.reports]
    assert not list((tmp_path / "cache").glob(".*"))


def rewrite(data: Path) -> None:
    text = data.read_text()
    data.write_text(text.replace("n23", "n2 "))  # as many bytes
    os.utime(data, ns=(0, 1))


CHANGES = {
    "the file": (rewrite, {}),
    "max_length": (None, {"max_length": 20}),
    "image_words": (None, {"image_words": "Image {n}:"}),
    "format": (None, {"format": "llava"}),
    "images": (None, {"images": "elsewhere"}),
    "vocabulary": (None, {"processor": make_processor(["c"])}),
    "tokens": (None, {"processor": make_processor(tokens_per_image=6)}),
    "form": (None, {"processor": make_processor(form="plain")}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_is_read_anew(data, tmp_path, scans, what: str) -> None:
    open_source(data, tmp_path / "cache")
    change, options = CHANGES[what]
    if change is not None:
        change(data)
    if what == "images":
        (tmp_path / "elsewhere").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "red.png")
        options = {"images": str(tmp_path / "elsewhere")}
    for count in (2, 2):
        open_source(data, tmp_path / "cache", **options)
        assert len(scans) == count
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_blends_of_another_seed_are_measured_anew(data, tmp_path, scans) -> None:
    for seed in (0, 1, 1):
        open_source(data, tmp_path / "cache", seed=seed, blend={"most": 2})
    assert len(scans) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_folders_are_known_by_all_their_files(tmp_path, scans) -> None:
    datasets = pytest.importorskip("datasets")
    table = [{"messages": [{"role": "user", "content": "n1"}, {"role": "assistant", "content": "b"}]}] * 3
    for name in ("a", "b"):
        datasets.Dataset.from_list(table).to_parquet(tmp_path / "table" / f"{name}.parquet")
    for count in (1, 1):
        assert open_source(tmp_path / "table", tmp_path / "cache").epoch_size == 6
        assert len(scans) == count
    datasets.Dataset.from_list(table[:1]).to_parquet(tmp_path / "table" / "b.parquet")
    assert open_source(tmp_path / "table", tmp_path / "cache").epoch_size == 4


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off", None])
def test_a_damaged_entry_is_made_again(data, tmp_path, scans, damage: bytes | None) -> None:
    open_source(data, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    for count in (2, 2):
        open_source(data, tmp_path / "cache")
        assert len(scans) == count
    with np.load(entry) as arrays:
        assert len(arrays["lengths"]) == len(NAMES)


def test_where_nothing_can_be_kept_that_is_told(data, tmp_path, scans) -> None:
    (tmp_path / "cache").write_text("a file")
    told: list[str] = []
    source = open_source(data, tmp_path / "cache", tell=told.append)
    assert source.epoch_size == len(NAMES)
    assert len(told) == 1
    assert "lengths cannot be kept there" in told[0]


def test_bad_records_are_told_of_each_time(data, tmp_path, scans) -> None:
    content = json.loads(data.read_text())
    data.write_text(json.dumps([*content, {"conversations": []}]))
    told: list[str] = []
    for _ in range(2):
        open_source(data, tmp_path / "cache", tell=told.append, bad_records="skip")
    assert len(scans) == 1
    assert told == [f"{data}: 1 of 25 records skipped: 1 zero turns (line 1)"] * 2
    with pytest.raises(ValueError, match="1 of 25 records bad"):
        open_source(data, tmp_path / "cache")
    assert len(scans) == 1


def test_the_config_names_another_folder(data, tmp_path, scans) -> None:
    open_source(data, tmp_path / "one")
    config = FilesConfig(path=str(data), cache=str(tmp_path / "two"))
    for _ in range(2):
        FilesSource(config, make_processor(), 0, 4, pytest.fail, tmp_path / "one")
    assert len(scans) == 2
    assert len(list((tmp_path / "two").iterdir())) == 1


def test_a_run_may_go_on_with_another_cache(tmp_path) -> None:
    recipe = load_recipe("demo")
    held_out = FilesConfig(path="a.json", cache="one")
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"data": held_out})})
    with RunFolder(tmp_path, recipe):
        pass
    for update, message in (({"cache": None}, None), ({"max_length": 9}, "max_length was None and is now 9")):
        changed = recipe.evaluation.model_copy(update={"data": held_out.model_copy(update=update)})
        folder = RunFolder(tmp_path, recipe.model_copy(update={"evaluation": changed}))
        if message is None:
            with folder:
                pass
        else:
            with pytest.raises(ValueError, match=message):
                folder.__enter__()

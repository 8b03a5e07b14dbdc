"""Data files as conversations: the two forms, every kind of file, and every kind of bad record."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyvlm.data.bad_records import BadRecord, Report
from pyvlm.data.readers import RecordFile, is_data
from pyvlm.data.records import conversation, decode_image, images_of

RED, BLUE = "red.png", "sub/blue.png"


def png(colour: str, size: tuple[int, int] = (6, 4), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / RED).write_bytes(png("red"))
    (tmp_path / BLUE).write_bytes(png("blue"))
    return tmp_path


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def shown(path: Path) -> dict:
    return {"type": "image", "image": str(path)}


def llava(*turns: tuple[str, str], **keys) -> dict:
    return {"conversations": [{"from": who, "value": value} for who, value in turns], **keys}


def said(*turns: tuple[str, object], **keys) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **keys}


def test_llava_records(folder: Path) -> None:
    record = llava(
        ("system", "be brief"),
        ("human", "<image>\nwhat is <image>this?"),
        ("gpt", "red, blue"),
        ("human", "and now?"),
        ("gpt", "still"),
        id="x",
        image=[RED, BLUE],
    )
    assert conversation(record, folder) == [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [shown(folder / RED), text("\nwhat is "), shown(folder / BLUE), text("this?")],
        },
        {"role": "assistant", "content": "red, blue"},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "still"},
    ]
    alone = llava(("human", "<image>"), ("gpt", "red"), image=RED)
    assert conversation(alone, folder)[0]["content"] == [shown(folder / RED)]


def test_messages_fill_their_images_in_reading_order(folder: Path) -> None:
    own = {"type": "image", "image": BLUE, "text": None}  # as tables give parts
    parts = [text("a"), {"type": "image"}, own, text("b <image>c")]
    record = said(("user", parts), ("assistant", [text("d"), text("e")]), images=[RED, {"path": BLUE}])
    assert conversation(record, folder) == [
        {
            "role": "user",
            "content": [
                *(text("a"), shown(folder / RED), shown(folder / BLUE)),
                *(text("b "), shown(folder / BLUE), text("c")),
            ],
        },
        {"role": "assistant", "content": "de"},
    ]
    absolute = said(("user", "<image>"), ("assistant", "x"), image=str(folder / RED))
    assert images_of(conversation(absolute, Path("elsewhere"))) == [str(folder / RED)]


def test_images_as_bytes_are_decoded_late_and_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    data = {"bytes": png("red", (6, 4), exif=exif), "path": "red.png"}
    picture = Image.new("RGB", (2, 2))
    record = said(("user", "<image><image>"), ("assistant", "x"), images=[data, picture])
    upright, same = images_of(conversation(record, Path()))
    assert upright.size == (4, 6)
    assert upright.getpixel((0, 0)) == (255, 0, 0)
    assert same is picture
    cut = {"bytes": png("red", (90, 90))[:100]}
    (late,) = images_of(conversation(said(("user", "<image>"), ("assistant", "x"), image=cut), Path()))
    with pytest.raises(BadRecord, match="unreadable image"):
        decode_image(late)


GOOD = ("human", "hello"), ("gpt", "hi")


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ([1], "not an object", "list"),
        ({"id": 3}, "no conversation", "expected messages or conversations, got the keys id"),
        ({"messages": "hello"}, "no conversation", "must be a list"),
        (llava(), "zero turns", ""),
        (said(), "zero turns", ""),
        ({"messages": ["hello"]}, "not an object", "message 0 is a str"),
        (llava(("human", "hello")), "no assistant turn", ""),
        (llava(*GOOD, ("bard", "o")), "unknown role", "message 2: 'bard' is none of human, gpt, system"),
        (llava(("user", "hello"), ("gpt", "hi")), "unknown role", "'user'"),
        (said(("human", "hello")), "unknown role", "message 0: 'human' is none of system, user, assistant"),
        ({"messages": [{"content": "x"}]}, "unknown role", "None"),
        (llava(("human", None), ("gpt", "x")), "no text", "message 0: its content is NoneType"),
        (llava(("human", ["x"]), ("gpt", "x")), "no text", "list"),
        (said(("user", [{"type": "video"}]), ("assistant", "x")), "unknown part", "{'type': 'video'}"),
        (said(("user", ["hello"]), ("assistant", "x")), "unknown part", "'hello'"),
        (llava(*GOOD, image=RED), "wrong count of <image>", "0 for 1 images"),
        (llava(("human", "<image>"), ("gpt", "x")), "wrong count of <image>", "more of them than images"),
        (said(("user", "<image><image>"), ("assistant", "x"), images=[RED]), "wrong count of <image>", ""),
        (llava(("human", "<image>"), ("gpt", "x"), image="no.png"), "missing image", "no.png"),
        (llava(("human", "<image>"), ("gpt", "x"), image="sub"), "missing image", "sub"),
        (
            llava(("human", "<image>"), ("gpt", "x"), image=[None]),
            "missing image",
            "expected a path, got None",
        ),
        (said(("user", "<image>"), ("assistant", "x"), image={"bytes": b"x"}), "unreadable image", "1 bytes"),
    ],
)
def test_bad_records(folder: Path, record, reason: str, detail: str) -> None:
    with pytest.raises(BadRecord) as caught:
        conversation(record, folder)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_a_form_that_is_asked_for() -> None:
    both = {**llava(*GOOD), **said(("user", "u"), ("assistant", "a"))}
    assert conversation(both, Path())[0]["content"] == "u"
    assert conversation(both, Path(), "llava")[0]["content"] == "hello"
    with pytest.raises(BadRecord, match="expected conversations, got the keys messages"):
        conversation(said(("user", "u"), ("assistant", "a")), Path(), "llava")


RECORDS = [llava(("human", f"héllo {i} 🦆"), ("gpt", "hi\n" * i)) for i in range(4)]


def lines(records) -> str:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", lines(RECORDS), [1, 2, 3, 4]),
        ("a.jsonl", "\n \r\n" + lines(RECORDS).replace("\n", "\r\n\r\n") + "\n", [3, 5, 7, 9]),
        ("a.json", lines(RECORDS), [1, 2, 3, 4]),  # some call JSON lines so
        ("a.json", json.dumps(RECORDS), [1, 1, 1, 1]),
        ("a.json", "\n[\n" + lines(RECORDS).replace("\n", "\n,\n ") + "\n]\n", [3, 5, 7, 9]),
        ("a.json", json.dumps(RECORDS, indent=1, ensure_ascii=False), [2, 14, 26, 38]),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_by_record(tmp_path: Path, name: str, content: str, places: list[int], mark: str) -> None:
    (tmp_path / name).write_bytes((mark + content).encode())
    file = RecordFile(tmp_path / name)
    assert len(file) == 4
    for i in (2, 0, 3, 1):
        record = file[i]
        assert record.messages[0]["content"] == f"héllo {i} 🦆"
        assert record.messages[1]["content"] == "hi\n" * i
        assert record.where == f"{tmp_path / name}, line {places[i]}"


def test_broken_lines_are_records_of_their_own(tmp_path: Path) -> None:
    good = json.dumps(RECORDS[0]).encode()
    nested = b"[" * 100_000
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, b'{"messages": ', b'"\xff"', nested, good]))
    file = RecordFile(path)
    assert len(file) == 5
    assert file[4].messages
    for i in (1, 2, 3):
        with pytest.raises(BadRecord) as caught:
            file[i]
        assert caught.value.reason == "broken JSON"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n{"b": ]', "line 2: broken JSON"),
        (b'[{"a": 1}\n{"b": 2}]', "line 1: broken JSON (expected , or ]"),
        (b'[{"a": 1}', "line 1: broken JSON"),
        (b"[{}] x", "more after the list's end"),
        (b'["\xff"]', "broken JSON"),
        (b"[]", "holds no records"),
        (b" \n\n", "holds no records"),
        (b"", "holds no records"),
    ],
)
def test_files_that_are_no_data(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json") as caught:
        RecordFile(path)
    assert message in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for name in ("no.jsonl", "no.json", "no.parquet"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            RecordFile(tmp_path / name)
    (tmp_path / "a.jsonl").write_text(lines(RECORDS))
    with pytest.raises(ValueError, match="no such folder of images"):
        RecordFile(tmp_path / "a.jsonl", images=tmp_path / "pictures")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"broken.parquet: cannot be read as a table"):
        RecordFile(tmp_path / "broken.parquet")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        RecordFile(tmp_path)
    assert is_data("no/such.jsonl")
    assert is_data(tmp_path)
    assert not is_data("demo")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch):
    """The datasets library, which keeps nothing outside of the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def test_tables(folder: Path, tables) -> None:
    rows = [
        said(("user", [{"type": "image"}, text(f"what {i}?")]), ("assistant", [text("red")]))
        for i in range(3)
    ]
    for row in rows:
        row["images"] = [Image.new("RGB", (5, 4), "red")]
    features = tables.Features(
        {
            "messages": tables.List(
                {
                    "role": tables.Value("string"),
                    "content": tables.List({k: tables.Value("string") for k in ("type", "text")}),
                }
            ),
            "images": tables.List(tables.Image()),
        }
    )
    for row in rows:
        for message in row["messages"]:
            message["content"] = [{"type": p["type"], "text": p.get("text")} for p in message["content"]]
    table = tables.Dataset.from_list(rows, features=features)
    (folder / "parts").mkdir()
    table.to_parquet(folder / "one.parquet")
    table.select([0, 1]).to_parquet(folder / "parts" / "a.parquet")
    table.select([2]).to_parquet(folder / "parts" / "b.parquet")
    table.save_to_disk(folder / "saved")
    tables.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(folder / "splits")
    for name in ("one.parquet", "parts", "saved", "splits"):
        file = RecordFile(folder / name)
        assert len(file) == 3
        record = file[2]
        picture, words = record.messages[0]["content"]
        assert words == text("what 2?")
        assert np.asarray(picture["image"]).tolist() == np.full((4, 5, 3), (255, 0, 0)).tolist()
        assert record.messages[1] == {"role": "assistant", "content": "red"}
        assert record.where == f"{folder / name}, row 3"
    unclear = tables.DatasetDict({"one": table, "two": table})
    unclear.save_to_disk(folder / "unclear")
    with pytest.raises(ValueError, match="has the splits one, two"):
        RecordFile(folder / "unclear")


def test_image_paths_of_tables_are_beside_them(folder: Path, tables) -> None:
    table = tables.Dataset.from_list([llava(("human", "<image>"), ("gpt", "red"), image=RED)])
    table.to_parquet(folder / "a.parquet")
    assert images_of(RecordFile(folder / "a.parquet")[0].messages) == [str(folder / RED)]
    table.save_to_disk(folder / "sub" / "saved")
    with pytest.raises(BadRecord, match="missing image"):
        RecordFile(folder / "sub" / "saved")[0]
    assert RecordFile(folder / "sub" / "saved", images=folder)[0].messages


def test_the_report_counts_by_reason() -> None:
    report = Report("data.jsonl", total=5003)
    assert report.summary() == "data.jsonl: 0 of 5,003 records skipped"
    for i in range(3):
        report.add(f"line {i}", BadRecord("unknown role"))
    for i in range(9):
        report.add(f"line {i + 17}", BadRecord("missing image", f"{i}.png"))
    assert report.skipped == 12
    assert report.summary() == (
        "data.jsonl: 12 of 5,003 records skipped: 9 missing image (line 17: 0.png, line 18: 1.png, "
        "line 19: 2.png, line 20: 3.png, line 21: 4.png, …), 3 unknown role (line 0, line 1, line 2)"
    )

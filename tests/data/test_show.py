"""`pyvlm data show` and `pyvlm data check`: what they print, of what, and their mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_languages
from models.chat_folders import FAMILIES, write_folder
from PIL import Image

from pyvlm.cli import main
from pyvlm.data.packing import encode, pack_samples
from pyvlm.data.show import draw_mask, format_sample, sample_layout
from pyvlm.layout import TokenLayout
from pyvlm.models.vlm import VLM
from pyvlm.training.recipe import load_recipe

RECORD = {
    "conversations": [
        {"from": "human", "value": "image 1:<image>\nimage 2:<image>"},
        {"from": "gpt", "value": "3 zebra"},
    ],
    "image": ["one.png", "one.png"],
}
TABLE = """\
20 tokens, 3 of them learnt, 2 images

place  id  text         label  kind     position  sees
    0   3  <user>       ·      text     0         text 0
    1  33  image        ·      text     1         text 0-1
    2   8  1            ·      text     2         text 0-2
    3  26  :            ·      text     3         text 0-3
  4-7   2  <image> ×4   ·      image 1  4-7       image 4 … image 7
    8  33  image        ·      text     8         text 0-8, image 0-8
    9  18  2            ·      text     9         text 0-9, image 0-9
   10  26  :            ·      text     10        text 0-10, image 0-10
11-14   2  <image> ×4   ·      image 2  11-14     image 11 … image 14
   15   5  <end>        ·      text     15        text 0-15, image 0-15
   16   4  <assistant>  ·      text     16        text 0-16, image 0-16
   17  19  3            19     text     17        text 0-17, image 0-17
   18   1  <unk>        1      text     18        text 0-18, image 0-18
   19   5  <end>        5      text     19        text 0-19, image 0-19

mask of rule mmca:

1...................
11..................
111.................
1111................
....2...............
.....2..............
......2.............
.......2............
111122221...........
1111222211..........
11112222111.........
...........2........
............2.......
.............2......
..............2.....
1111222211122221....
11112222111222211...
111122221112222111..
1111222211122221111.
11112222111222211111

seen: 1 text keys, 2 image keys, + both; . nothing
"""  # noqa: RUF001


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Four good records, and two bad ones."""
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "one.png")
    plain = {"messages": [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d"}]}
    lines = [RECORD, plain, plain, "not an object", plain, RECORD | {"image": "one.png"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(tmp_path / "data.jsonl")


def test_show_prints_the_sample_token_by_token(data: str, tmp_path: Path, capsys) -> None:
    assert main(["data", "show", data, "--recipe", "demo", "--png", str(tmp_path / "mask.png")]) == 0
    printed = capsys.readouterr().out
    path = Path(data).parent / "one.png"
    assert printed == (
        f"{data}, line 1\n\nuser:\n  image 1:\n  <image: {path}>\n  \n  image 2:\n  <image: {path}>\n"
        f"\nassistant:\n  3 zebra\n\n{TABLE}"
    )
    with Image.open(tmp_path / "mask.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_show_of_a_saved_model_and_a_cut(data: str, tmp_path: Path, capsys) -> None:
    recipe = load_recipe("demo")
    language = recipe.model.language.model_copy(update={"attention_rule": "causal"})
    model = VLM(recipe.model.model_copy(update={"language": language}))
    model.save_pretrained(tmp_path / "run" / "model", recipe.processor())
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        assert main(["data", "show", data, "--model", str(folder), "--max-length", "9"]) == 0
        printed = capsys.readouterr().out
        assert "9 tokens, 0 of them learnt, 1 images" in printed
        assert "  4-7   2  <image> ×4  ·      image 1  4-7       0-4 … 0-7\n" in printed  # noqa: RUF001
        assert "mask of rule causal" in printed


def test_show_of_a_full_size_recipe_takes_the_template_of_its_language_model(
    data: str, tmp_path: Path, capsys
) -> None:
    tiny_languages.save("llama", write_folder(tmp_path / "lm", FAMILIES["llama-3"]), vocab_size=400)
    options = ["--recipe", "llava-1.5", "--lm", str(tmp_path / "lm"), "--set", "wording.chat_template=null"]
    assert main(["data", "show", data, *options]) == 0
    printed = capsys.readouterr().out
    assert "<|start_header_id|>" in printed
    assert "<image> ×576" in printed  # noqa: RUF001
    assert main(["data", "check", data, *options]) == 0
    assert "\ntokens: " in capsys.readouterr().out


def test_documents_of_a_pack_do_not_see_each_other() -> None:
    recipe = load_recipe("demo")
    processor = recipe.processor()
    alone = encode(processor, [{"role": "assistant", "content": "3"}])
    packed = pack_samples([alone, alone])
    lines = format_sample(packed, sample_layout(packed, recipe.model), recipe.model, processor).splitlines()
    assert lines[0] == "6 tokens, 4 of them learnt, 0 images"
    assert lines[6].split() == ["3", "4", "<assistant>", "·", "text", "0", "text", "3"]
    assert lines[-8:-2] == ["1.....", "11....", "111...", "...1..", "...11.", "...111"]


def test_long_masks_are_drawn_in_cells() -> None:
    layout = TokenLayout(torch.ones(1, 100, dtype=torch.uint8))
    lines = list(draw_mask(layout.spans("causal"), side=10))
    assert lines[:10] == ["1" * (i + 1) + "." * (9 - i) for i in range(10)]
    assert lines[-1] == "seen: 1 keys; . nothing; a cell is 10 by 10 tokens"


def test_check_counts(data: str, capsys) -> None:
    assert main(["data", "check", data]) == 0
    assert capsys.readouterr().out == (
        f"{data}: 6 records, 4 of them good\n"
        "turns: 8, 2 to 2 a record, 2.0 on average\n"
        "images: 2, 0 to 2 a record, 0.5 on average; 3 records have none\n"
        "words: 18, 4 to 6 a record, 4.5 on average\n"
        "\n"
        "4 to 4  3 ████████████████████████████████████████\n"
        "5 to 5  0\n"
        "6 to 6  1 █████████████\n"
        "\n"
        f"{data}: 2 of 6 records bad: 1 not an object (line 4: got str), 1 wrong count of <image> "
        "(line 6: more of them than images)\n"
    )
    assert main(["data", "check", data, "--recipe", "demo", "--strict"]) == 2
    printed, complaint = capsys.readouterr()
    assert "\ntokens: 44, 8 to 20 a record, 11.0 on average\n" in printed
    assert complaint == f"pyvlm: {data}: 2 of 6 records are bad\n"
    assert main(["data", "check", data, "--recipe", "demo", "--max-length", "6"]) == 0
    assert "4 nothing to learn within max_length" in capsys.readouterr().out


def test_check_decodes_where_asked(data: str, capsys) -> None:
    image = Path(data).parent / "one.png"
    image.write_bytes(image.read_bytes()[:40])
    assert main(["data", "check", data, "--strict"]) == 2
    assert "unreadable" not in capsys.readouterr().out
    assert main(["data", "check", data, "--decode"]) == 0
    assert "1 unreadable image (line 1: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "no.jsonl"], "no.jsonl: cannot be read"),
        (["show", "DATA", "--index", "6"], "has 6 records, 0 to 5: there is no 6"),
        (["show", "DATA", "--index", "3"], "line 4: not an object: got str"),
        (["show", "DATA", "--png", "x.png"], "give --model FOLDER or --recipe RECIPE"),
        (["check", "DATA", "--max-length", "3"], "give --model FOLDER or --recipe RECIPE"),
        (["show", "DATA", "--model", "no/such"], "no such folder"),
        (["show", "DATA", "--recipe", "demo", "--png", "no/such/mask.png"], "no/such/mask.png: cannot be"),
        (["check", "DATA", "--images", "no/such"], "no such folder of images"),
        (["show", "DATA", "--recipe", "llava-1.5"], "give its folder with --lm"),
        (["show", "DATA", "--lm", "x", "--seed", "0"], "--lm, --seed: of a recipe, and none is named"),
        (["check", "DATA", "--recipe", "demo", "--variant", "slow"], "no variant 'slow'"),
    ],
)
def test_mistakes_are_one_line(data: str, arguments: list[str], message: str, capsys) -> None:
    assert main(["data", *(data if word == "DATA" else word for word in arguments)]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.startswith("pyvlm: ")
    assert complaint.count("\n") == 1

"""Checkpoints of transformers on the command line: chat, eval, train --from, export, and back to chat."""

import json
from pathlib import Path

import pytest
from integrations.llava_folders import QUESTION, picture, save_llava

from pyvlm.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_llava(folder / "llava")
    picture(31, 17).save(folder / "one.png")
    return folder


def test_chat_answers(folder, capsys):
    command = [
        "chat",
        str(folder / "llava"),
        "--image",
        str(folder / "one.png"),
        QUESTION,
        "--max-new-tokens",
        "5",
    ]
    assert main(command) == 0
    answer = capsys.readouterr().out
    assert answer.strip()
    assert main([*command, "--temperature", "9", "--seed", "1"]) == 0
    assert capsys.readouterr().out != answer


def test_chat_goes_on_in_rounds_and_after_mistakes(folder, capsys, monkeypatch):
    lines = iter([f"/image {folder / 'one.png'}", QUESTION, "/image none.png", "<image>", "/reset", QUESTION])

    def read(*_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", str(folder / "llava"), "--max-new-tokens", "5"]) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) >= 2
    told = [line for line in output.err.splitlines() if line.startswith("pyvlm: ")]
    assert [line.split()[1] for line in told] == ["image", "message"]


def test_eval_of_a_file(folder, tmp_path, capsys):
    record = {
        "image": str(folder / "one.png"),
        "question": f"<image>\n{QUESTION}",
        "answer": "a cat",
        "type": "easy",
    }
    (tmp_path / "vqa.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    options = ["--json", str(tmp_path / "out.json"), "--max-new-tokens", "4", "--batch-size", "2"]
    assert main(["eval", str(folder / "llava"), str(tmp_path / "vqa.jsonl"), *options]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["results"][-1]["questions"] == 3
    assert "asked" in capsys.readouterr().out


def test_eval_on_digits_is_refused(folder, capsys):
    assert main(["eval", str(folder / "llava")]) == 2
    assert "is of transformers" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run that a checkpoint was trained in for a few steps, without a recipe being named."""
    few = [
        f"stages.{stage}.{what}" for stage in ("align", "instruct") for what in ("steps=1", "batch_size=2")
    ]
    settings = [word for setting in (*few, "trackers=[]") for word in ("--set", setting)]
    command = ["train", "--tiny", "--from", str(folder / "llava"), "--out", str(folder / "run"), *settings]
    assert main(command) == 0
    return folder / "run"


def test_train_takes_the_recipe_of_the_kind(run):
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["name"] == "llava-1.5"
    assert recipe["model"]["pretrained"].endswith("llava")


def test_export_and_chat(run, folder, tmp_path, capsys):
    command = [
        "export",
        str(run),
        str(tmp_path / "out"),
        "--from",
        str(folder / "llava"),
        "--dtype",
        "bfloat16",
    ]
    assert main(command) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert main(["chat", str(tmp_path / "out"), QUESTION, "--max-new-tokens", "3"]) == 0
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train"], "give a RECIPE to train, or a checkpoint"),
        (["train", "demo", "--from", "{}/llava"], "does not fit the recipe"),
        (["train", "--from", "{}/nothing"], "no config.json there"),
        (["export", "{}/llava", "{}/out"], "is of transformers"),
        (["export", "{}/nothing", "{}/out"], "holds no model"),
        (["moe-report", "{}/llava", "demo"], "is of transformers"),
    ],
)
def test_mistakes_are_told_in_a_line(command, message, folder, capsys):
    assert main([word.format(folder) for word in command]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

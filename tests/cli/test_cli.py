import io
import json
import os
import subprocess
import sys

import pytest

from pyvlm.cli import main
from pyvlm.training.recipe import load_recipe


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder and the printed lines of `pyvlm demo --quick`."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        assert main(["demo", "--quick", "--out", str(folder)]) == 0
    return folder, printed.getvalue()


def test_demo_trains_evaluates_asks_and_reports(demo):
    folder, printed = demo
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stages = list(load_recipe("demo", "quick").stages)
    # One image and one question have a loss of their own, and so have the dialogues of all later stages.
    for dialogues in (stages[:1], stages[1:]):
        losses = [line["loss"] for line in metrics if line.get("stage") in dialogues]
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), dialogues
    assert {path.name for path in folder.iterdir()} >= {
        "report.html",
        "model",
        "checkpoint",
        "images",
        "tensorboard",
    }
    assert len(list((folder / "images").glob("*_shows_*.png"))) == 10
    assert "<svg" in (folder / "report.html").read_text()
    for word in ("which", "sum", "largest", "count", "all", "baseline", "held-out images of", "report.html"):
        assert word in printed
    assert f"pyvlm chat {folder} --image" in printed


def test_chat_answers_the_printed_command(demo, capsys):
    _, printed = demo
    command = next(line for line in printed.splitlines() if "pyvlm chat" in line)
    words = command[command.index("chat") :].split(' "')[0].split()
    assert main([*words, "which digit is in image 2?"]) == 0
    answer, complaints = capsys.readouterr()
    assert answer.strip()
    assert not complaints


def test_chat_holds_several_rounds(demo, capsys, monkeypatch):
    folder, _ = demo
    image = str(next((folder / "images").iterdir()))
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("which digit is in image 1?\n\nhow many images show a zebra?\n")
    )
    assert main(["chat", str(folder), "--image", image]) == 0
    answers, complaints = capsys.readouterr()
    assert len(answers.splitlines()) == 2
    assert complaints == "pyvlm: the model does not know the words: zebra\n"


def test_chat_takes_commands_from_a_pipe_and_goes_on_after_mistakes(demo, tmp_path, capsys, monkeypatch):
    folder, _ = demo
    image = next((folder / "images").iterdir())
    lines = ["which digit", "/image no.png", f"/image {image}", "which digit is in image 1?", "/fly"]
    lines.append(f"/save {tmp_path / 'chat.json'}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    options = ["--temperature", "1", "--top-p", "0.9", "--seed", "3", "--max-new-tokens", "4"]
    assert main(["chat", str(folder), *options]) == 0
    answers, complaints = capsys.readouterr()
    assert len(answers.splitlines()) == 2
    assert [line.split(" ")[1] for line in complaints.splitlines()] == ["image", "/fly", "saved"]
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [
        message["content"] for message in messages if message["role"] == "assistant"
    ] == answers.splitlines()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature must be at least 0"),
        (["--top-p", "2"], "top_p must be above 0"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--system", "be kind"], "the role must be"),
    ],
)
def test_chat_refuses_wrong_options(demo, options, message, capsys):
    assert main(["chat", str(demo[0]), "which digit", *options]) == 2
    assert message in capsys.readouterr().err


def test_eval_prints_the_table(demo, capsys):
    folder, _ = demo
    assert main(["eval", str(folder / "model"), "--dialogues", "8"]) == 0
    assert "baseline" in capsys.readouterr().out


def test_eval_of_a_file_of_questions(demo, tmp_path, capsys):
    folder, _ = demo
    image = str(next((folder / "images").iterdir()))
    records = [
        {
            "image": image,
            "question": "image 1: <image> which digit is in image 1?",
            "answer": "2",
            "type": kind,
        }
        for kind in ("easy", "hard", "easy")
    ]
    records.append({"image": "no.png", "question": "which digit", "answer": "2"})
    data = tmp_path / "vqa.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    results, predictions = tmp_path / "results.json", tmp_path / "predictions.jsonl"
    options = ["--json", str(results), "--predictions", str(predictions), "--max-new-tokens", "4"]
    assert main(["eval", str(folder), *options, str(data)]) == 0
    table, complaints = capsys.readouterr()
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [
        ["easy", "2"],
        ["hard", "1"],
        ["all", "3"],
    ]
    assert f"skipped {data}, line 4: missing image" in complaints
    assert "1 records skipped: 1 missing image" in complaints
    written = json.loads(results.read_text())
    assert written["skipped"] == {"missing image": 1}
    assert written["settings"]["max_new_tokens"] == 4
    assert [row["questions"] for row in written["results"]] == [2, 1, 3]
    assert len(predictions.read_text().splitlines()) == 3
    assert main(["eval", str(folder), str(data), "--limit", "1", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["all", "1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no.jsonl"], "no.jsonl: cannot be read"),
        (["{data}", "--strict"], "line 1: missing image"),
        (["{data}"], "holds no question"),
        (["{data}", "--dialogues", "3"], "--dialogues and --seed are of held-out digits"),
        (["{data}", "--json", "no/folder/x.json"], "there is no folder"),
    ],
)
def test_eval_refuses(demo, tmp_path, options, message, capsys):
    data = tmp_path / "vqa.jsonl"
    data.write_text('{"image": "no.png", "question": "which digit", "answer": "2"}\n')
    assert main(["eval", str(demo[0]), *(option.format(data=data) for option in options)]) == 2
    assert message in capsys.readouterr().err


def test_demo_again_evaluates_and_a_changed_one_is_refused(demo, capsys):
    folder, _ = demo
    before = (folder / "metrics.jsonl").read_bytes()
    assert main(["demo", "--quick", "--out", str(folder)]) == 0
    assert (folder / "metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    assert main(["demo", "--quick", "--seed", "1", "--out", str(folder)]) == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err


def test_train_takes_a_recipe_file(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("sede: 1\n")
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_env_tells_versions_and_backends(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for word in ("torch", "span_attention", "reference", "available"):
        assert word in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "no/such/run", "--image", "a.png", "hi"], "no/such/run holds no model"),
        (["chat", "no/such/run", "hi"], "no/such/run holds no model"),
        (["eval", "no/such/run"], "holds no model"),
        (["train", "no/such/recipe"], "no/such/recipe: cannot be read"),
        (["train", "demo", "--variant", "slow"], "no variant 'slow'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    out, complaint = capsys.readouterr()
    assert not out
    assert complaint.startswith("pyvlm: ")
    assert complaint.count("\n") == 1
    assert message in complaint


def test_picture_that_cannot_be_read(demo, tmp_path, capsys):
    folder, _ = demo
    (tmp_path / "torn.png").write_bytes(next((folder / "images").iterdir()).read_bytes()[:60])
    assert (
        main(["chat", str(folder), "--image", str(tmp_path / "torn.png"), "which digit is in image 1?"]) == 2
    )
    complaint = capsys.readouterr().err
    assert "torn.png" in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["demo", "--seed", "-1"], ["eval", "x", "--dialogues", "0"], ["fly"], []]
)
def test_bad_arguments_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: pyvlm" in capsys.readouterr().err


def test_output_may_be_cut_off():
    """Little output, so that it is written at the end, and what could not be written again at exit."""
    read, write = os.pipe()
    os.close(read)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "pyvlm.cli", "recipes"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")

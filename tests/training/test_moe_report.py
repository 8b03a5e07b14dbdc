"""`pyvlm moe-report`: counts against a loop over tokens, the table, JSON, the picture, and mistakes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pyvlm.cli import main
from pyvlm.models.vlm import VLM
from pyvlm.ops import Routing, threshold_choice
from pyvlm.training.conversation import dialogue_messages
from pyvlm.training.digits import DigitDialogues, DigitsConfig
from pyvlm.training.moe_report import ExpertReport, Load, Pathway, format_report, report_experts, top_experts

EXPERTS = {"layers": [0, 1], "num_experts": 3, "intermediate_size": 16, "top_k": 1}


def model_of(small_recipe, **moe):
    torch.manual_seed(0)
    recipe = small_recipe(model={"initializer_range": 0.3, "language": {"moe": EXPERTS | moe}})
    return VLM(recipe.model).eval(), recipe.processor()


def samples_of(processor, count):
    dialogues = DigitDialogues("test", DigitsConfig(), 0).batch(0, range(count))
    return [processor.encode(dialogue_messages(dialogue)) for dialogue in dialogues]


@pytest.fixture
def saved(tmp_path, small_recipe):
    model, processor = model_of(small_recipe)
    model.save_pretrained(tmp_path / "model", processor)
    return tmp_path / "model"


@pytest.fixture
def conversations(tmp_path):
    """Two lines; the second one's picture lies beside the file."""
    (tmp_path / "data").mkdir()
    pixels = (np.random.default_rng(0).random((8, 8)) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data" / "one.png")
    question = {"role": "user", "content": "how many images show a 3?"}
    picture = {"role": "user", "content": [{"type": "image", "image": "one.png"}]}
    reply = {"role": "assistant", "content": "0"}
    lines = [{"messages": [question, reply]}, {"messages": [picture, reply]}]
    path = tmp_path / "data" / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def test_top_experts_are_those_of_the_largest_weight():
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0], [3.0, 0.0, 3.0], [0.0, 0.0, 0.1]])
    routing = threshold_choice(logits, torch.tensor([0.35, 0.2, 0.4]))
    assert top_experts(routing).tolist() == [1, 1, 0, 1]
    nobody = threshold_choice(logits, torch.full((3,), 0.9))
    assert isinstance(nobody, Routing)
    assert top_experts(nobody).tolist() == [-1] * 4


@pytest.mark.parametrize("image_router", ["expert_choice", "token_choice"])
def test_counts_are_those_of_the_layers(small_recipe, image_router):
    model, processor = model_of(small_recipe, image_router=image_router, capacity_factor=0.7)
    model = model.double()  # so that no choice depends on how a batch's products round
    samples = samples_of(processor, 7)
    report = report_experts(model, processor, samples, batch_size=3)
    alone = [report_experts(model, processor, [sample]) for sample in samples]
    assert report.conversations == 7
    assert report.layers == [0, 1]
    for modality in ("text", "image"):
        assert report.tokens[modality] == sum(one.tokens[modality] for one in alone)
        for i, load in enumerate(report.loads[modality]):
            expected = [one.loads[modality][i].dispatched for one in alone]
            assert load.dispatched == [sum(counts) for counts in zip(*expected, strict=True)]
            # With one expert a token its top expert is all that it has, so that pathways give the loads.
            if modality == "text" or image_router == "token_choice":
                by_pathway = [0, 0, 0]
                for pathway in report.pathways[modality]:
                    by_pathway[pathway.experts[i]] += pathway.tokens
                assert by_pathway == load.dispatched
        ways = {pathway.experts: pathway.tokens for pathway in report.pathways[modality]}
        assert sum(ways.values()) == report.tokens[modality]
        assert list(ways.values()) == sorted(ways.values(), reverse=True)
        for one in alone:
            for pathway in one.pathways[modality]:
                ways[pathway.experts] -= pathway.tokens
        assert not any(ways.values())
    text_ids = sum(int((s["input_ids"] != processor.image_token_id).sum()) for s in samples)
    assert report.tokens["text"] == text_ids
    if image_router == "expert_choice":
        alone_in_first = sum(p.tokens for p in report.pathways["image"] if p.experts[0] == -1)
        assert report.loads["image"][0].unrouted == alone_in_first > 0


def test_the_table():
    load = Load([3, 1], [1, 0], 2)
    report = ExpertReport(
        2,
        {"text": 6, "image": 0},
        [4],
        {"text": [load], "image": [Load([0, 0], [0, 0], 0)]},
        {"text": [Pathway((0,), 3), Pathway((-1,), 2), Pathway((1,), 1)], "image": []},
    )
    assert format_report(report, top=2).splitlines() == [
        "2 conversations, 6 text and 0 image tokens",
        "",
        "layer      expert      text     image",
        "    4           0     75.0%      0.0%",
        "    4           1     25.0%      0.0%",
        "    4   (dropped)     20.0%      0.0%",
        "    4 (no expert)     33.3%      0.0%",
        "",
        "text: the commonest of 3 pathways through layers 4",
        "   50.0%  0",
        "   33.3%  -",
        "",
        "image: the commonest of 0 pathways through layers 4",
    ]


def test_the_command_on_a_recipe(saved, tmp_path, capsys):
    arguments = ["--dialogues", "5", "--json", str(tmp_path / "r.json"), "--png", str(tmp_path / "r.png")]
    assert main(["moe-report", str(saved), "demo", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("5 conversations, ")
    assert " → " in printed
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["conversations"] == 5
    assert stored["layers"] == [0, 1]
    assert f"{stored['tokens']['text']:,} text" in printed
    assert len(stored["loads"]["image"][1]["dispatched"]) == 3
    assert sum(way["tokens"] for way in stored["pathways"]["text"]) == stored["tokens"]["text"]
    with Image.open(tmp_path / "r.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[0] > 400
    assert len(np.unique(pixels)) > 20  # something is drawn


def test_the_command_on_conversations(saved, conversations, capsys):
    assert main(["moe-report", str(saved), str(conversations)]) == 0
    assert capsys.readouterr().out.startswith("2 conversations, 17 text and 4 image tokens")
    assert main(["moe-report", str(saved), str(conversations), "--dialogues", "1"]) == 0
    assert "0 image tokens" in capsys.readouterr().out


def test_conversations_without_images_can_be_drawn(saved, conversations, tmp_path):
    picture = str(tmp_path / "text.png")
    assert main(["moe-report", str(saved), str(conversations), "--dialogues", "1", "--png", picture]) == 0
    assert (tmp_path / "text.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "talk.jsonl, line 3: broken JSON: Expecting"),
        ("[1]", "talk.jsonl, line 3: not an object"),
        (
            '{"messages": [{"role": "cook", "content": "x"}]}',
            "line 3: unknown role: message 0: 'cook' is none of",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image", "image": "two.png"}]}]}',
            "line 3: ",
        ),
    ],
)
def test_lines_that_are_no_conversation(saved, conversations, capsys, line, message):
    conversations.write_text(conversations.read_text().rstrip() + "\n" + line)
    assert main(["moe-report", str(saved), str(conversations)]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.count("\n") == 1
    assert "two.png" in complaint or "two.png" not in line


def test_mistakes_are_one_line(saved, small_recipe, tmp_path, conversations, capsys):
    recipe = small_recipe(model={"language": {"moe": None}})
    VLM(recipe.model).save_pretrained(tmp_path / "dense", recipe.processor())
    (tmp_path / "empty.jsonl").write_text("\n")
    cases = [
        ([str(tmp_path / "dense"), str(conversations)], "the model has no mixture-of-experts layers"),
        (["no/such/model", "demo"], "no/such/model holds no model"),
        ([str(saved), "no/such.jsonl"], "no/such.jsonl: cannot be read"),
        ([str(saved), "no/such"], "no/such: cannot be read"),
        ([str(saved), str(tmp_path / "empty.jsonl")], "empty.jsonl holds no records"),
        ([str(saved), "demo", "--json", "no/folder/r.json"], "there is no folder no/folder"),
    ]
    for arguments, message in cases:
        assert main(["moe-report", *arguments]) == 2
        out, complaint = capsys.readouterr()
        assert not out
        assert message in complaint
        assert complaint.startswith("pyvlm: ")
        assert complaint.count("\n") == 1

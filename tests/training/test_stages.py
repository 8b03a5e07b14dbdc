"""From stage to stage: another architecture, models that are kept, and what a run folder tells of itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from pyvlm.models.processor import Processor
from pyvlm.models.vlm import VLM
from pyvlm.training import heldout, trainer
from pyvlm.training.checkpointing import FACTS
from pyvlm.training.heldout import HeldOut, Look, best_look, held_out_loss
from pyvlm.training.recipe import merge
from pyvlm.training.runfolder import RunFolder
from pyvlm.training.sources import Encoded, make_source
from pyvlm.training.trainer import train

EXPERTS = {"layers": [0], "num_experts": 2, "image_router": "token_choice"}


class Killed(Exception):
    pass


def kill_at(step):
    def after_step(done):
        if done == step:
            raise Killed

    return after_step


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [(line["step"], line["loss"]) for line in lines_of(folder) if "loss" in line]


@pytest.fixture(scope="module")
def upcycled(small_recipe, tmp_path_factory):
    """A recipe whose second stage makes experts, and the losses and the model of an uninterrupted run."""
    recipe = small_recipe(
        model={"language": {"moe": None}},
        stages={"two": {"upcycle": EXPERTS, "train": ["moe"]}},
        evaluation={"every": 0},
        trackers=[],
    )
    folder = tmp_path_factory.mktemp("whole")
    model = train(recipe, folder, progress=False).model
    assert model.config.language.moe is not None
    return recipe, losses(folder), model


# Before the checkpoint at the border, at it, and within the stage of another architecture.
@pytest.mark.parametrize("killed", [4, 5, 6, 7, 9])
def test_a_stage_with_other_experts_survives_resuming(tmp_path, upcycled, killed):
    recipe, expected, whole = upcycled
    with pytest.raises(Killed):
        train(recipe, tmp_path, progress=False, after_step=kill_at(killed))
    saved = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert (saved["language"]["moe"] is not None) == (killed >= 6)
    again = train(recipe, tmp_path, progress=False).model
    assert losses(tmp_path) == expected
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    VLM.from_pretrained(tmp_path / "model")


def test_models_of_stages_and_the_best_are_kept_beside_the_final_one(tmp_path, small_recipe, monkeypatch):
    found = iter([0.5, 0.75, 0.75])
    seen = []

    def look(held_out, model, processor):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return Look("held_out_accuracy", next(found))

    monkeypatch.setattr(HeldOut, "look", look)
    recipe = small_recipe(keep_stages=True, trackers=[])
    final = train(recipe, tmp_path, progress=False).model
    best = VLM.from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(best[name], tensor) for name, tensor in seen[1].items())
    assert json.loads((tmp_path / "best" / FACTS).read_text()) == {"step": 6, "held_out_accuracy": 0.75}
    Processor.from_pretrained(tmp_path / "best")
    last = VLM.from_pretrained(tmp_path / "stages" / "two").state_dict()
    assert all(torch.equal(last[name], tensor) for name, tensor in final.state_dict().items())
    first = VLM.from_pretrained(tmp_path / "stages" / "one").state_dict()
    assert not all(torch.equal(first[name], tensor) for name, tensor in last.items())
    assert json.loads((tmp_path / "stages" / "one" / FACTS).read_text()) == {"stage": "one", "step": 5}


def test_the_best_is_by_its_own_metric():
    lines = [{"step": 1, "held_out_loss": 2.0}, {"step": 2, "held_out_loss": 1.0}, {"step": 3, "loss": 0.0}]
    assert best_look(lines) == Look("held_out_loss", 1.0)
    assert best_look([]) is None
    assert Look("held_out_accuracy", 0.5).beats(Look("held_out_accuracy", 0.4))
    assert not Look("held_out_loss", 0.5).beats(Look("held_out_loss", 0.5))


def test_held_out_loss_does_not_depend_on_batches(small_recipe):
    recipe = small_recipe()
    torch.manual_seed(0)
    model, processor = VLM(recipe.model).double(), recipe.processor()
    source = make_source(recipe.stages["one"].data, "test", 0, processor, batch_size=4)

    class Six:
        """Six samples, whatever the batches."""

        epoch_size = 6

        def __init__(self, batch_size):
            self.batch_size = batch_size

        def samples(self, step, indices):
            return source.samples(0, [step * self.batch_size + i for i in indices])

    found = [held_out_loss(model, processor, Six(size), 100, size) for size in (4, 6)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    with torch.no_grad():
        expected = model.eval()(**processor.collate(Six(6).samples(0, range(6)))).cross_entropy.item()
    assert found[1] == pytest.approx(expected)


def test_dialogues_are_numbered_through_the_stages(small_recipe):
    recipe = small_recipe()
    processor, data = recipe.processor(), recipe.stages["one"].data
    first = make_source(data, "train", 0, processor, batch_size=2)
    second = make_source(data, "train", 0, processor, batch_size=2, first_step=5)
    assert isinstance(first, Encoded)
    for one, other in zip(first.samples(7, [1]), second.samples(2, [1]), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_starts_are_told_with_commit_versions_and_machine(tmp_path, small_recipe):
    recipe = small_recipe(trackers=[])
    with pytest.raises(Killed):
        train(recipe, tmp_path, progress=False, after_step=kill_at(3))
    with pytest.raises(Killed):
        train(recipe, tmp_path, progress=False, after_step=kill_at(4))
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[0]["versions"]["torch"] == torch.__version__
    assert starts[0]["machine"]["memory_bytes"] > 0
    root = Path(trainer.__file__).parents[2]
    if (root / ".git").exists():
        sha = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert starts[0]["commit"].removesuffix("+changes") == sha.strip()


def test_curves_show_loss_rates_and_held_out_metric(tmp_path, small_recipe):
    train(small_recipe(trackers=[]), tmp_path / "all", progress=False)
    train(small_recipe(trackers=[], evaluation={"every": 0}), tmp_path / "two", progress=False)
    heights = [Image.open(tmp_path / name / "curves.png").size[1] for name in ("all", "two")]
    assert heights[0] == pytest.approx(1.5 * heights[1], abs=2)  # a third chart


def test_recipe_of_an_earlier_version_goes_on_and_bookkeeping_may_change(tmp_path, small_recipe):
    with pytest.raises(Killed):
        train(small_recipe(trackers=[]), tmp_path, progress=False, after_step=kill_at(3))
    path = tmp_path / "recipe.json"
    known = json.loads(path.read_text())
    del known["gradient_checkpointing"], known["stages"]["one"]["schedule"]
    path.write_text(json.dumps(known))
    changed = small_recipe(trackers=["tensorboard"], checkpoint_every=1, profile_every=0)
    with RunFolder(tmp_path, changed):
        pass
    assert json.loads(path.read_text())["checkpoint_every"] == 1
    with pytest.raises(ValueError, match=r"gradient_checkpointing was False and is now True"):
        RunFolder(tmp_path, small_recipe(gradient_checkpointing=True)).__enter__()


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_missing_is_told_before_anything(tmp_path, small_recipe, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ValueError, match=f"{tracker} is not installed; pip install {tracker}"):
        train(small_recipe(trackers=[tracker]), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_later_stage_is_checked_before_the_first_one_trains(tmp_path, small_recipe):
    with pytest.raises(ValueError, match=r"stage 'two' names the part 'eyes'"):
        train(small_recipe(stages={"two": {"train": ["eyes"]}}), tmp_path / "a", progress=False)
    recipe = small_recipe(stages={"two": {"steps": None, "epochs": 1.0}})
    with pytest.raises(ValueError, match=r"stage 'two': epochs 1: these data have no end"):
        train(recipe, tmp_path / "b", progress=False)


def test_precisions_can_follow_one_another_and_leave_plain_models(tmp_path, small_recipe):
    for precision in ("bf16", "fp32"):
        recipe = small_recipe(
            precision=precision, stages={"one": {"steps": 2}, "two": {"steps": 2}}, trackers=[]
        )
        model = train(recipe, tmp_path / precision, progress=False).model
        assert "forward" not in vars(model), "accelerate's autocast must not stay behind"
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    (_, half), (_, full) = losses(tmp_path / "bf16")[0], losses(tmp_path / "fp32")[0]
    assert half != full
    assert half == pytest.approx(full, rel=1e-2)


def test_two_processes_train_what_one_does(tmp_path, small_recipe):
    recipe = small_recipe(
        stages={"one": {"train": ["connector", "language"], "data": {"rounds": [1, 4]}}},
        evaluation={"every": 0},
        trackers=[],
        model={"language": {"moe": None}},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launcher, "--main_process_port", "0", "-m", "pyvlm.cli", "train", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    train(recipe, tmp_path / "one", progress=False)
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [step for step, _ in two] == [step for step, _ in one]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    tokens = [
        [line["tokens"] for line in lines_of(tmp_path / name) if "loss" in line] for name in ("one", "two")
    ]
    assert tokens[0] == tokens[1]


def held_out_files(path, **changes):
    return {"evaluation": {"every": 2, "data": {"source": "files", "path": str(path), **changes}}}


def test_held_out_files_are_read_once_and_told_of_on_stderr(tmp_path, small_recipe, monkeypatch, capsys):
    good = {"messages": [{"role": "user", "content": "which"}, {"role": "assistant", "content": "3"}]}
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(good)] * 5 + ["{"]))
    opened = []
    monkeypatch.setattr(heldout, "make_source", lambda *a, **b: opened.append(a) or make_source(*a, **b))
    recipe = small_recipe(trackers=[], **held_out_files(tmp_path / "data.jsonl", bad_records="skip"))
    train(recipe, tmp_path / "run", progress=False)
    looks = [line for line in lines_of(tmp_path / "run") if "held_out_loss" in line]
    assert [line["step"] for line in looks] == [2, 4, 6, 8]
    assert len(opened) == 1
    out, told = capsys.readouterr()
    assert out == ""
    assert told.startswith(f"pyvlm: {tmp_path / 'data.jsonl'}: 1 of 6 records skipped")
    assert told.count("records skipped") == 1


def test_held_out_data_are_opened_before_anything_is_trained(tmp_path, small_recipe):
    missing = small_recipe(trackers=[], **held_out_files(tmp_path / "no.jsonl"))
    with pytest.raises(ValueError, match=r"evaluation\.data: .*no\.jsonl: cannot be read"):
        train(missing, tmp_path / "a", progress=False)
    assert not (tmp_path / "a" / "metrics.jsonl").exists()
    unread = small_recipe(trackers=[], **merge(held_out_files(tmp_path / "no"), {"evaluation": {"every": 0}}))
    with pytest.raises(Killed):  # nobody looks at them
        train(unread, tmp_path / "b", progress=False, after_step=kill_at(1))

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from pyvlm.models.processor import IGNORED
from pyvlm.models.vlm import VLM
from pyvlm.training import checkpointing
from pyvlm.training.optimization import make_optimizer, set_learning_rate
from pyvlm.training.recipe import PARTS
from pyvlm.training.runfolder import RunFolder
from pyvlm.training.sources import make_source
from pyvlm.training.trainer import make_batches, new_model, train


class Killed(Exception):
    pass


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def kill_at(step):
    def after_step(done):
        if done == step:
            raise Killed

    return after_step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tmp_path_factory.mktemp("uninterrupted") / "run"


@pytest.fixture
def whole_run(uninterrupted, small_recipe):
    """Losses and final weights of the small recipe trained in one go, once for all tests."""
    if not uninterrupted.exists():
        train(small_recipe(), uninterrupted, progress=False)
    return losses(uninterrupted), VLM.from_pretrained(uninterrupted / "model").state_dict()


# Before any checkpoint; at one; between two; at a stage's end; in the second stage; at the very end.
@pytest.mark.parametrize("killed", [1, 2, 3, 5, 7, 9])
def test_resuming_is_exact(tmp_path, small_recipe, whole_run, killed):
    with pytest.raises(Killed):
        train(small_recipe(), tmp_path, progress=False, after_step=kill_at(killed))
    trained = train(small_recipe(), tmp_path, progress=False)
    expected_losses, expected_weights = whole_run
    assert losses(tmp_path) == expected_losses
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, expected_weights[name]), name


def test_resuming_after_a_real_kill(tmp_path, small_recipe):
    recipe = small_recipe(stages={"one": {"steps": 100}}, log_every=1)
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    command = [sys.executable, "-m", "pyvlm.cli", "train", str(path), "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 9:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "training did not start"
            time.sleep(0.01)
        with pytest.raises(ValueError, match=f"in use by process {process.pid}"):
            train(recipe, run, progress=False)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    before = losses(run)
    assert len(before) < 100
    with pytest.raises(Killed):
        train(recipe, run, progress=False, after_step=kill_at(len(before) + 3))
    after = losses(run)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "again", progress=False, after_step=kill_at(len(before) + 3))
    assert after == losses(tmp_path / "again")
    assert before == after[: len(before)]


def test_training_lowers_the_loss_and_writes_everything(tmp_path, small_recipe):
    recipe = small_recipe(
        stages={"one": {"steps": 30, "batch_size": 16, "data": {"questions": {"which": 1.0}}}}
    )
    train(recipe, tmp_path, progress=False)
    values = [loss for _, loss in losses(tmp_path)]
    assert sum(values[25:30]) < 0.7 * sum(values[:5])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        ".lock",
        "recipe.json",
        "environment.json",
        "metrics.jsonl",
        "curves.png",
        "tensorboard",
        "checkpoint",
        "best",
        "model",
    }
    assert list((tmp_path / "tensorboard").iterdir())
    looks = [line for line in RunFolder(tmp_path, recipe).read_metrics() if "held_out_accuracy" in line]
    assert [line["step"] for line in looks] == list(range(3, 35, 3))


def test_only_the_parts_of_a_stage_learn(tmp_path, small_recipe):
    stage = {"train": ["connector", "moe"], "lr": {"connector": 1e-2, "moe": 0.0}}
    recipe = small_recipe(stages={"one": stage, "two": stage})
    torch.manual_seed(recipe.seed)
    before = VLM(recipe.model)
    after = train(recipe, tmp_path, progress=False).model.parts()
    for part, parameters in before.parts().items():
        changed = any(not torch.equal(a, b) for a, b in zip(parameters, after[part], strict=True))
        assert changed == (part == "connector"), part


@pytest.mark.parametrize("keeps", [False, True])
def test_a_stage_goes_on_with_the_moments_or_begins_anew(tmp_path, small_recipe, keeps):
    recipe = small_recipe(stages={"two": {"keep_optimizer": keeps}})
    with pytest.raises(Killed):
        train(recipe, tmp_path / "whole", progress=False, after_step=kill_at(6))
    with pytest.raises(Killed):  # between the stages: their moments come from the checkpoint
        train(recipe, tmp_path / "parts", progress=False, after_step=kill_at(5))
    with pytest.raises(Killed):
        train(recipe, tmp_path / "parts", progress=False, after_step=kill_at(6))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    state = torch.load(tmp_path / "whole" / "checkpoint" / "trainer.pt", weights_only=True)["optimizer"][
        "state"
    ]
    assert {int(moments["step"]) for moments in state.values()} == {6 if keeps else 1}


def test_learning_rate_rises_and_falls(small_recipe):
    recipe = small_recipe(
        stages={
            "one": {"steps": 10, "warmup": 4, "final_lr": 0.1, "lr": dict.fromkeys(PARTS, 1.0) | {"moe": 2.0}}
        }
    )
    stage = recipe.stages["one"]
    optimizer = make_optimizer(VLM(recipe.model), stage)
    rates = []
    for step in range(10):
        set_learning_rate(optimizer, stage, step, 10)
        rates.append({group["part"]: group["lr"] for group in optimizer.param_groups})
    connector = [rate["connector"] for rate in rates]
    assert connector[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert connector[5:] == sorted(connector[5:], reverse=True)
    assert 0.1 < connector[-1] < 0.2
    assert all(rate["moe"] == 2 * rate["connector"] for rate in rates)


def test_accumulation_changes_the_memory_and_not_the_loss(tmp_path, small_recipe):
    for parts in (1, 2):
        # Dialogues of unequal length, so that a plain mean of the parts' losses would differ.
        recipe = small_recipe(stages={"one": {"accumulation": parts, "steps": 2, "data": {"rounds": [1, 5]}}})
        with pytest.raises(Killed):
            train(recipe, tmp_path / str(parts), progress=False, after_step=kill_at(2))
    whole, split = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert [loss for _, loss in split] == pytest.approx([loss for _, loss in whole], rel=1e-2)
    assert split != whole


def test_batches_cover_the_indices_once(small_recipe):
    recipe = small_recipe()
    processor = recipe.processor()
    source = make_source(recipe.stages["one"].data, "train", 0, processor, batch_size=7)
    whole = make_batches(processor, source, 3, range(7))
    parts = make_batches(processor, source, 3, range(7), 3)
    assert (len(whole), [len(part["input_ids"]) for part in parts]) == (1, [3, 3, 1])
    assert torch.equal(torch.cat([part["images"] for part in parts]), whole[0]["images"])


def test_changed_recipe_is_refused_by_name(tmp_path, small_recipe):
    with pytest.raises(Killed):
        train(small_recipe(), tmp_path, progress=False, after_step=kill_at(1))
    with pytest.raises(ValueError, match=r"another recipe \(stages.two.lr was 0.01 and is now 0.5\)"):
        train(small_recipe(stages={"two": {"lr": 0.5}}), tmp_path, progress=False)


@pytest.mark.parametrize("writer", ["torch.save", "safetensors"])
def test_full_disk_keeps_the_old_checkpoint(tmp_path, small_recipe, whole_run, monkeypatch, writer):
    with pytest.raises(Killed):
        train(small_recipe(), tmp_path, progress=False, after_step=kill_at(3))

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if writer == "torch.save":
            patch.setattr(torch, "save", fail)
        else:
            patch.setattr(checkpointing.checkpoint, "save_file", fail)
        with pytest.raises(ValueError, match=r"No space left on device.*is kept"):
            train(small_recipe(), tmp_path, progress=False)
    train(small_recipe(), tmp_path, progress=False)
    assert losses(tmp_path) == whole_run[0]


@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors"])
def test_damaged_checkpoint_is_named(tmp_path, small_recipe, name):
    with pytest.raises(Killed):
        train(small_recipe(), tmp_path, progress=False, after_step=kill_at(3))
    path = tmp_path / "checkpoint" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{name}: .*damaged"):
        train(small_recipe(), tmp_path, progress=False)


def test_run_folder_that_cannot_be_made(tmp_path, small_recipe):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run folder .* cannot be written"):
        train(small_recipe(), tmp_path / "file" / "run", progress=False)


def test_lock_is_released_with_its_holder(tmp_path, small_recipe):
    with (
        RunFolder(tmp_path, small_recipe()),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()}"),
    ):
        RunFolder(tmp_path, small_recipe()).__enter__()
    with RunFolder(tmp_path, small_recipe()):
        pass


@pytest.mark.parametrize("options", [{"label_smoothing": 0.25}, {"z_loss": 0.125}])
def test_a_stage_minimises_the_loss_with_its_options(tmp_path, small_recipe, options):
    """Against torch's own cross-entropy of the logits; the stage without options keeps the plain one."""
    recipe = small_recipe(
        model={"language": {"moe": None}},
        stages={"one": {"steps": 1, "lr": 0.0, **options}, "two": {"steps": 1}},
        evaluation={"every": 0},
        trackers=[],
    )
    model = new_model(recipe)
    expected = []
    for number, given in enumerate((options, {})):
        stage = list(recipe.stages.values())[number]
        source = make_source(
            stage.data, "train", recipe.seed, recipe.processor(), batch_size=4, first_step=number
        )
        (batch,) = make_batches(recipe.processor(), source, 0, range(4))
        labels = batch.pop("labels")[:, 1:].flatten()
        known = labels != IGNORED
        logits = model(**batch).logits[:, :-1].flatten(0, 1)[known]
        smoothing, z_loss = given.get("label_smoothing", 0.0), given.get("z_loss", 0.0)
        loss = torch.nn.functional.cross_entropy(logits, labels[known], label_smoothing=smoothing)
        expected.append((loss + z_loss * logits.logsumexp(1).square().mean()).item())
    train(recipe, tmp_path, progress=False)
    assert [loss for _, loss in losses(tmp_path)] == pytest.approx(expected, rel=1e-5)

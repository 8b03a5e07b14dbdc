"""Models on disk: bit for bit, whole or not at all, and every defect named."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import batch, pictures, tiny_config, tiny_vlm, tokens

from pyvlm.models import VLM, Processor, ProcessorConfig, checkpoint, word_level_tokenizer
from pyvlm.models.checkpoint import find_folder, replace_folder, write_file


def assert_same(left: VLM, right: VLM) -> None:
    assert left.config == right.config
    states = left.state_dict(), right.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype
        assert torch.equal(tensor, states[1][name]), name


@pytest.fixture
def processor() -> Processor:
    config = ProcessorConfig(image=tiny_config().image, tokens_per_image=4)
    return Processor(word_level_tokenizer(["which digit ?", "seven"]), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, tie_embeddings: bool) -> None:
    model = tiny_vlm(dtype, tie_embeddings=tie_embeddings)
    model.save_pretrained(tmp_path / "model")
    loaded = VLM.from_pretrained(tmp_path / "model")
    assert_same(loaded, model)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    input_ids, real = batch(tokens(2, "image", 3), tokens(4))
    images = pictures(1)
    assert torch.equal(loaded(input_ids, images, real).logits, model(input_ids, images, real).logits)


def test_files_and_backend(tmp_path: Path, processor: Processor) -> None:
    folder = tmp_path / "new" / "model"
    tiny_vlm().save_pretrained(folder, processor)
    assert sorted(os.listdir(folder)) == [
        "config.json",
        "model.safetensors",
        "processor.json",
        "tokenizer.json",
    ]
    assert os.listdir(folder.parent) == ["model"]
    assert (
        folder.joinpath("model.safetensors").stat().st_mode == folder.joinpath("config.json").stat().st_mode
    )
    assert (
        VLM.from_pretrained(folder, backend="reference").language.layers[0].attention.backend == "reference"
    )


def test_saving_again_keeps_the_processor(tmp_path: Path, processor: Processor) -> None:
    tiny_vlm().save_pretrained(tmp_path / "model", processor)
    other = tiny_vlm(torch.float32)
    other.save_pretrained(tmp_path / "model")
    assert_same(VLM.from_pretrained(tmp_path / "model"), other)
    assert Processor.from_pretrained(tmp_path / "model").config == processor.config


def test_other_peoples_files_are_never_lost(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(ValueError, match=r"holds thesis.tex, no part of a model"):
        tiny_vlm().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        tiny_vlm().save_pretrained(tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_missing_foreign_and_misshapen_tensors_are_named_in_one_error(tmp_path: Path) -> None:
    model = tiny_vlm()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["connector.0.bias"]
    tensors["head.weight"] = torch.zeros(2)
    tensors["language.norm.weight"] = torch.ones(3)
    tensors["connector.2.bias"] = torch.zeros(16, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        VLM.from_pretrained(tmp_path)
    for defect in (
        str(tmp_path / "model.safetensors"),
        "connector.0.bias is missing",
        "head.weight is foreign",
        "language.norm.weight is [3] and must be [16]",
        "connector.2.bias is torch.int32 and must be torch.float32",
    ):
        assert defect in str(error.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model = tiny_vlm()
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good = weights.read_bytes()
    for bad in (good[:-5], good[:7], b"", b"PK\x03\x04" + good[4:]):
        weights.write_bytes(bad)
        with pytest.raises(ValueError, match=r"model.safetensors: damaged or truncated"):
            VLM.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: there is no such file"):
        VLM.from_pretrained(tmp_path)
    config.write_text(config.read_text().replace('"connector"', '"conector"'))
    with pytest.raises(ValueError, match=r"config.json is not a valid VLMConfig: conector: Extra inputs"):
        VLM.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not a valid VLMConfig: all of it: Invalid JSON"):
        VLM.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(ValueError, match=r"config.json: cannot be read \(No such file"):
        VLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        VLM.from_pretrained(tmp_path / "nowhere")


STEPS = [(os, "rename"), (os, "replace"), (os, "fsync"), (checkpoint, "save_file"), (Path, "write_text")]


class Disk:
    """Counts the steps of a save, and is full at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.full_at = 0, 0
        for owner, name in STEPS:
            monkeypatch.setattr(owner, name, self._limited(getattr(owner, name)))

    def _limited(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.full_at:
                raise OSError(28, "No space left on device")
            return step(*args, **kwargs)

        return call


def test_a_save_that_fails_at_any_step_leaves_the_old_checkpoint(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tiny_vlm(), tiny_vlm(torch.float32)
    folder = tmp_path / "model"
    disk = Disk(monkeypatch)
    old.save_pretrained(folder, processor)
    steps = 0
    while True:
        steps += 1
        disk.count, disk.full_at = 0, steps
        try:
            new.save_pretrained(folder, processor)
        except OSError:
            if disk.count > steps or os.listdir(tmp_path) == ["model"]:
                assert_same(VLM.from_pretrained(folder), old)
                assert os.listdir(tmp_path) == ["model"]
                continue
            # The last step: all is in place, and only whether the names are on the disk is unknown.
            assert_same(VLM.from_pretrained(folder), new)
            assert sorted(os.listdir(tmp_path)) == [".model.old", "model"]
        else:
            break
    assert steps > 10
    assert_same(VLM.from_pretrained(folder), new)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("killed_at", [1, 2])
def test_killed_at_a_rename(tmp_path: Path, killed_at: int) -> None:
    folder = tmp_path / "run"
    script = f"""
import os
from pathlib import Path
from pyvlm.models.checkpoint import replace_folder

renames, rename = 0, os.rename
def killed(*names):
    global renames
    renames += 1
    if renames == {killed_at}:
        os._exit(9)
    rename(*names)

for text in ("old", "new"):
    with replace_folder({str(folder)!r}) as aside:
        (aside / "step").write_text(text)
    os.rename, renames = killed, 0
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert (find_folder(folder) / "step").read_text() == "old"
    with pytest.raises(KeyboardInterrupt), replace_folder(folder):
        raise KeyboardInterrupt
    assert (find_folder(folder) / "step").read_text() == "old"
    with replace_folder(folder) as aside:
        (aside / "step").write_text("newest")
    assert (find_folder(folder) / "step").read_text() == "newest"
    assert os.listdir(tmp_path) == ["run"]


def test_a_block_that_raises_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), replace_folder(folder):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with replace_folder(folder) as aside:
        (aside / "step").write_text("1")
    with pytest.raises(KeyboardInterrupt), replace_folder(folder):
        raise KeyboardInterrupt
    assert (folder / "step").read_text() == "1"
    assert os.listdir(tmp_path) == ["run"]


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_file(path, b"old")
    disk = Disk(monkeypatch)
    disk.full_at = 1
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.json"]
    write_file(path, b"new")
    assert path.read_bytes() == b"new"

"""Frozen weights in half precision: the same losses and weights, bit for bit, and saved models in float32."""

import json

import pytest
import torch
from torch import nn

from pyvlm.models.vlm import VLM
from pyvlm.training import trainer
from pyvlm.training.precision import hold_frozen
from pyvlm.training.trainer import train

HELD = "language.layers.0.attention.qkv_proj.weight"
NEW_MODEL = trainer.new_model


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def recipe(small_recipe):
    """A model whose weights came in bf16; its language model learns in the second stage only."""
    stages = {"one": {"steps": 3, "train": ["connector", "fusion"]}, "two": {"steps": 3}}
    options = {"evaluation": {"every": 2}, "trackers": [], "keep_stages": True, "profile_every": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "new_model", lambda recipe: NEW_MODEL(recipe).bfloat16().float())
        yield small_recipe(stages=stages, precision="bf16", **options)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """An uninterrupted run: its folder, its model, and for each step in which dtype a weight was held and its
    layer computed."""
    folder, models, dtypes, computed = tmp_path_factory.mktemp("whole"), [], [], []
    with pytest.MonkeyPatch.context() as patch:

        def held(model, dtype):
            if not models:
                layer = model.get_submodule(HELD.removesuffix(".weight"))
                layer.register_forward_hook(lambda module, given, made: computed.append(made.dtype))
            models.append(model)
            hold_frozen(model, dtype)

        patch.setattr(trainer, "hold_frozen", held)

        def watch(step):
            dtypes.append((models[-1].get_parameter(HELD).dtype, *set(computed)))
            computed.clear()

        model = train(recipe, folder, progress=False, after_step=watch).model
    return folder, model, dtypes


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def assert_same(given, expected) -> None:
    for name, tensor in expected.state_dict().items():
        assert given.state_dict()[name].dtype == tensor.dtype == torch.float32, name
        assert torch.equal(given.state_dict()[name], tensor), name


def test_nothing_but_the_memory_changes(tmp_path, recipe, whole, monkeypatch) -> None:
    folder, model, dtypes = whole
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 3 + [(torch.float32, torch.bfloat16)] * 3
    monkeypatch.setattr(trainer, "hold_frozen", lambda model, dtype: None)
    full = train(recipe, tmp_path, progress=False).model
    assert losses(folder) == losses(tmp_path)
    assert_same(model, full)
    for name in ("stages/one", "best", "model"):
        assert_same(VLM.from_pretrained(folder / name), VLM.from_pretrained(tmp_path / name))


# While weights are held, where they begin to learn, and where all learn.
@pytest.mark.parametrize("killed", [2, 3, 4])
def test_resuming_is_exact(tmp_path, recipe, whole, killed: int) -> None:
    folder, model, _ = whole

    def kill(done: int) -> None:
        if done == killed:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path, progress=False, after_step=kill)
    again = train(recipe, tmp_path, progress=False).model
    assert losses(tmp_path) == losses(folder)
    assert_same(again, model)


def test_only_what_loses_no_bit_is_held() -> None:
    torch.manual_seed(0)
    tied = nn.Embedding(4, 4)
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)])
    model = nn.ModuleDict({"layers": layers, "head": nn.Linear(4, 4), "tied": tied})
    model.bfloat16().float()
    exact, learns = layers[0].weight, layers[1].weight
    layers[3].weight = tied.weight
    layers[0].bias.data += 1e-4
    model.requires_grad_(False)
    learns.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hold_frozen(model, torch.bfloat16)
    half = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert half == {"layers.0.weight", "layers.1.bias", "layers.3.bias"}
    assert layers[0].weight is exact
    hold_frozen(model, None)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name]), name

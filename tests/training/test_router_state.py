"""The routers' state in training: it moves with every step, and a resumed run has it too."""

import json

import pytest
import torch

from pyvlm.models.vlm import VLM
from pyvlm.training.trainer import train

EXPERTS = {
    "num_experts": 4,
    "text_router": "threshold_choice",
    "image_router": "token_choice",
    "bias_rate": 0.01,
    "noise": "gaussian",
    "token_capacity_factor": 1.5,
    "load_loss_coef": 0.01,
    "importance_loss_coef": 0.01,
}
MODEL = {"language": {"moe": EXPERTS}}
STATE = ("language.layers.1.mlp.thresholds", "language.layers.1.mlp.balance_bias")


class Killed(Exception):
    pass


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_it_moves_and_resuming_is_exact(tmp_path, small_recipe):
    recipe = small_recipe(model=MODEL)
    train(recipe, tmp_path / "whole", progress=False)

    def kill(step):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path / "cut", progress=False, after_step=kill)
    train(recipe, tmp_path / "cut", progress=False)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (VLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "cut"))
    assert all(cut[name].equal(tensor) for name, tensor in whole.items())
    thresholds, bias = (whole[name] for name in STATE)
    assert (thresholds[0] != 0.25).all()
    assert thresholds[1].tolist() == [0.0] * 4
    # Nine steps of 0.01, up or down: bias is a whole number of them, of the parity of nine or less.
    assert bias.abs().max() > 0
    assert bias.abs().max() <= 9 * 0.01 + 1e-6


def test_accumulation_is_one_update(tmp_path, small_recipe):
    """Two halves of a batch move the bias by one step of its rate, as the batch in one piece does."""
    experts = {"num_experts": 4, "image_router": "token_choice", "bias_rate": 0.01}
    biases = []
    for accumulation in (1, 2):
        recipe = small_recipe(
            model={"language": {"moe": experts}},
            stages={"one": {"steps": 1, "accumulation": accumulation}, "two": {"steps": 1, "lr": 0.0}},
        )
        recipe = recipe.model_copy(update={"stages": {"one": recipe.stages["one"]}})
        trained = train(recipe, tmp_path / str(accumulation), progress=False)
        biases.append(trained.model.state_dict()[STATE[1]])
    assert biases[0].abs().max() == pytest.approx(0.01)
    assert torch.equal(*biases)

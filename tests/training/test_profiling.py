"""The split of a step's time, and its FLOPs: against hand-made counts, and without any influence."""

import json
import time

import pytest
import torch
from torch import nn

from pyvlm.models.vlm import VLM
from pyvlm.nn.moe import MoE
from pyvlm.training import trainer
from pyvlm.training.flops import StepCosts, Workload, total
from pyvlm.training.logs import StagePlan, describe_time, seconds_left
from pyvlm.training.profiling import PARTS, StepProfile
from pyvlm.training.sources import make_source
from pyvlm.training.utilization import measured_limit


@pytest.fixture(autouse=True)
def quick_limit(monkeypatch):
    monkeypatch.setattr(trainer, "measured_limit", lambda *_: 1e9)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recompute", [False, True])
def test_profiled_steps_compute_the_same_and_their_parts_are_the_step(tmp_path, small_recipe, recompute):
    for every in (0, 2):
        recipe = small_recipe(
            profile_every=every,
            gradient_checkpointing=recompute,
            stages={"one": {"accumulation": 2}},
            evaluation={"every": 0},
            trackers=[],
        )
        trainer.train(recipe, tmp_path / str(every), progress=False)
    plain, measured = lines_of(tmp_path / "0"), lines_of(tmp_path / "2")
    losses = [line["loss"] for line in measured if "loss" in line]
    assert losses == [line["loss"] for line in plain]
    profiled = [line for line in measured if "step_time" in line]
    assert [line["step"] for line in profiled] == [2, 4, 6, 8]
    for line in profiled:
        assert line["step_time"].keys() == set(PARTS)
        assert min(line["step_time"].values()) > 0
    assert all("mfu" in line for line in profiled)
    told = describe_time(measured)
    assert "mean of 4" in told[0]
    assert "1 GFLOP/s" in told[1]


class Slow(nn.Module):
    """Takes its time forward and backward, beside the module that it wraps."""

    def __init__(self, inner, forward, backward):
        super().__init__()
        self.inner, self.seconds, self.backward = inner, forward, backward

    def forward(self, *arguments, **options):
        time.sleep(self.seconds)
        out = self.inner(*arguments, **options)
        return Wait.apply(out, self.backward)


class Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None


def test_time_goes_to_the_part_that_takes_it(small_recipe):
    recipe = small_recipe()
    model, processor = VLM(recipe.model).train(), recipe.processor()
    model.connector = Slow(model.connector, 0.05, 0.1)
    model.language.layers[0].mlp = Slow(model.language.layers[0].mlp, 0.1, 0.15)
    source = make_source(recipe.stages["one"].data, "train", 0, processor, batch_size=2)
    start = time.perf_counter()
    with StepProfile(model, torch.device("cpu")) as profile:
        with profile.part("data"):
            batch = trainer.make_batches(processor, source, 0, range(2))[0]
            time.sleep(0.05)
        loss = model(**batch).loss
        with profile.backward_of(loss):
            loss.backward()
        with profile.part("optimizer"):
            time.sleep(0.08)
    assert profile.total <= time.perf_counter() - start
    assert profile.total == pytest.approx(time.perf_counter() - start, abs=0.1)
    least = {"connector": 0.15, "mlp": 0.25, "data": 0.05, "optimizer": 0.08}
    for part, seconds in least.items():
        assert profile.seconds[part] >= seconds, part
    assert sum(profile.seconds[part] for part in set(PARTS) - least.keys()) < profile.total - 0.53 + 1e-6
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_flops_of_a_step_are_those_of_its_products(small_recipe):
    """Forward, counted by hand: one dense layer, one of experts, whose tokens choose one each."""
    recipe = small_recipe(model={"language": {"moe": {"image_router": "token_choice", "top_k": 1}}})
    model, processor = VLM(recipe.model).train(), recipe.processor()
    source = make_source(recipe.stages["one"].data, "train", 0, processor, batch_size=2)
    batch = trainer.make_batches(processor, source, 0, range(2))[0]
    workload = Workload.of_batch(recipe.model, batch)
    language = model.language
    rows, real = batch["input_ids"].numel(), int(batch["attention_mask"].sum())
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    pairs = workload.layout.spans(recipe.model.language.attention_rule).visible_pairs()
    expected = sum(2 * rows * layer.attention.qkv_proj.weight.numel() for layer in language.layers)
    expected += sum(2 * rows * layer.attention.o_proj.weight.numel() for layer in language.layers)
    expected += 2 * 4 * 16 * pairs
    dense, experts = (layer.mlp for layer in language.layers)
    expected += 2 * rows * (dense.gate_up_proj.weight.numel() + dense.down_proj.weight.numel())
    assert isinstance(experts, MoE)
    expected += 2 * rows * experts.gate.weight.numel()
    expected += 2 * real * (experts.gate_up_proj[0].numel() + experts.down_proj[0].numel())
    expected += 2 * labelled * language.head_weight.numel()
    walked = StepCosts(recipe.model).walk(workload).costs
    assert total(walked.values()).forward == expected


def test_a_profiled_step_tells_the_flops_of_its_own_batches(tmp_path, small_recipe):
    """Of both micro-batches, and of the backward pass as far as the stage's parts need it."""
    recipe = small_recipe(
        profile_every=4,
        stages={"one": {"accumulation": 2, "train": ["connector"]}},
        evaluation={"every": 0},
        trackers=[],
    )
    trainer.train(recipe, tmp_path, progress=False)
    stage = recipe.stages["one"]
    source = make_source(stage.data, "train", recipe.seed, recipe.processor(), batch_size=4)
    costs = StepCosts(recipe.model, ["connector"])
    batches = trainer.make_batches(recipe.processor(), source, 3, range(4), 2)
    each = [total(costs.of(Workload.of_batch(recipe.model, batch)).values()).total for batch in batches]
    first, _ = [line for line in lines_of(tmp_path) if "mfu" in line]
    assert len(each) == 2
    assert first["flops"] == pytest.approx(sum(each))
    assert first["mfu"] == pytest.approx(sum(each) / sum(first["step_time"].values()) / 1e9)


def test_the_limit_is_positive_and_draws_from_no_ones_generator():
    state = torch.get_rng_state()
    assert measured_limit(torch.device("cpu"), "fp32") > 1e9
    assert torch.equal(torch.get_rng_state(), state)


def test_time_left_covers_all_stages():
    plan = [StagePlan("a", 10, 4), StagePlan("b", 5, 8)]
    assert seconds_left(plan, 4, 2.0) == 6 * 2.0 + 5 * 4.0
    assert seconds_left(plan, 10, 2.0) == 5 * 4.0
    assert seconds_left(plan, 12, 4.0) == 3 * 4.0
    assert seconds_left(plan, 15, 4.0) == 0

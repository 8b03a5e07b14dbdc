"""Training steps of the GPU benchmarks: whose layers run in whose rows."""

import time

import pytest
import torch

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
from benchmarks.gpu.parts import Context
from benchmarks.gpu.step import Step, by_dense_masks, by_spans

MIXTRALS = "transformers.models.mixtral.modeling_mixtral"
LLAMAS = "transformers.models.llama.modeling_llama"


@pytest.mark.parametrize(("kind", "home"), [("llava-mmca", LLAMAS), ("moe-llava", MIXTRALS)])
def test_layers_and_loss_are_pyvlms_in_its_own_rows_alone(kind: str, home: str) -> None:
    step = Step(kind, Context(torch.device("cpu"), True, time.monotonic() + 60))
    experts = {True: "pyvlm", False: "eager"} if kind == "moe-llava" else {True: None, False: None}
    losses = []
    for own in (False, True, True, False):
        attend = (by_spans if own else by_dense_masks)(step.spans)
        losses.append(step.loss(attend, experts[own], own).item())
        layer = step.model.model.layers[-1]
        served = [layer.input_layernorm, step.model.model.norm, *([layer.mlp] if home == LLAMAS else [])]
        assert all((type(module).__module__ != home) == own for module in served)
    assert losses[0] == losses[3]
    assert losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)

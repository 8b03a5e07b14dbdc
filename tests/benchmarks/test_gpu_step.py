"""Training steps of the GPU benchmarks: whose layers run in whose rows, and what is compiled."""

import gc
import time
import weakref
from functools import partial

import pytest
import torch

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
from benchmarks.gpu.parts import Context
from benchmarks.gpu.step import KINDS, Step, by_dense_masks, by_spans

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


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("own", [True, False], ids=["pyvlm", "transformers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_is_one_graph(kind: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the row would show what breaks a graph, not what compiling gives."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    context = Context(torch.device("cpu"), True, time.monotonic() + 60)
    losses = []
    for compiled in (False, True):
        step = Step(kind, context, compiled)
        attend = (by_spans if own else by_dense_masks)(step.spans)
        experts = None if kind == "llava-mmca" else "pyvlm" if own else "grouped_mm"
        for _ in range(2):
            loss = step.loss(attend, experts, own)
            step.run(lambda loss=loss: loss)
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_step_that_is_done_leaves_its_memory_to_the_next() -> None:
    step = Step("llava-mmca", Context(torch.device("cpu"), True, time.monotonic() + 60))
    step.loss(by_spans(step.spans), None, True).backward()
    model = weakref.ref(step.model)
    del step
    gc.collect()
    assert model() is None

"""Training steps of the GPU benchmarks: whose layers run in whose rows, and what is compiled."""

import gc
import time
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
from benchmarks.gpu import step as steps
from benchmarks.gpu.parts import Context
from benchmarks.gpu.step import KINDS, MMCA, MOE, Step, run

CONTEXT = Context(torch.device("cpu"), True, time.monotonic() + 60)


@pytest.fixture(autouse=True)
def settings_stay() -> Iterator[None]:
    """A compiled step changes how torch compiles."""
    with torch._dynamo.config.patch(capture_scalar_outputs=torch._dynamo.config.capture_scalar_outputs):
        yield


def homes(model: Any) -> dict[str, str]:
    """The module that defines what runs, by what it does."""
    language = model.model.language_model
    *_, experts_or_mlp = (layer.mlp for layer in language.layers)
    parts = {
        "norm": language.norm,
        "mlp": getattr(experts_or_mlp, "experts", experts_or_mlp),
        "encoder's mlp": model.model.vision_tower.encoder.layers[0].mlp,
    }
    return {name: type(module).__module__ for name, module in parts.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_pyvlms_in_its_own_row_alone(kind: str) -> None:
    step = Step(kind, CONTEXT)
    models = {row: step.model_of(row) for row in ("pyvlm", "sdpa")}
    language = {row: model.model.language_model for row, model in models.items()}
    attention = {row: each.config._attn_implementation for row, each in language.items()}
    assert "pyvlm" in attention["pyvlm"]
    assert attention["sdpa"] == ("measured" if kind == MMCA else "sdpa")
    assert models["sdpa"].model.vision_tower.config._attn_implementation == "sdpa"
    assert all(home.startswith("transformers.") for home in homes(models["sdpa"]).values())
    own = homes(models["pyvlm"])
    if kind == MOE:
        assert language["pyvlm"].config._experts_implementation == "pyvlm"
        assert language["sdpa"].config._experts_implementation == "grouped_mm"
        del own["mlp"]  # the module that calls an implementation is transformers' own
        is_sparse = [hasattr(layer.mlp, "experts") for layer in language["sdpa"].layers]
        assert is_sparse == [False, True]
    assert all(home.startswith("pyvlm.") for home in own.values())
    losses = {row: step.loss(model).item() for row, model in models.items()}
    assert losses["pyvlm"] == pytest.approx(losses["sdpa"], rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_train_the_same_parameters_and_no_encoder(kind: str) -> None:
    step = Step(kind, CONTEXT)
    parameters = [dict(step.model_of(row).named_parameters()) for row in ("pyvlm", "sdpa")]
    shared = dict(step.model.named_parameters())
    for of_row in parameters:
        assert of_row.keys() == shared.keys()
        assert all(of_row[name] is shared[name] for name in shared)
    frozen = {name for name, parameter in shared.items() if not parameter.requires_grad}
    assert frozen == {name for name in shared if "vision_tower" in name}
    head = step.model.lm_head.weight.detach().clone()
    step.run(step.model_of("pyvlm"))
    assert not torch.equal(head, step.model.lm_head.weight)
    assert all(parameter.grad is None for parameter in shared.values())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("row", ["pyvlm", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_is_one_graph(kind: str, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the row would show what breaks a graph, not what compiling gives."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    losses = []
    for compiled in (False, True):
        step = Step(kind, CONTEXT)
        model = step.model_of(row)
        if compiled:
            model = step.compiled(model)
        for _ in range(2):
            losses.append(step.loss(model).item())
            step.run(model)
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-3)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_peer_that_does_not_compile_leaves_pyvlms_step_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise NotImplementedError("not on this device")

    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(steps, "by_flex", lambda spans: refuse)
    (record,) = run(MMCA, True, CONTEXT)
    found = {name: row["status"] for name, row in record["providers"].items()}
    assert found == {"pyvlm": "timed", "compile": "unavailable"}
    assert len(graphs) == 2  # before the peer and after it
    assert all("pyvlm.span_attention" in code and "cross_entropy" in code for code in graphs)


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model_of = Step.model_of

    def broken(self: Step, row: str) -> Any:
        model = model_of(self, row)
        if row == "pyvlm":
            model.model.language_model.norm.forward = lambda hidden: hidden * torch.nan
        return model

    monkeypatch.setattr(Step, "model_of", broken)
    (record,) = run(MOE, False, CONTEXT)
    found = {name: outcome["status"] for name, outcome in record["providers"].items()}
    assert found == {"pyvlm": "WRONG", "sdpa": "timed"}


def test_a_step_that_is_done_leaves_its_memory_to_the_next() -> None:
    step = Step(MMCA, CONTEXT)
    own = step.model_of("pyvlm")
    step.run(own)
    models = [weakref.ref(step.model), weakref.ref(own)]
    del step, own
    gc.collect()
    assert [model() for model in models] == [None, None]

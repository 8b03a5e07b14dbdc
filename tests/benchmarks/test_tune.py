"""The search for tiles, without a GPU: what is tried, that it is what runs, and what is kept."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import ahead_of_time
import triton
from fusion.loss_cases import LossCase
from pyvlm.triton_kernels import attention, fusion, loss, moe
from pyvlm.triton_kernels.attention import ForwardTiles, Tiles
from triton.backends.compiler import GPUTarget

from benchmarks.gpu import tune
from benchmarks.harness.run import QUICK
from benchmarks.harness.workload import FORWARD

CASE = LossCase("few", "", 9, 5, 16, 40)
LOSS = next(family for family in tune.FAMILIES if family.kernels is loss)


def test_neighbours_differ_in_one_field_or_in_a_side_and_what_it_takes_and_stay_within_bounds() -> None:
    assert tune.neighbours(Tiles(128, 64, 8, 2)) == [
        *(Tiles(64, 64, 8, 2), Tiles(256, 64, 8, 2), Tiles(256, 64, 8, 1)),
        *(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 1)),
        *(Tiles(128, 32, 8, 2), Tiles(128, 128, 8, 2), Tiles(128, 128, 8, 1)),
        *(Tiles(128, 32, 4, 2), Tiles(128, 32, 4, 1)),
        Tiles(128, 64, 4, 2),
        *(Tiles(128, 64, 8, 1), Tiles(128, 64, 8, 3)),
    ]
    assert tune.neighbours(Tiles(16, 256, 4, 1)) == [
        *(Tiles(32, 256, 4, 1), Tiles(16, 128, 4, 1), Tiles(16, 256, 8, 1), Tiles(16, 256, 4, 2)),
    ]
    assert tune.neighbours(ForwardTiles(16, 16, 4, 1, deferred=True))[-1] == ForwardTiles(16, 16, 4, 1)
    assert tune.neighbours(fusion.Tiles(1, 2), tune.ROWS) == [
        *(fusion.Tiles(2, 2), fusion.Tiles(1, 1), fusion.Tiles(1, 4))
    ]
    everything = (tune.neighbours(moe.Tiles(128, 256, 64, 8, 4)), tune.neighbours(Tiles(16, 16, 4, 1)))
    assert all(len(tiles) == len(set(tiles)) for tiles in everything)
    assert moe.Tiles(128, 128, 64, 4, 3) in everything[0]


@pytest.mark.parametrize("family", tune.FAMILIES, ids=lambda family: family.operation.name)
def test_every_kernels_tiles_are_tried_in_some_case(family: tune.Family) -> None:
    assert len(family.cases) >= 1
    config = family.config(family.cases[0], SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cpu")))
    tiles = {name for name, value in vars(config).items() if isinstance(value, family.kernels.Tiles)}
    assert tiles == family.passes.keys()


def test_a_candidate_is_what_the_kernels_run_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "default_config", attention.default_config)  # put back what is replaced
    config = replace(attention.default_config(64, torch.bfloat16, (9, 0)), forward=ForwardTiles(64, 32, 4, 3))
    q = torch.empty((1, 2, 256, 64), dtype=torch.bfloat16, device="meta")
    spans = (
        torch.empty((1, 256, 1, 2), dtype=torch.int32, device="meta"),
        torch.empty((1, 256), dtype=torch.uint8, device="meta"),
    )
    call = partial(attention.span_attention, q, q, q, *spans, (2,), False, 0.125, 0.0)
    with ahead_of_time.recorded(attention, 90) as launches:
        tune.with_config(attention, config, call)()
    assert launches[-1].kernel.__name__ == "forward_kernel"
    assert launches[-1].tiles == config.forward


def test_the_search_goes_on_from_what_was_fastest_and_tries_nothing_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Times are made up: 4 warps and few rows are best. No candidate of one kernel moves another's tiles."""
    rounds: list[list[str]] = []

    def measure(operation: Any, work: Any, providers: tuple[Any, ...], settings: Any) -> Any:
        assert list(work.costs) == [FORWARD]
        rounds.append([provider.name for provider in providers])
        seconds = {}
        for provider in providers:
            provider.build(work)  # of the candidate
            numbers = dict(
                zip(provider.name.split()[::2], map(int, provider.name.split()[1::2]), strict=True)
            )
            seconds[provider.name] = numbers["rows"] + numbers["warps"]
        failed = {"status": "unavailable", "detail": "OutOfResources: shared memory"}
        outcomes = {
            name: failed if "rows 32 " in name else {"status": "timed", "median_s": s}
            for name, s in seconds.items()
        }
        yield {"op": "loss", "case": "few", "pass": FORWARD, "providers": outcomes}

    monkeypatch.setattr(tune, "measure", measure)
    work = LOSS.workload(CASE, torch.device("cpu"), torch.bfloat16)
    start = replace(loss.default_config(torch.bfloat16, None), statistics=loss.Tiles(128, 64, 64, 8, 2))
    family = replace(LOSS, config=lambda case, work: start, passes={"statistics": FORWARD})
    records = list(tune.search(family, CASE, work, False, QUICK, time.monotonic() + 60))
    # From 128 rows to 64 and 4 warps at once; 32 rows do not fit, and no step from there is better.
    assert [names[0] for names in rounds] == [
        "rows 128 columns 64 depth 64 warps 8 stages 2",
        "rows 64 columns 64 depth 64 warps 4 stages 2",
    ]
    candidates = [name for names in rounds for name in names[1:]]
    assert len(candidates) == len(set(candidates))
    assert {(record["op"], record["case"]) for record in records} == {("tiles of loss", "few statistics")}
    assert list(tune.search(family, CASE, work, False, QUICK, time.monotonic() - 1)) == []


def test_tiles_that_do_not_go_together_are_not_tried() -> None:
    config = loss.default_config(torch.bfloat16, (9, 0))
    deeper = {depth: replace(config.grad_hidden, depth=depth) for depth in (128, 256)}
    assert tune.is_allowed(config, "grad_hidden", deeper[128])
    assert not tune.is_allowed(config, "grad_hidden", deeper[256])  # than the tiles that it reads are wide


def test_a_dry_run_tries_a_few_and_puts_the_tiles_back() -> None:
    default_config = loss.default_config
    few = replace(LOSS, passes={"statistics": FORWARD})
    work = LOSS.workload(CASE, torch.device("cpu"), torch.bfloat16)
    (record,) = tune.run(few, CASE, work, True, QUICK, time.monotonic() + 60)
    assert [outcome["status"] for outcome in record["providers"].values()] == ["timed"] * 3
    assert loss.default_config is default_config


@pytest.mark.skipif(
    any(mark.args[0] for mark in ahead_of_time.compiles_ahead_of_time),
    reason="Triton does not compile for NVIDIA GPUs here",
)
def test_candidates_are_compiled_and_not_launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """By Triton's own way of compiling for a GPU that is there; the GPU is made up."""
    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    # One after the other, and an error is told here.
    mode = triton.AsyncCompileMode
    monkeypatch.setattr(triton, "AsyncCompileMode", lambda _, **options: mode(ThreadPoolExecutor(1)))
    config = loss.default_config(torch.bfloat16, (9, 0))
    arguments = LOSS.workload(CASE, torch.device("cpu"), torch.bfloat16)
    hidden, weight = arguments.inputs
    monkeypatch.setattr(loss, "default_config", loss.default_config)  # put back what is replaced
    launch = loss.launch
    with tune.compiled_only(loss):
        for warps in (4, 8):
            small = replace(config, statistics=loss.Tiles(64, 64, 16, warps, 2))
            call = partial(
                loss.linear_cross_entropy, hidden, weight, arguments.payload, -100, None, 0.0, 0.0, 0.0
            )
            tune.with_config(loss, small, call)(True)
    assert loss.launch is launch
    assert len(list(tmp_path.rglob("statistics_kernel.cubin"))) == 2

"""The parts that measure ops: which workloads, and what else their aims need."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import attention, fusion, gating, loss, moe, norm, placement, routing
from benchmarks.gpu import cases, step, tune
from benchmarks.gpu.peers import with_peers
from benchmarks.harness.limits import COPY, GEMM, limits
from benchmarks.harness.measure import interleave, summary
from benchmarks.harness.run import QUICK, Record, Settings, measure
from benchmarks.harness.workload import FORWARD, TRAINING, Operation, Workload

GPU = Settings(budget_s=0.6, min_rounds=7)


@dataclass(frozen=True)
class Context:
    """Where a part runs and until when."""

    device: torch.device
    dry_run: bool
    deadline: float  # of time.monotonic()

    @property
    def settings(self) -> Settings:
        return QUICK if self.dry_run else GPU

    def in_time(self) -> bool:
        return time.monotonic() < self.deadline


def _of_family(operation: Operation, workload: Callable[..., Workload], sizes: Iterable[Any]) -> Any:
    def run(context: Context) -> Iterator[Record]:
        peers = with_peers(operation)
        for case in sizes:
            if not context.in_time():
                return
            size = case.reduced() if context.dry_run else case
            work = workload(size, context.device, torch.bfloat16)
            work = replace(work, cold=not context.dry_run)  # what is in a cache is measured by nobody
            yield from measure(peers, work, peers.providers, context.settings)

    return run


def run_limits(context: Context) -> Iterator[Record]:
    """The machine's own: products in bf16, fp16 and fp32, copies, and the shortest call there is."""
    empty = torch.empty(1, device=context.device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        product, copy = limits(context.device, dtype, context.dry_run)
        samples = interleave(
            {GEMM: product.call, COPY: copy.call, "call": empty.zero_},
            context.device,
            context.settings.budget_s,
            sweep=None if context.dry_run else copy.call,
        )
        times = {name: summary(values) for name, values in samples.items()}
        yield {
            "op": "limits",
            "case": str(dtype).removeprefix("torch."),
            "gemm_what": product.what,
            "gemm_gflops": product.amount / times[GEMM]["median_s"] / 1e9,
            "copy_what": copy.what,
            "copy_gbytes_per_s": copy.amount / times[COPY]["median_s"] / 1e9,
            "call_s": times["call"]["median_s"],
        }


def cublas_seconds(work: Workload, context: Context) -> dict[str, float]:
    """Seconds of the same products as batches of equal experts, by cuBLAS, in each pass."""
    _, gate_up, down = work.inputs
    case = work.payload.case
    slots = len(work.payload.routing.token)
    rows = -(-slots // case.experts)
    x = torch.randn(case.experts, rows, case.hidden, device=work.device).to(work.dtype)
    act = torch.randn(case.experts, rows, case.intermediate, device=work.device).to(work.dtype)
    pairs = [(x, gate_up.transpose(1, 2)), (act, down.transpose(1, 2))]

    def forward() -> None:
        for a, b in pairs:
            torch.bmm(a, b)

    def training() -> None:
        for a, b in pairs:
            product = torch.bmm(a, b)
            torch.bmm(product, b.transpose(1, 2))
            torch.bmm(a.transpose(1, 2), product)

    _, copy = limits(work.device, work.dtype, context.dry_run)
    calls = {FORWARD: forward, TRAINING: training}
    sweep = None if context.dry_run else copy.call
    samples = interleave(calls, work.device, context.settings.budget_s, sweep=sweep)
    return {name: summary(values)["median_s"] for name, values in samples.items()}


def run_moe(context: Context) -> Iterator[Record]:
    for case in cases.EXPERTS:
        if not context.in_time():
            return
        size = case.reduced() if context.dry_run else case
        work = moe.workload(size, context.device, torch.bfloat16)
        products = None if case.decode else cublas_seconds(work, context)
        peers = with_peers(moe.OPERATION)
        work = replace(work, cold=not context.dry_run)
        for record in measure(peers, work, peers.providers, context.settings):
            yield record if products is None else record | {"cublas_s": products[record["pass"]]}
    yield from _of_family(routing.OPERATION, routing.workload, cases.ROUTING)(context)


def run_layers(context: Context) -> Iterator[Record]:
    yield from _of_family(norm.OPERATION, norm.workload, cases.NORM)(context)
    yield from _of_family(gating.OPERATION, gating.workload, cases.GATING)(context)


def run_tune(context: Context) -> Iterator[Record]:
    settings = replace(context.settings, budget_s=context.settings.budget_s / 2)
    yield from tune.run(context.device, context.dry_run, settings, context.deadline)


PARTS: dict[str, Callable[[Context], Iterator[Record]]] = {
    "limits": run_limits,
    "attention": _of_family(attention.OPERATION, attention.workload, cases.ATTENTION),
    "moe": run_moe,
    "fusion": _of_family(fusion.OPERATION, fusion.workload, cases.FUSION),
    "loss": _of_family(loss.OPERATION, loss.workload, cases.LOSS),
    "placement": _of_family(placement.OPERATION, placement.workload, cases.PLACEMENT),
    "layers": run_layers,
    "step": step.run,
    "tune": run_tune,
}

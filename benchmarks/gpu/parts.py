"""The parts that measure ops: which workloads, and what else their aims need."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch

from benchmarks import (
    attention,
    cross_attention,
    fusion,
    gating,
    grids,
    loss,
    moe,
    norm,
    placement,
    resample,
    routing,
)
from benchmarks.gpu import cases, step, tune
from benchmarks.gpu.peers import with_peers
from benchmarks.harness.limits import COPY, GEMM, limits
from benchmarks.harness.measure import interleave, kernels, summary
from benchmarks.harness.run import QUICK, Record, Settings, call_once, measure, run_pass
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


@dataclass(frozen=True)
class Job:
    """What a part does at a stretch: where it breaks off, the part goes on with the next one.

    Attributes:
        share: it has an equal share of the part's time, in place of all that is left.
        compile: what compiles for it, each to be called by a process that keeps nothing but caches on disk.
    """

    name: str
    run: Callable[[Context], Iterator[Record]]
    share: bool = False
    compile: tuple[Callable[[Context], None], ...] = ()


def _workload(make: Callable[..., Workload], case: Any, context: Context) -> Workload:
    """In bfloat16; what is in a cache is measured by nobody."""
    size = case.reduced() if context.dry_run else case
    return replace(make(size, context.device, torch.bfloat16), cold=not context.dry_run)


def _measure(
    peers: Operation, make: Callable[..., Workload], case: Any, context: Context
) -> Iterator[Record]:
    yield from measure(peers, _workload(make, case, context), peers.providers, context.settings)


def _compile(peers: Operation, make: Callable[..., Workload], case: Any, context: Context) -> None:
    call_once(_workload(make, case, context), peers.providers)


def _profile(
    operation: Operation, make: Callable[..., Workload], case: Any, context: Context
) -> Iterator[Record]:
    """What pyvlm's row runs in each pass."""
    work = _workload(make, case, context)
    function = operation.providers[0].build(work)
    for name in work.costs:
        yield {
            "op": f"kernels of {operation.name}",
            "case": work.case,
            "pass": name,
            "kernels": kernels(run_pass(function, work, name), work.device),
        }


def run_limits(dtype: torch.dtype, context: Context) -> Iterator[Record]:
    """The machine's own: products, copies, and the shortest call there is."""
    empty = torch.empty(1, device=context.device)
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


def run_experts(
    peers: Operation, make: Callable[..., Workload], case: Any, context: Context
) -> Iterator[Record]:
    work = _workload(make, case, context)
    products = None if case.decode else cublas_seconds(work, context)
    for record in measure(peers, work, peers.providers, context.settings):
        yield record if products is None else record | {"cublas_s": products[record["pass"]]}


def run_tune(family: tune.Family, case: Any, context: Context) -> Iterator[Record]:
    settings = replace(context.settings, budget_s=context.settings.budget_s / 2)
    work = _workload(family.workload, case, context)
    yield from tune.run(family, case, work, context.dry_run, settings, context.deadline)


class Family(NamedTuple):
    operation: Operation
    workload: Callable[..., Workload]
    cases: tuple[Any, ...]
    run: Callable[..., Iterator[Record]] = _measure


FAMILIES = {
    "attention": (Family(attention.OPERATION, attention.workload, cases.ATTENTION),),
    "moe": (
        Family(moe.OPERATION, moe.workload, cases.EXPERTS, run_experts),
        Family(routing.OPERATION, partial(routing.workload, training=True), cases.ROUTING),
    ),
    "fusion": (
        Family(fusion.OPERATION, fusion.workload, cases.FUSION),
        Family(cross_attention.OPERATION, cross_attention.workload, cases.WINDOWS),
        Family(grids.OPERATION, grids.workload, cases.GRIDS),
        Family(resample.OPERATION, resample.workload, cases.RESAMPLE),
    ),
    "loss": (Family(loss.OPERATION, loss.workload, cases.LOSS),),
    "placement": (Family(placement.OPERATION, placement.workload, cases.PLACEMENT),),
    "layers": (
        Family(norm.OPERATION, norm.workload, cases.NORM),
        Family(gating.OPERATION, gating.workload, cases.GATING),
    ),
}


def _jobs(family: Family) -> tuple[Job, ...]:
    """What is measured of each case, and what compiles for it."""
    measured = (with_peers(family.operation), family.workload)
    return tuple(
        Job(case.name, partial(family.run, *measured, case), compile=(partial(_compile, *measured, case),))
        for case in family.cases
    )


PARTS: dict[str, tuple[Job, ...]] = {
    "limits": tuple(
        Job(str(dtype), partial(run_limits, dtype))
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
    **{part: tuple(chain(*map(_jobs, families))) for part, families in FAMILIES.items()},
    "step": tuple(
        Job(
            step.case_name(kind, compiled),
            partial(step.run, kind, compiled),
            compile=tuple(
                partial(step.compile_row, kind, compiled, row)
                for row in step.rows_of(kind, compiled)
                if row != "sdpa"  # it compiles nothing
            ),
        )
        for kind, compiled in step.CASES
    ),
    "profile": (
        *(
            Job(f"{family.operation.name} {case.name}", partial(_profile, *family[:2], case))
            for family in chain(*FAMILIES.values())
            for case in family.cases
        ),
        *(Job(f"step {kind}", partial(step.profile, kind)) for kind in step.KINDS),
    ),
    "tune": tuple(
        Job(f"{family.operation.name} {case.name}", partial(run_tune, family, case), share=True)
        for family in tune.FAMILIES
        for case in family.cases
    ),
}

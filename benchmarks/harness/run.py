"""Checks and measures every provider of a workload: one record, ready for JSON, a pass."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.limits import COPY, GEMM, limits
from benchmarks.harness.measure import interleave, peak_memories, summary
from benchmarks.harness.verify import Expected, verify
from benchmarks.harness.workload import FORWARD, Cost, Function, Operation, Provider, Unavailable, Workload

TIMED, WRONG, UNAVAILABLE = "timed", "WRONG", "unavailable"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    budget_s: float = 10.0  # for the rounds of one workload and pass
    min_rounds: int = 7
    quick: bool = False


QUICK = Settings(budget_s=0.05, min_rounds=3, quick=True)


def run_pass(function: Function, work: Workload, name: str) -> Callable[[], tuple[Tensor, ...]]:
    """One call of a pass; it returns the output and, where the pass has a backward, the inputs' gradients."""
    if name == FORWARD:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*work.inputs),)

        return forward

    leaves = tuple(x.detach().clone().requires_grad_() for x in work.inputs)

    def training() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, work.cotangent))

    return training


def measure(
    operation: Operation, work: Workload, providers: tuple[Provider, ...], settings: Settings
) -> Iterator[Record]:
    """A record a pass. A provider whose results in a pass are not within tolerance is not timed in it."""
    functions: dict[str, Function] = {}
    reasons: dict[str, str] = {}
    for provider in providers:
        try:
            functions[provider.name] = provider.build(work)
        except Unavailable as error:
            reasons[provider.name] = str(error)
    expected = Expected.of(operation, work)
    for name, cost in work.costs.items():
        outcomes: dict[str, Record] = {
            provider: {"status": UNAVAILABLE, "detail": reason} for provider, reason in reasons.items()
        }
        calls = {}
        for provider, function in functions.items():
            call = run_pass(function, work, name)
            try:
                problem = verify(call(), expected)
            except Exception as error:  # a peer may raise anything; it is told in its row
                check_device(work.device)
                outcomes[provider] = {"status": UNAVAILABLE, "detail": _first_line(error)}
                continue
            if problem is None:
                calls[provider] = call
            else:
                outcomes[provider] = {"status": WRONG, "detail": problem}
        yield _time(operation, work, name, cost, calls, outcomes, providers, settings)


def call_once(work: Workload, providers: tuple[Provider, ...]) -> None:
    """Every pass of every provider, so that what compiles is in the caches on disk; what fails is left to
    `measure`, which tells it."""
    for provider in providers:
        try:
            function = provider.build(work)
            for name in work.costs:
                run_pass(function, work, name)()
        except Exception:  # whatever a peer may raise
            check_device(work.device)


def _time(
    operation: Operation,
    work: Workload,
    name: str,
    cost: Cost,
    calls: dict[str, Callable[[], object]],
    outcomes: dict[str, Record],
    providers: tuple[Provider, ...],
    settings: Settings,
) -> Record:
    ceilings = limits(work.device, work.dtype, settings.quick)
    samples = interleave(
        {**calls, **{limit.name: limit.call for limit in ceilings}},
        work.device,
        settings.budget_s,
        settings.min_rounds,
        sweep=ceilings[1].call if work.cold else None,
    )
    measured = {limit.name: {"what": limit.what, **summary(samples[limit.name])} for limit in ceilings}
    rates = {limit.name: limit.amount / measured[limit.name]["median_s"] for limit in ceilings}
    measured[GEMM]["gflops"] = rates[GEMM] / 1e9
    measured[COPY]["gbytes_per_s"] = rates[COPY] / 1e9
    least = {GEMM: cost.flops / rates[GEMM], COPY: cost.bytes / rates[COPY]}
    bound = max(least, key=least.__getitem__)
    for provider, peak in peak_memories(calls, work.device).items():
        times = summary(samples[provider])
        outcomes[provider] = {
            "status": TIMED,
            **times,
            "useful_gflops": cost.flops / times["median_s"] / 1e9,
            "of_limit": least[bound] / times["median_s"],
            "peak_bytes": peak,
        }
    return {
        "op": operation.name,
        "case": work.case,
        "reason": work.reason,
        "shape": work.shape,
        "dtype": DTYPE_NAMES[work.dtype],
        "pass": name,
        "cold": work.cold,
        "useful_flops": cost.flops,
        "least_bytes": cost.bytes,
        "bound": bound,
        "limits": measured,
        "providers": {provider.name: outcomes[provider.name] for provider in providers},
    }


def check_device(device: torch.device) -> None:
    """Raises where a GPU will run nothing more for this process: a kernel read or wrote outside, say.

    To be called where an exception is handled: the traceback then tells both.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"

"""Time and memory of one call."""

import ctypes
import gc
import operator
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

# Shorter samples are made of several calls, so that the clock and the loop do not show.
MIN_SAMPLE_S = 2e-3
MOST_KERNELS = 20  # of one call; whole models have hundreds, of which few take long


def _seconds(call: Call, calls: int, device: torch.device) -> float:
    """On a GPU by its own clock: what the host does while the GPU still sweeps its cache does not show."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def interleave(
    calls: dict[str, Call],
    device: torch.device,
    budget_s: float,
    min_rounds: int = 7,
    max_rounds: int = 50,
    sweep: Call | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each of `calls`, measured in rounds that run all of them.

    A change of the machine's state thus meets them alike. Each round begins with the next call, so that none
    always follows the same neighbour.

    `sweep` runs before every sample, unmeasured, and samples are then single calls.
    """
    names = list(calls)
    repeats = {}
    for name in names:
        calls[name]()  # warm-up: first-touch, lazy initialisation
        once = _seconds(calls[name], 1, device)
        repeats[name] = 1 if sweep else max(1, round(MIN_SAMPLE_S / max(once, 1e-7)))

    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for index in range(max_rounds):
        if index >= min_rounds and time.perf_counter() - start > budget_s:
            break
        first = index % len(names)
        for name in names[first:] + names[:first]:
            if sweep:
                sweep()
            samples[name].append(_seconds(calls[name], repeats[name], device))
    return samples


def summary(samples: list[float]) -> dict[str, float | int]:
    """Median and quartiles of samples in seconds."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {
        "median_s": quartiles[1],
        "q1_s": quartiles[0],
        "q3_s": quartiles[2],
        "min_s": min(samples),
        "samples": len(samples),
    }


def peak_memories(calls: dict[str, Call], device: torch.device) -> dict[str, int | None]:
    """`peak_memory` of several calls."""
    gc.collect()
    gc.freeze()  # from here on only what the calls themselves leave is looked through
    try:
        return {name: peak_memory(call, device) for name, call in calls.items()}
    finally:
        gc.unfreeze()


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Peak bytes of one call above those held before it: its results are included, its inputs are not.

    CUDA: bytes of torch's allocator. CPU: resident memory of the process as Linux counts it, whoever took it;
    None on other systems.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # freed memory that malloc keeps would be used again without a trace
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    before = _high_water_mark()
    call()
    return max(0, _high_water_mark() - before)


def kernels(call: Call, device: torch.device) -> list[dict[str, str | int | float]]:
    """What one call runs, by torch's profiler, longest first: on a GPU its kernels, elsewhere torch's ops.

    A name, how many, and the seconds of all of them.
    """
    on_gpu = device.type == "cuda"
    call()  # compiles, and takes what is taken once
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    time_of = operator.attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")  # µs
    found = [
        {"name": event.key, "calls": event.count, "seconds": 1e-6 * time_of(event)}
        for event in sorted(profiler.key_averages(), key=time_of, reverse=True)
        if time_of(event) > 0
    ]
    return found[:MOST_KERNELS]


def _high_water_mark() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

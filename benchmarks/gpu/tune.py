"""Which tiles are fastest on the GPU here: of each kernel, one change at a time from the best so far.

What it finds is told, not used: it belongs into the tables of tiles in `triton_kernels/`.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import Any

import torch
import triton
from pyvlm.triton_kernels import attention as attention_kernels
from pyvlm.triton_kernels import fusion as fusion_kernels
from pyvlm.triton_kernels import loss as loss_kernels
from pyvlm.triton_kernels import moe as moe_kernels
from pyvlm.triton_kernels.common import capability

from benchmarks import attention, fusion, loss, moe
from benchmarks.gpu import cases
from benchmarks.harness.run import TIMED, Record, Settings, measure, run_pass
from benchmarks.harness.workload import FORWARD, TRAINING, Function, Operation, Provider, Workload

# Of the numbers of a tile; of those that are not named 16 and 256.
PRODUCTS = {"stages": (1, 5), "warps": (4, 8)}
ROWS = {"rows": (1, 64), "warps": (1, 16), "stages": (1, 1)}  # tiles of whole rows
QUICK_NEIGHBOURS = 2  # of a dry run


@dataclass(frozen=True)
class Family:
    """The kernels of an op, and where they are tried.

    Attributes:
        kernels: its module has `default_config` and `launch`.
        config: its default tiles for a case and a workload of it.
        passes: by each kernel's field of the config, the pass in which it runs.
        bounds: the least and the most that a number of a tile may be.
    """

    kernels: ModuleType
    operation: Operation
    workload: Callable[..., Workload]
    cases: tuple[Any, ...]
    config: Callable[[Any, Workload], Any]
    passes: dict[str, str]
    bounds: dict[str, tuple[int, int]] = field(default_factory=lambda: PRODUCTS)


def _named(sizes: tuple[Any, ...], *names: str) -> tuple[Any, ...]:
    return tuple(case for case in sizes if case.name in names)


FAMILIES = (
    Family(
        attention_kernels,
        attention.OPERATION,
        attention.workload,
        _named(cases.ATTENTION, "bidirectional-image-8k", "mmca-8k", "mmca-joint-8k", "short-1k"),
        lambda case, work: attention_kernels.default_config(
            case.head_dim, work.dtype, capability(work.device)
        ),
        {"forward": FORWARD, "grad_q": TRAINING, "grad_kv": TRAINING},
    ),
    Family(
        moe_kernels,
        moe.OPERATION,
        moe.workload,
        _named(cases.EXPERTS, "moe-llava", "fine-grained-e64", "decode-t8"),
        lambda case, work: moe_kernels.default_config(work.dtype, capability(work.device), case.decode),
        dict.fromkeys(("up", "down"), FORWARD)
        | dict.fromkeys(("grad_hidden", "grad_rows", "grad_matrix"), TRAINING),
    ),
    Family(
        fusion_kernels,
        fusion.OPERATION,
        fusion.workload,
        _named(cases.FUSION, "comm-clip-l"),
        lambda case, work: fusion_kernels.default_config(case.channels, "g" in case.per_level),
        {"forward": FORWARD, "backward": TRAINING},
        ROWS,
    ),
    Family(
        loss_kernels,
        loss.OPERATION,
        loss.workload,
        _named(cases.LOSS, "15-percent"),
        lambda case, work: loss_kernels.default_config(work.dtype, capability(work.device)),
        {"statistics": FORWARD} | dict.fromkeys(("grad_logits", "grad_hidden", "grad_weight"), TRAINING),
    ),
)


def neighbours(tiles: Any, bounds: dict[str, tuple[int, int]] = PRODUCTS) -> list[Any]:
    """Tiles that differ in one field: a side or the warps halved or doubled, a stage less or more, a way of
    working taken or not. And in two or three, where one of them alone gains nothing: a side doubled for a
    stage less, which fits where both do not; a side and the warps halved, also with a stage less, so that
    two programs fit a multiprocessor and one multiplies while the other ends."""
    found = []
    for name in (each.name for each in fields(tiles)):
        value = getattr(tiles, name)
        if isinstance(value, bool):
            found.append({name: not value})
            continue
        changed = [{name: value - 1}, {name: value + 1}]
        if name != "stages":
            changed = [{name: value // 2}, {name: value * 2}]
        if name not in ("stages", "warps"):
            fewer = {name: value // 2, "warps": tiles.warps // 2}
            less = {"stages": tiles.stages - 1}
            changed += [{name: value * 2} | less, fewer, fewer | less]
        found += changed

    def within(change: dict[str, int]) -> bool:
        limits = ((number, bounds.get(name, (16, 256))) for name, number in change.items())
        return all(isinstance(n, bool) or least <= n <= most for n, (least, most) in limits)

    return [replace(tiles, **change) for change in found if within(change)]


def is_allowed(config: Any, kernel: str, tiles: Any) -> bool:
    """Whether the tiles go together with those of the other kernels."""
    try:
        replace(config, **{kernel: tiles})
    except ValueError:
        return False
    return True


def label(tiles: Any) -> str:
    return " ".join(f"{each.name} {getattr(tiles, each.name)}" for each in fields(tiles))


@contextmanager
def compiled_only(kernels: ModuleType) -> Iterator[None]:
    """Calls inside launch none of their kernels; at the end all are compiled, at once and on every core."""
    launches: list[tuple[Any, ...]] = []
    launch = kernels.launch
    kernels.launch = lambda *arguments: launches.append(arguments)
    try:
        yield
    finally:
        kernels.launch = launch
    # Here and not inside: a backward runs in a thread of autograd's, which knows nothing of this mode. What
    # does not compile is told where it is to run.
    with triton.AsyncCompileMode(ThreadPoolExecutor(), ignore_errors=True):
        for kernel, grid, tiles, arguments in launches:
            named = {name: arguments[name] for name in kernel.arg_names}
            options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
            kernel.warmup(**named, grid=grid, **options)


def with_config(kernels: ModuleType, config: Any, function: Function) -> Function:
    """The function, by these tiles; they stay in force for its backward, until another one is called."""

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        kernels.default_config = lambda *_: config
        return function(*inputs)

    return run


def search(
    family: Family, case: Any, work: Workload, dry_run: bool, settings: Settings, deadline: float
) -> Iterator[Record]:
    """A record a round: candidates for one kernel beside the best so far, the others' tiles as they are."""
    config = family.config(case, work)
    (ours, *_) = family.operation.providers
    for kernel, name in family.passes.items():
        if name not in work.costs:
            continue
        of_pass = replace(work, costs={name: work.costs[name]})
        best, tried = getattr(config, kernel), set()
        while candidates := [
            tiles
            for tiles in neighbours(best, family.bounds)
            if tiles not in tried and is_allowed(config, kernel, tiles)
        ]:
            if dry_run:
                candidates = candidates[:QUICK_NEIGHBOURS]
            if time.monotonic() > deadline:
                return
            functions = {
                tiles: with_config(family.kernels, replace(config, **{kernel: tiles}), ours.build(work))
                for tiles in (best, *candidates)
            }
            if work.device.type == "cuda":
                with compiled_only(family.kernels):
                    for function in functions.values():
                        run_pass(function, of_pass, name)()
            providers = tuple(
                Provider(label(tiles), lambda _, function=function: function)
                for tiles, function in functions.items()
            )
            (record,) = measure(family.operation, of_pass, providers, settings)
            yield record | {"op": f"tiles of {record['op']}", "case": f"{record['case']} {kernel}"}
            tried |= functions.keys()
            seconds = {
                tiles: record["providers"][label(tiles)]["median_s"]
                for tiles in functions
                if record["providers"][label(tiles)]["status"] == TIMED
            }
            fastest = min(seconds, key=seconds.__getitem__, default=best)
            if fastest == best or dry_run:
                break
            best = fastest
        config = replace(config, **{kernel: best})


def run(
    family: Family, case: Any, work: Workload, dry_run: bool, settings: Settings, deadline: float
) -> Iterator[Record]:
    """`search`, after which the family's own tiles are in force again."""
    default_config = family.kernels.default_config
    try:
        yield from search(family, case, work, dry_run, settings, deadline)
    finally:
        family.kernels.default_config = default_config

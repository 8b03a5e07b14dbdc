"""What an op family tells the harness: its workloads, its providers and the reference they are held to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORWARD, TRAINING = "forward", "forward+backward"

Function = Callable[..., Tensor]


class Unavailable(Exception):
    """Raised by a provider's `build` where it cannot do a workload; the message says why."""


@dataclass(frozen=True)
class Cost:
    """What one pass cannot do without: floating-point operations on values that count, and memory traffic."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Workload:
    case: str
    reason: str
    shape: str  # for the reader of the table
    dtype: torch.dtype
    inputs: tuple[Tensor, ...]  # the differentiable arguments of every provider's function
    cotangent: Tensor
    costs: dict[str, Cost]  # by pass; a pass that is not named here is not run
    terms: tuple[float, ...]  # of the output and each gradient: see `terms` of tolerance.mismatch
    payload: Any = None  # what providers need besides: spans, a routing, ...
    cold: bool = False  # inputs come from memory, as in use: caches are swept before every sample

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[[Workload], Function]  # everything that is not timed (masks, compilation) happens in here


@dataclass(frozen=True)
class Operation:
    """One op family. The first provider is pyvlm's: the one that the others are compared with.

    `workloads(device, dtypes, names, quick)` yields workloads; `names` None means the benchmark's own choice.
    `reference(workload)` is the definition, called in float64. `plain(workload)` is PyTorch as users write it
    and is called in the workload's dtype: its error sets the tolerance.
    """

    name: str
    workloads: Callable[..., Any]
    case_names: tuple[str, ...]
    providers: tuple[Provider, ...]
    reference: Callable[[Workload], Function]
    plain: Callable[[Workload], Function]


def large_or_named(make: Callable[..., Workload], cases: Sequence[Any]) -> Callable[..., Iterator[Workload]]:
    """`Operation.workloads` of cases that tests share: of those names, or the large; reduced if quick.

    Args:
        make: a workload of a case, a device and a dtype.
        cases: each has a `name`, is `large` or not, and the large ones have a `reduced()` form.
    """

    def workloads(
        device: torch.device, dtypes: Sequence[torch.dtype], names: Sequence[str] | None, quick: bool
    ) -> Iterator[Workload]:
        for case in cases:
            if case.large if names is None else case.name in names:
                for dtype in dtypes:
                    yield make(case.reduced() if quick and case.large else case, device, dtype)

    return workloads

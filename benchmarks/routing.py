"""Expert choice beside softmax and torch.topk.

Shapes: T tokens, E experts, C tokens that an expert takes of a group, S slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.workload import FORWARD, Cost, Function, Operation, Provider, Workload
from pyvlm.ops import expert_choice


@dataclass(frozen=True)
class RoutingCase:
    name: str
    reason: str
    tokens: int  # of each group
    experts: int
    capacity: int
    groups: int = 1

    def reduced(self) -> "RoutingCase":
        return RoutingCase(self.name, self.reason, 64, self.experts, 8, min(self.groups, 4))


CASES = (
    RoutingCase("one-group", "a whole batch of tokens", 65_536, 64, 2_048),
    RoutingCase("images", "each image of 576 tokens by itself", 576, 8, 72, groups=32),
)


def workload(case: RoutingCase, device: torch.device, dtype: torch.dtype) -> Workload:
    logits_TE = torch.randn(
        case.groups * case.tokens, case.experts, generator=torch.Generator().manual_seed(1)
    ).to(device, dtype)
    slots = case.groups * case.experts * case.capacity
    # Of a slot: its token, weight and place among the token's slots. Of a token: where those begin.
    lists_bytes = 12 * slots + 4 * len(logits_TE)
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"{case.groups} groups of T{case.tokens} E{case.experts} C{case.capacity}",
        dtype=dtype,
        inputs=(logits_TE,),
        cotangent=torch.ones(()),
        costs={FORWARD: Cost(0, logits_TE.nbytes + lists_bytes)},
        terms=(0.0,),
        payload=case,
    )


def workloads(
    device: torch.device, dtypes: list[torch.dtype], names: list[str] | None, quick: bool
) -> Iterator[Workload]:
    for case in CASES:
        for dtype in dtypes:
            if names is None or case.name in names:
                yield workload(case.reduced() if quick else case, device, dtype)


def _expert_choice(backend: str, work: Workload) -> Function:
    """The sum of the probabilities that each expert takes: the slots themselves are what tests compare."""
    case = work.payload
    offsets = torch.arange(case.groups + 1, device=work.device) * case.tokens
    slots = case.groups * case.experts * min(case.capacity, case.tokens)

    def run(logits_TE: Tensor) -> Tensor:
        routing = expert_choice(logits_TE, case.capacity, offsets, backend, slots)
        return routing.weight.view(case.experts, -1).sum(1)

    return run


def _native(work: Workload) -> Function:
    return _expert_choice("native", work)


def _reference(work: Workload) -> Function:
    return _expert_choice("reference", work)


def _topk(work: Workload) -> Function:
    """The selection alone, without the lists that experts and the sum over a token's slots need."""
    case = work.payload

    def run(logits_TE: Tensor) -> Tensor:
        prob_TE = logits_TE.softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))
        prob_GET = prob_TE.view(case.groups, case.tokens, case.experts).transpose(1, 2)
        return prob_GET.topk(case.capacity).values.sum((0, 2))

    return run


OPERATION = Operation(
    name="routing",
    workloads=workloads,
    case_names=tuple(case.name for case in CASES),
    providers=(Provider("pyvlm", _native), Provider("topk", _topk), Provider("reference", _reference)),
    reference=_reference,
    plain=_reference,
)

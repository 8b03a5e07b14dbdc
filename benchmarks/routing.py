"""Routings beside what torch has for them: expert choice, and choices of a router of transformers.

Shapes: T tokens, E experts, K choices a token, C tokens that an expert takes of a group, S slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness.workload import (
    FORWARD,
    TRAINING,
    Cost,
    Function,
    Operation,
    Provider,
    Workload,
)
from pyvlm.ops import expert_choice, routing_from_choices


@dataclass(frozen=True)
class ExpertChoiceCase:
    name: str
    reason: str
    tokens: int  # of each group
    experts: int
    capacity: int
    groups: int = 1

    @property
    def shape(self) -> str:
        return f"{self.groups} groups of T{self.tokens} E{self.experts} C{self.capacity}"

    @property
    def outputs(self) -> int:
        return self.experts

    def reduced(self) -> "ExpertChoiceCase":
        return replace(self, tokens=64, capacity=8, groups=min(self.groups, 4))

    def scores(self) -> Tensor:
        """The router's logits [T, E]."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.groups * self.tokens, self.experts, generator=generator)

    def bytes(self, scores: Tensor) -> int:
        # Of a slot: its token, weight and place among the token's slots. Of a token: where those begin.
        return scores.nbytes + 12 * self.groups * self.experts * self.capacity + 4 * len(scores)

    def pyvlm(self, backend: str, device: torch.device) -> Function:
        """The sum of the probabilities that each expert takes: tests compare the slots themselves."""
        offsets = torch.arange(self.groups + 1, device=device) * self.tokens
        slots = self.groups * self.experts * min(self.capacity, self.tokens)

        def run(logits_TE: Tensor) -> Tensor:
            routing = expert_choice(logits_TE, self.capacity, offsets, backend, slots)
            return routing.weight.view(self.experts, -1).sum(1)

        return run

    def eager(self, device: torch.device) -> Function:
        """The choice alone, without the lists that experts and the sum over a token's slots need."""

        def run(logits_TE: Tensor) -> Tensor:
            prob_TE = logits_TE.softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))
            prob_GET = prob_TE.view(self.groups, self.tokens, self.experts).transpose(1, 2)
            return prob_GET.topk(self.capacity).values.sum((0, 2))

        return run


@dataclass(frozen=True)
class ChoicesCase:
    name: str
    reason: str
    tokens: int
    experts: int
    top_k: int

    @property
    def shape(self) -> str:
        return f"T{self.tokens} E{self.experts} K{self.top_k}"

    @property
    def outputs(self) -> int:
        return self.tokens * self.top_k

    def reduced(self) -> "ChoicesCase":
        return replace(self, tokens=min(self.tokens, 64))

    def scores(self) -> Tensor:
        """The choices' weights [T, K]."""
        return torch.rand(self.tokens, self.top_k, generator=torch.Generator().manual_seed(1))

    def index(self, device: torch.device) -> Tensor:
        """The choices, int64 [T, K]."""
        scores_TE = torch.rand(self.tokens, self.experts, generator=torch.Generator().manual_seed(2))
        return scores_TE.topk(self.top_k).indices.to(device)

    def bytes(self, scores: Tensor) -> int:
        # A choice is read, and is a slot: its weight, token and place. Of a token: where its slots begin.
        return scores.nbytes + (8 + 12) * scores.numel() + 4 * len(scores)

    def pyvlm(self, backend: str, device: torch.device) -> Function:
        """The weights of the slots."""
        index_TK = self.index(device)
        return lambda weight_TK: (
            routing_from_choices(index_TK, weight_TK, self.experts, False, backend).weight
        )

    def eager(self, device: torch.device) -> Function:
        """What experts on a grouped product need: the slots' tokens and weights, and where experts begin.

        Without the places of each token's slots: their outputs are added with atomics.
        """
        index_TK = self.index(device)

        def run(weight_TK: Tensor) -> Tensor:
            expert_S, order_S = index_TK.flatten().sort(stable=True)
            token_S = order_S // self.top_k
            offsets_E = torch.searchsorted(expert_S, torch.arange(self.experts, device=device), right=True)
            weight_S = weight_TK.flatten().to(torch.promote_types(weight_TK.dtype, torch.float32))[order_S]
            # All three are results: a compiler leaves out what nobody reads.
            return torch.where((token_S >= 0) & (offsets_E[-1] >= 0), weight_S, 0)

        return run


CASES = (
    ExpertChoiceCase("one-group", "a whole batch of tokens", 65_536, 64, 2_048),
    ExpertChoiceCase("images", "each image of 576 tokens by itself", 576, 8, 72, groups=32),
    ChoicesCase("choices", "of a router of transformers, as Qwen3-MoE's", 16_384, 128, 8),
    ChoicesCase("choices-t8", "the same of eight sequences that go on", 8, 128, 8),
)


def workload(
    case: ExpertChoiceCase | ChoicesCase, device: torch.device, dtype: torch.dtype, training: bool = False
) -> Workload:
    scores = case.scores().to(device, dtype)
    costs = {FORWARD: Cost(0, case.bytes(scores))}
    if training:  # the backward reads the scores and the slots again, and writes the scores' gradient
        costs[TRAINING] = Cost(0, 2 * case.bytes(scores) + scores.nbytes)
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=case.shape,
        dtype=dtype,
        inputs=(scores,),
        cotangent=torch.ones(case.outputs, device=device),
        costs=costs,
        terms=(0.0, 0.0),
        payload=case,
    )


def workloads(
    device: torch.device, dtypes: list[torch.dtype], names: list[str] | None, quick: bool
) -> Iterator[Workload]:
    for case in CASES:
        for dtype in dtypes:
            if names is None or case.name in names:
                yield workload(case.reduced() if quick else case, device, dtype)


def _native(work: Workload) -> Function:
    return work.payload.pyvlm("native", work.device)


def _reference(work: Workload) -> Function:
    return work.payload.pyvlm("reference", work.device)


def _eager(work: Workload) -> Function:
    return work.payload.eager(work.device)


OPERATION = Operation(
    name="routing",
    workloads=workloads,
    case_names=tuple(case.name for case in CASES),
    providers=(Provider("pyvlm", _native), Provider("eager", _eager), Provider("reference", _reference)),
    reference=_reference,
    plain=_reference,
)

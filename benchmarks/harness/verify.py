"""Whether a provider's results are right, by the one tolerance policy of the tests (`tests/tolerance.py`)."""

from dataclasses import dataclass

import torch
from tolerance import mismatch
from torch import Tensor

from benchmarks.harness.workload import TRAINING, Function, Operation, Workload


@dataclass(frozen=True)
class Expected:
    """The output and, where the workload has a backward, the gradients of its inputs."""

    exact: tuple[Tensor, ...]  # by the reference in float64
    plain: tuple[Tensor, ...]  # by plain PyTorch in the workload's dtype
    terms: tuple[float, ...]

    @classmethod
    def of(cls, operation: Operation, work: Workload) -> "Expected":
        exact = _results(operation.reference(work), work, torch.float64)
        return cls(exact, _results(operation.plain(work), work, work.dtype), work.terms)


def _results(function: Function, work: Workload, dtype: torch.dtype) -> tuple[Tensor, ...]:
    training = TRAINING in work.costs
    leaves = tuple(x.detach().to(dtype, copy=True).requires_grad_(training) for x in work.inputs)
    out = function(*leaves)
    if not training:
        return (out,)
    return (out.detach(), *torch.autograd.grad(out, leaves, work.cotangent.to(dtype)))


def verify(results: tuple[Tensor, ...], expected: Expected) -> str | None:
    """What is wrong with the results of one pass (the output, and the gradients if it has any), or None."""
    names = ("output", *(f"gradient of input {i}" for i in range(len(results) - 1)))
    for i, (result, name) in enumerate(zip(results, names, strict=True)):
        problem = mismatch(result, expected.exact[i], expected.plain[i], name, expected.terms[i])
        if problem is not None:
            return problem
    return None

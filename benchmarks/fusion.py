"""Merged levels beside a loop over levels, eager and compiled, and beside the collapse in plain PyTorch.

Shapes: L levels, N images, T tokens of a map, C channels, H output features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fusion.fusion_cases import CASES, MergeCase
from torch import Tensor

from benchmarks.harness.workload import (
    FORWARD,
    TRAINING,
    Cost,
    Function,
    Operation,
    Provider,
    Workload,
    large_or_named,
)
from pyvlm.ops import merge_levels


@dataclass(frozen=True)
class Merge:
    case: MergeCase
    parameters: tuple[str, ...]  # their names, in the order of the inputs behind the levels


def workload(case: MergeCase, device: torch.device, dtype: torch.dtype) -> Workload:
    levels, parameters = case.inputs(dtype)
    inputs = tuple(tensor.to(device) for tensor in (*levels, *parameters.values()))
    tokens = case.images * case.tokens
    # One multiplication and one addition each; a weight that levels share multiplies their sum.
    products = case.levels if "w" in case.per_level else 1
    flops = 2 * tokens * case.channels * case.features * products
    level_bytes = sum(level.nbytes for level in levels)
    weight_bytes, out_bytes = parameters["weight"].nbytes, tokens * case.features * levels[0].element_size()
    shape = f"L{case.levels} N{case.images} T{case.tokens} C{case.channels} H{case.features}"
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"{shape} {'a weight for each level' if 'w' in case.per_level else 'one weight'}",
        dtype=dtype,
        inputs=inputs,
        cotangent=torch.randn(
            case.images, case.tokens, case.features, generator=torch.Generator().manual_seed(3)
        ).to(device, dtype),
        # Two products in the backward for one in the forward; it reads levels, weight and dy, and writes the
        # gradients of levels and weight.
        costs={
            FORWARD: Cost(flops, level_bytes + weight_bytes + out_bytes),
            TRAINING: Cost(3 * flops, 3 * level_bytes + 3 * weight_bytes + 2 * out_bytes),
        },
        terms=(0.0,) * (1 + len(inputs)),
        payload=Merge(case, tuple(parameters)),
    )


def _merge(backend: str, work: Workload) -> Function:
    merge = work.payload

    def run(*inputs: Tensor) -> Tensor:
        levels, parameters = inputs[: merge.case.levels], inputs[merge.case.levels :]
        return merge_levels(levels, **dict(zip(merge.parameters, parameters, strict=True)), backend=backend)

    return run


def _pyvlm(work: Workload) -> Function:
    # The kernel is named: "auto" might fall back, and the time of a fallback would stand in the kernel's row.
    return _merge("native" if work.device.type == "cpu" else "triton", work)


def _collapse(work: Workload) -> Function:
    """The definition: with one weight the sum of the normalised levels, and one product."""
    return _merge("reference", work)


def _eager(work: Workload) -> Function:
    """A norm and a projection for each level, times alpha, added up."""
    merge = work.payload
    count = merge.case.levels

    def run(*inputs: Tensor) -> Tensor:
        levels, (alpha, *parameters) = inputs[:count], inputs[count:]
        shared_dims = {"weight": 2, "bias": 1, "ln_weight": 1, "ln_bias": 1}
        each = [
            [p] * count if p.dim() == shared_dims[name] else p.unbind()
            for name, p in zip(merge.parameters[1:], parameters, strict=True)
        ]
        out = torch.zeros((), dtype=work.dtype, device=work.device)
        for level, a, weight, bias, ln_weight, ln_bias in zip(levels, alpha.unbind(), *each, strict=True):
            normed = F.layer_norm(level, level.shape[-1:], ln_weight, ln_bias)
            out = out + a * F.linear(normed, weight, bias)
        return out

    return run


def _compile(work: Workload) -> Function:
    torch.compiler.reset()
    return torch.compile(_eager(work))


OPERATION = Operation(
    name="fusion",
    workloads=large_or_named(workload, CASES),
    case_names=tuple(case.name for case in CASES),
    providers=(
        Provider("pyvlm", _pyvlm),
        Provider("eager", _eager),
        Provider("collapse", _collapse),
        Provider("compile", _compile),
    ),
    reference=_collapse,
    plain=_eager,
)

"""Linear layers beside torch's own.

Shapes: M tokens, K features in, N features out.
"""

import torch
from fusion.linear_cases import CASES, LinearCase

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
from pyvlm.ops.linear import linear


def workload(case: LinearCase, device: torch.device, dtype: torch.dtype) -> Workload:
    inputs = tuple(tensor.to(device) for tensor in case.inputs(dtype))
    x, weight, _ = inputs
    flops = 2 * case.tokens * case.in_features * case.out_features
    y_bytes = case.tokens * case.out_features * x.element_size()
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"M{case.tokens} K{case.in_features} N{case.out_features}",
        dtype=dtype,
        inputs=inputs,
        cotangent=torch.randn(case.tokens, case.out_features, generator=torch.Generator().manual_seed(3)).to(
            device, dtype
        ),
        costs={
            FORWARD: Cost(flops, x.nbytes + weight.nbytes + y_bytes),
            # Two products in the backward; it reads x, the weight and dy, and writes dx and dW.
            TRAINING: Cost(3 * flops, 3 * x.nbytes + 3 * weight.nbytes + 2 * y_bytes),
        },
        terms=(0.0,) * 4,
    )


def _pyvlm(work: Workload) -> Function:
    backend = "native" if work.device.type == "cpu" else "auto"
    return lambda x, weight, bias: linear(x, weight, bias, backend)


def _torch(work: Workload) -> Function:
    return torch.nn.functional.linear


OPERATION = Operation(
    name="linear",
    workloads=large_or_named(workload, CASES),
    case_names=tuple(case.name for case in CASES),
    providers=(Provider("pyvlm", _pyvlm), Provider("torch", _torch)),
    reference=_torch,
    plain=_torch,
)

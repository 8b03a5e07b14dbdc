"""Activations, gated and plain, beside PyTorch's passes, and those under torch.compile.

Shapes: M tokens, I channels.
"""

import torch
from fusion.gating_cases import CASES, GatingCase

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
from pyvlm.ops import gated_activation


def workload(case: GatingCase, device: torch.device, dtype: torch.dtype) -> Workload:
    inputs = tuple(tensor.to(device) for tensor in case.inputs(dtype))
    nbytes = inputs[0].nbytes
    generator = torch.Generator().manual_seed(3)
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"M{case.tokens} I{case.channels} {case.activation}",
        dtype=dtype,
        inputs=inputs,
        cotangent=torch.randn(case.tokens, case.channels, generator=generator).to(device, dtype),
        # Backward reads them again and the gradient, and writes as many.
        costs={
            FORWARD: Cost(0, (len(inputs) + 1) * nbytes),
            TRAINING: Cost(0, (3 * len(inputs) + 2) * nbytes),
        },
        terms=(0.0,) * (len(inputs) + 1),
        payload=case,
    )


def _op(backend: str, work: Workload) -> Function:
    return lambda gate, up=None: gated_activation(gate, up, work.payload.activation, backend=backend)


def _pyvlm(work: Workload) -> Function:
    return _op("native" if work.device.type == "cpu" else "auto", work)


def _eager(work: Workload) -> Function:
    return _op("reference", work)


def _compiled(work: Workload) -> Function:
    torch.compiler.reset()
    return torch.compile(_eager(work))


OPERATION = Operation(
    name="gating",
    workloads=large_or_named(workload, CASES),
    case_names=tuple(case.name for case in CASES),
    providers=(Provider("pyvlm", _pyvlm), Provider("eager", _eager), Provider("compile", _compiled)),
    reference=_eager,
    plain=_eager,
)

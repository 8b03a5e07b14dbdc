"""RMSNorm beside PyTorch's passes, its own `rms_norm`, and both under torch.compile.

Shapes: M tokens, H heads that each have a norm of their own channels, C channels.
"""

import torch
from fusion.norm_cases import CASES, NormCase

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
from pyvlm.ops import rms_norm

EPS = 1e-6


def workload(case: NormCase, device: torch.device, dtype: torch.dtype) -> Workload:
    inputs = tuple(tensor.to(device) for tensor in case.inputs(dtype))
    nbytes = inputs[0].nbytes
    cotangent = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    # Of x's gradient two terms cancel, all of them where there is one channel.
    x, weight = (tensor.float() for tensor in inputs)
    term = cotangent * (weight + case.unit_offset) * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    heads = f" H{case.heads}" if case.heads else ""
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"M{case.tokens}{heads} C{case.channels}",
        dtype=dtype,
        inputs=inputs,
        cotangent=cotangent,
        # Backward reads x again and the gradient, and writes one.
        costs={FORWARD: Cost(0, 2 * nbytes), TRAINING: Cost(0, 5 * nbytes)},
        terms=(0.0, term.abs().max().item() if term.numel() else 0.0, 0.0),
        payload=case,
    )


def _op(backend: str, work: Workload) -> Function:
    return lambda x, weight: rms_norm(x, weight, EPS, unit_offset=work.payload.unit_offset, backend=backend)


def _pyvlm(work: Workload) -> Function:
    return _op("native" if work.device.type == "cpu" else "auto", work)


def _eager(work: Workload) -> Function:
    return _op("reference", work)


def _torch(work: Workload) -> Function:
    """`torch.nn.functional.rms_norm`, whose products are of x's dtype."""
    offset = int(work.payload.unit_offset)
    return lambda x, weight: torch.nn.functional.rms_norm(x, x.shape[-1:], weight + offset, EPS)


def _compiled(work: Workload) -> Function:
    torch.compiler.reset()
    return torch.compile(_eager(work))


OPERATION = Operation(
    name="norm",
    workloads=large_or_named(workload, CASES),
    case_names=tuple(case.name for case in CASES),
    providers=(
        Provider("pyvlm", _pyvlm),
        Provider("eager", _eager),
        Provider("F.rms_norm", _torch),
        Provider("compile", _compiled),
    ),
    reference=_eager,
    plain=_eager,
)

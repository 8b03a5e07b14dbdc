"""The language-model head and its loss beside logits and torch's cross-entropy.

Shapes: T tokens, H features, V words.
"""

import torch
import torch.nn.functional as F
from fusion.loss_cases import CASES, LossCase
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
from pyvlm.ops import linear_cross_entropy


def workload(case: LossCase, device: torch.device, dtype: torch.dtype) -> Workload:
    hidden_TH, weight_VH = (tensor.to(device) for tensor in case.inputs(dtype)[:2])
    # What the loss needs: products of the rows that have a label, one forward and two more backward. The
    # weights are read in both passes and their gradients written.
    flops = 2 * case.labeled * case.hidden * case.words
    rows_bytes = case.labeled * case.hidden * hidden_TH.element_size()
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"T{case.tokens} of which {case.labeled} labelled, H{case.hidden} V{case.words}",
        dtype=dtype,
        inputs=(hidden_TH, weight_VH),
        cotangent=torch.ones((), device=device),
        costs={
            FORWARD: Cost(flops, rows_bytes + weight_VH.nbytes),
            TRAINING: Cost(3 * flops, 2 * rows_bytes + hidden_TH.nbytes + 3 * weight_VH.nbytes),
        },
        terms=(0.0, 0.0, 0.0),
        payload=case.labels().to(device),
    )


def _pyvlm(work: Workload) -> Function:
    # The kernel is named: "auto" might fall back, and the time of a fallback would stand in the kernel's row.
    backend = "native" if work.device.type == "cpu" else "triton"
    return lambda hidden, weight: linear_cross_entropy(hidden, weight, work.payload, backend=backend)


def _reference(work: Workload) -> Function:
    """Logits of the rows that have a label."""
    return lambda hidden, weight: linear_cross_entropy(hidden, weight, work.payload, backend="reference")


def _logits(work: Workload) -> Function:
    """Every row's logits, in float for the loss: what transformers' models compute."""

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, work.payload)

    return run


def _compile(work: Workload) -> Function:
    torch.compiler.reset()
    return torch.compile(_logits(work))


OPERATION = Operation(
    name="loss",
    workloads=large_or_named(workload, CASES),
    case_names=tuple(case.name for case in CASES),
    providers=(
        Provider("pyvlm", _pyvlm),
        Provider("logits", _logits),
        Provider("compile", _compile),
        Provider("reference", _reference),
    ),
    reference=_reference,
    plain=_logits,
)

"""Maps of several encoders on one grid, projected, beside a concatenation and a linear layer.

Shapes: N images, T tokens of the target grid, C channels of all maps, H output features.
"""

from functools import partial

import torch
from fusion.grid_cases import CASES, GridCase
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
from pyvlm.ops import fuse_grids


def workload(case: GridCase, device: torch.device, dtype: torch.dtype) -> Workload:
    inputs = tuple(t.to(device) for t in (*case.features(dtype), *case.projection(dtype)))
    tokens, channels = case.target[0] * case.target[1], sum(case.channels)
    # The formula: the maps on the target grid, then one product.
    flops = 2 * case.images * tokens * channels * case.out_features
    inputs_bytes = sum(t.nbytes for t in inputs)
    y_bytes = case.images * tokens * case.out_features * inputs[0].element_size()
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"N{case.images} T{tokens} C{channels} H{case.out_features}",
        dtype=dtype,
        inputs=inputs,
        cotangent=torch.randn(
            case.images, tokens, case.out_features, generator=torch.Generator().manual_seed(3)
        ).to(device, dtype),
        costs={
            FORWARD: Cost(flops, inputs_bytes + y_bytes),
            TRAINING: Cost(3 * flops, 3 * inputs_bytes + 2 * y_bytes),
        },
        terms=(0.0,) * (1 + len(inputs)),
        payload=case,
    )


def _fused(backend: str, work: Workload) -> Function:
    case = work.payload

    def run(*tensors: Tensor) -> Tensor:
        *features, weight, bias = tensors
        options = (case.mode, case.align_corners, backend)
        return fuse_grids(features, case.grids, case.target, weight, bias, *options)

    return run


def _pyvlm(work: Workload) -> Function:
    return _fused("native" if work.device.type == "cpu" else "auto", work)


_concatenated = partial(_fused, "reference")

OPERATION = Operation(
    name="grids",
    workloads=large_or_named(workload, CASES),
    case_names=tuple(case.name for case in CASES),
    providers=(Provider("pyvlm", _pyvlm), Provider("concatenated", _concatenated)),
    reference=_concatenated,
    plain=_concatenated,
)

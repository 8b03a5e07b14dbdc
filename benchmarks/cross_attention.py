"""Attention to windows of several maps beside Cambrian-1's way: windows rearranged, then torch's attention.

Shapes: N images, Q queries, T tokens of a map, W keys of a query over all maps, A heads, D head features.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from fusion.cross_attention_cases import CASES, LocalCase
from torch import Tensor

from benchmarks.harness.workload import (
    FORWARD,
    TRAINING,
    Cost,
    Function,
    Operation,
    Provider,
    Unavailable,
    Workload,
    large_or_named,
)
from pyvlm.ops import local_cross_attention
from pyvlm.reference.cross_attention import to_windows


def workload(case: LocalCase, device: torch.device, dtype: torch.dtype) -> Workload:
    query, keys, values = case.inputs(dtype)
    inputs = tuple(x.to(device) for x in (query, *keys, *values))
    pairs = case.images * case.queries * case.window
    masks = case.masks()
    visible = pairs if masks is None else sum(int(mask.sum()) for mask in masks)
    token_bytes = 2 * case.heads * case.dim * query.element_size()  # of a key and its value
    # The forward makes two products, the backward five. Both read what is visible; the backward writes all
    # gradients. The query's side: query and out, then query, its gradient, and the cotangent.
    flops = 2 * visible * case.heads * case.dim
    reads, writes = visible * token_bytes, pairs * token_bytes
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"N{case.images} A{case.heads} Q{case.queries} W{case.window} D{case.dim} "
        f"sides {','.join(map(str, case.sides))}",
        dtype=dtype,
        inputs=inputs,
        cotangent=torch.randn(query.transpose(1, 2).shape, generator=torch.Generator().manual_seed(2))
        .to(device, dtype)
        .transpose(1, 2),
        costs={
            FORWARD: Cost(2 * flops, 2 * query.nbytes + reads),
            TRAINING: Cost(7 * flops, 5 * query.nbytes + 2 * reads + writes),
        },
        # Gradients of the query and of keys sum P·(dP − δ), a difference of products of unit normals.
        terms=(0.0, *[1.0] * (1 + len(keys)), *[0.0] * len(values)),
        payload=case,
    )


def _masks(work: Workload) -> list[Tensor] | None:
    masks = work.payload.masks()
    return None if masks is None else [mask.to(work.device) for mask in masks]


def _op(backend: str, work: Workload) -> Function:
    case, masks, maps = work.payload, _masks(work), len(work.payload.sides)

    def run(query: Tensor, *tensors: Tensor) -> Tensor:
        return local_cross_attention(query, tensors[:maps], tensors[maps:], case.grid, masks, backend=backend)

    return run


def _pyvlm(work: Workload) -> Function:
    # The kernel is named: "auto" might fall back, and the time of a fallback would stand in the kernel's row.
    return _op("native" if work.device.type == "cpu" else "triton", work)


def _windows(case: LocalCase, maps: Sequence[Tensor]) -> Tensor:
    """[N, A, T, D] of every map as [N·Q, A, W, D], in the order of axes that Cambrian-1 makes."""
    return torch.cat([to_windows(x.transpose(1, 2), case.grid).flatten(0, 1) for x in maps], 1).transpose(
        1, 2
    )


def _attention(work: Workload) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's attention of every query, a batch of its own, to its windows."""
    case, masks = work.payload, _masks(work)
    seen = blind = None
    if masks is not None:  # rearranged once an image, for all layers
        seen = torch.cat([to_windows(mask, case.grid).flatten(0, 1) for mask in masks], 1)[:, None, None]
        blind = ~seen.any(-1, keepdim=True)
        seen = seen | blind

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = query.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        out = F.scaled_dot_product_attention(q, keys, values, seen)
        if blind is not None:
            out = out.masked_fill(blind, 0.0)
        return out.squeeze(2).unflatten(0, (case.images, case.queries)).transpose(1, 2)

    return attend


def _eager(work: Workload) -> Function:
    case, attend, maps = work.payload, _attention(work), len(work.payload.sides)

    def run(query: Tensor, *tensors: Tensor) -> Tensor:
        return attend(query, _windows(case, tensors[:maps]), _windows(case, tensors[maps:]))

    return run


def _rearranged(work: Workload) -> Function:
    """The same with its windows made beforehand; only forward: gradients of maps would be rearranged."""
    case, attend, maps = work.payload, _attention(work), len(work.payload.sides)
    keys, values = (_windows(case, t) for t in (work.inputs[1 : 1 + maps], work.inputs[1 + maps :]))

    def run(query: Tensor, *tensors: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise Unavailable("only forward: its inputs are windows, and have the gradients")
        return attend(query, keys, values)

    return run


def _compile(work: Workload) -> Function:
    torch.compiler.reset()
    return torch.compile(_eager(work))


_reference: Callable[[Workload], Function] = partial(_op, "reference")

OPERATION = Operation(
    name="cross_attention",
    workloads=large_or_named(workload, CASES),
    case_names=tuple(case.name for case in CASES),
    providers=(
        Provider("pyvlm", _pyvlm),
        Provider("eager", _eager),
        Provider("compile", _compile),
        Provider("rearranged", _rearranged),
        Provider("reference", _reference),
    ),
    reference=_reference,
    plain=_eager,
)

"""Qwen-VL's resampler, the whole module, beside its original form on nn.MultiheadAttention.

Shapes: N images, T tokens of a map, C channels, Q queries, E embedding.
"""

import torch
import torch.nn.functional as F
from fusion.resample_cases import CASES, ResampleCase
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


def workload(case: ResampleCase, device: torch.device, dtype: torch.dtype) -> Workload:
    parameters = dict(case.module().to(device, dtype).named_parameters())
    features = case.features().to(device, dtype)
    images, tokens, queries, width = case.images, case.side**2, case.grid**2, case.embed_dim
    # The map's projection, keys and values, the queries once, scores and their sums, the output.
    macs = images * tokens * width * (case.channels + 2 * width) + queries * width**2
    macs += images * queries * width * (2 * tokens + width)
    weights_bytes = sum(p.nbytes for p in parameters.values())
    y_bytes = images * queries * width * features.element_size()
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"N{images} T{tokens} C{case.channels} Q{queries} E{width}",
        dtype=dtype,
        inputs=(features, *(p.detach() for p in parameters.values())),
        cotangent=torch.randn(images, queries, width, generator=torch.Generator().manual_seed(3)).to(
            device, dtype
        ),
        costs={
            FORWARD: Cost(2 * macs, features.nbytes + weights_bytes + y_bytes),
            TRAINING: Cost(6 * macs, 3 * features.nbytes + 3 * weights_bytes + 2 * y_bytes),
        },
        terms=(0.0,) * (2 + len(parameters)),
        payload=case,
    )


def _module(backend: str, work: Workload) -> Function:
    module = work.payload.module().to(work.device)
    module.backend = backend
    names = [name for name, _ in module.named_parameters()]

    def run(features: Tensor, *parameters: Tensor) -> Tensor:
        module.pos_embed = module.pos_embed.to(features.dtype)
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (features,))

    return run


def _pyvlm(work: Workload) -> Function:
    return _module("native" if work.device.type == "cpu" else "auto", work)


def _reference(work: Workload) -> Function:
    return _module("reference", work)


class _Original(torch.nn.Module):
    """The original's forward: it repeats the queries and projects them for each image."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.module = work.payload.module().to(work.device)
        self.case = work.payload

    def forward(self, features: Tensor) -> Tensor:
        module, case = self.module, self.case
        table = module.pos_embed.float().view(1, case.grid, case.grid, -1).permute(0, 3, 1, 2)
        keys = F.interpolate(table, size=(case.side, case.side), mode="bicubic", align_corners=False)
        keys = keys.permute(0, 2, 3, 1).flatten(0, 2).to(features.dtype)
        projected = features
        if isinstance(module.kv_proj, torch.nn.Linear):
            projected = F.linear(features, module.kv_proj.weight)
        x = module.ln_kv(projected).permute(1, 0, 2)
        query = module.ln_q(module.query).unsqueeze(1).repeat(1, x.shape[1], 1)
        query = query + module.pos_embed.to(features.dtype).unsqueeze(1)
        return module.attn(query, x + keys.unsqueeze(1), x)[0].permute(1, 0, 2)


def _eager(work: Workload) -> Function:
    original = _Original(work)
    names = [name for name, _ in original.named_parameters()]

    def run(features: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(original, given, (features,))

    return run


OPERATION = Operation(
    name="resample",
    workloads=large_or_named(workload, CASES),
    case_names=tuple(case.name for case in CASES),
    providers=(Provider("pyvlm", _pyvlm), Provider("eager", _eager)),
    reference=_reference,
    plain=_eager,
)

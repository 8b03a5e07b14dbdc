"""Image tokens into the text beside transformers' boolean indexing and torch's indexed copies."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from fusion.placement_cases import CASES, PINPOINTS, TILE, PlacementCase
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


@dataclass(frozen=True)
class Layout:
    case: PlacementCase
    image_mask: Tensor
    index: Tensor | None


def workload(case: PlacementCase, device: torch.device, dtype: torch.dtype) -> Workload:
    index = case.index()
    layout = Layout(case, case.image_mask().to(device), None if index is None else index.to(device))
    inputs = tuple(tensor.to(device) for tensor in case.inputs(dtype))
    with torch.no_grad():
        out = case.run(inputs, layout.image_mask, layout.index, "reference")
    rows = inputs[0 if case.op == "pack" else 1].nbytes
    # Every byte of the result is read somewhere and written; the backward reads its gradient and writes
    # those of the inputs. Where rows are added to, text passes unchanged, and so does its gradient.
    forward, backward = {
        "place": (2 * out.nbytes, 2 * out.nbytes + rows),
        "pack": (2 * out.nbytes, out.nbytes + rows),
        "add": (2 * out.nbytes + rows, 2 * rows),
    }[case.op]
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"{case.op} {int(layout.image_mask.sum())} image tokens into {list(out.shape)}",
        dtype=dtype,
        inputs=inputs,
        cotangent=torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype),
        costs={FORWARD: Cost(0, forward), TRAINING: Cost(0, forward + backward)},
        terms=(0.0,) * (1 + len(inputs)),
        payload=layout,
    )


def _placed(backend: str, work: Workload) -> Function:
    layout = work.payload
    return lambda *inputs: layout.case.run(inputs, layout.image_mask, layout.index, backend)


def _kernels(work: Workload) -> str:
    # The kernel is named: "auto" might fall back, and the time of a fallback would stand in the kernel's row.
    return "native" if work.device.type == "cpu" else "triton"


def _pyvlm(work: Workload) -> Function:
    return _placed(_kernels(work), work)


def _with_index_map(work: Workload) -> Function:
    """The index map is made anew each time, as transformers decides about every image each time."""
    layout, backend = work.payload, _kernels(work)
    if layout.index is None:
        raise Unavailable("one map an image needs no index map")

    def run(*inputs: Tensor) -> Tensor:
        index = layout.case.index().to(work.device, non_blocking=True)
        return layout.case.run(inputs, layout.image_mask, index, backend)

    return run


def _transformers(work: Workload) -> Function:
    """masked_scatter as in all its LLaVAs, LLaVA-NeXT's packing, Qwen3-VL's addition in decoder layers."""
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    case, image_mask = work.payload.case, work.payload.image_mask
    vision = SimpleNamespace(image_size=TILE, patch_size=TILE // case.side)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS))
    sizes = [case.image_size] * case.samples

    def pack(features: Tensor, newline: Tensor) -> Tensor:
        maps = features.view(case.samples, case.num_maps, case.side**2, -1).unbind()
        packed, _ = LlavaNextModel.pack_image_features(model, maps, sizes, "default", newline)
        return torch.cat(packed)

    def place(text: Tensor, features: Tensor, *newline: Tensor) -> Tensor:
        rows = pack(features, *newline) if newline else features
        return text.masked_scatter(image_mask.unsqueeze(-1).expand_as(text), rows)

    def add(hidden: Tensor, updates: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[image_mask, :] = hidden[image_mask, :] + updates
        return hidden

    return {"pack": pack, "place": place, "add": add}[case.op]


def _compile(work: Workload) -> Function:
    torch.compiler.reset()
    return torch.compile(_transformers(work))


_reference: Callable[[Workload], Function] = partial(_placed, "reference")

OPERATION = Operation(
    name="placement",
    workloads=large_or_named(workload, CASES),
    case_names=tuple(case.name for case in CASES),
    providers=(
        Provider("pyvlm", _pyvlm),
        Provider("index map", _with_index_map),
        Provider("transformers", _transformers),
        Provider("compile", _compile),
        Provider("index_copy", _reference),
    ),
    reference=_reference,
    plain=_reference,
)

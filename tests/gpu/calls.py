"""One small call of every op that has kernels of its own on a GPU, with gradients, on any device.

On a GPU it is of several of its tiles, and of attention's kernels for many queries.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from attention.cases import PADDED, AttentionCase
from fusion.cross_attention_cases import LocalCase
from fusion.fusion_cases import MergeCase
from fusion.grid_cases import GridCase
from fusion.loss_cases import LossCase
from fusion.placement_cases import PlacementCase
from fusion.resample_cases import ResampleCase
from torch import Tensor

from pyvlm.ops import (
    add_at_image_tokens,
    expert_choice,
    expert_mlp,
    fuse_grids,
    gated_activation,
    linear_cross_entropy,
    local_cross_attention,
    merge_levels,
    merge_routings,
    patches_to_token,
    rms_norm,
    routing_from_choices,
    span_attention,
    token_choice,
)
from pyvlm.ops._backends import resolve


@dataclass(frozen=True)
class OpCall:
    """A function of the leaves, which are the differentiable arguments of the op."""

    op: str
    run: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    name: str = ""
    static: dict[str, Tensor] = field(default_factory=dict)  # its other tensors, by what they are

    def results(self, leaves: tuple[Tensor, ...] | None = None) -> list[Tensor]:
        """The output, and the gradients of all leaves."""
        given = [x.detach().requires_grad_() for x in (self.leaves if leaves is None else leaves)]
        out = self.run(*given)
        grads = torch.autograd.grad(out.float().square().sum(), given)
        return [out.detach(), *grads]


def runs_on_kernels(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the default implementation is a kernel of pyvlm's: what is to be tested."""
    return resolve(op, "auto", device, dtype) != "reference"


def sized(device: torch.device, small: Any, large: Any) -> Any:
    """The large one on a GPU, whose tiles are of 64 to 256 rows."""
    return large if device.type == "cuda" else small


LONGER = 7  # times attention's rows of 31 tokens


def attention_case(rule: str = "mmca", rows: tuple[str, ...] = PADDED) -> AttentionCase:
    return AttentionCase("call", "", rule, rows, heads=4, kv_heads=2, head_dim=32).times(LONGER)


def attention_call(device: torch.device, dtype: torch.dtype, rule: str = "mmca") -> OpCall:
    case = attention_case(rule)
    spans = case.spans(device)
    q, k, v, _ = case.inputs(dtype, device)
    return OpCall(
        "span_attention",
        lambda q, k, v: span_attention(q, k, v, spans),
        (q, k, v),
        f"span_attention {rule}",
        {"bounds": spans.bounds, "key_class": spans.key_class},
    )


def routed_call(device: torch.device, dtype: torch.dtype, router: str) -> OpCall:
    tokens = sized(device, 70, 700)
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    experts, (hidden, intermediate) = 4, sized(device, (64, 48), (320, 272))
    images = torch.tensor([0, tokens // 2, tokens], device=device)
    slots = 2 * experts * (tokens // 6)
    of_text, of_image = torch.arange(tokens, device=device).split([tokens // 2, tokens - tokens // 2])

    def run(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        if router == "token_choice":
            routing = token_choice(logits, 2)
        elif router == "expert_choice":
            routing = expert_choice(logits, tokens // 6, images, num_slots=slots)
        elif router == "merge_routings":
            text, image = token_choice(logits[of_text], 2), expert_choice(logits[of_image], tokens // 6)
            routing = merge_routings([(text, of_text), (image, of_image)], tokens)
        else:
            weight, index = logits.softmax(-1).topk(2)
            routing = routing_from_choices(index, weight, experts)
        return expert_mlp(x, routing, gate_up, down)

    leaves = (
        normal(tokens, hidden),
        normal(tokens, experts).float(),
        normal(experts, 2 * intermediate, hidden, scale=hidden**-0.5),
        normal(experts, hidden, intermediate, scale=intermediate**-0.5),
    )
    return OpCall("expert_mlp", run, leaves, f"{router} and expert_mlp")


def loss_call(device: torch.device, dtype: torch.dtype) -> OpCall:
    case = LossCase("call", "", *sized(device, (70, 45, 64, 330), (1000, 600, 192, 9000)))
    labels = case.labels().to(device)
    leaves = tuple(x.to(device) for x in case.inputs(dtype))
    return OpCall(
        "linear_cross_entropy",
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=5.0),
        leaves,
        "linear_cross_entropy",
        {"labels": labels},
    )


def merge_call(device: torch.device, dtype: torch.dtype, per_level: str = "") -> OpCall:
    tokens, channels, features = sized(device, (37, 64, 40), (300, 320, 200))
    case = MergeCase("call", "", 3, 2, tokens, channels, features, per_level, views=True)
    levels, parameters = case.inputs(dtype)
    names, count = tuple(parameters), len(levels)

    def run(*leaves: Tensor) -> Tensor:
        return merge_levels(leaves[:count], **dict(zip(names, leaves[count:], strict=True)))

    leaves = tuple(x.to(device) for x in (*levels, *parameters.values()))
    return OpCall("merge_levels", run, leaves, f"merge_levels {per_level}".strip())


def placement_call(device: torch.device, dtype: torch.dtype, op: str) -> OpCall:
    size = None if op == "add" else (500, 700)
    width = sized(device, 40, 2100)
    case = PlacementCase("call", "", op, 2, 0 if op == "pack" else 5, width, 6, size)
    mask = case.image_mask().to(device)
    index = case.index()
    index = None if index is None else index.to(device)
    name = {"place": "place_image_tokens", "pack": "pack_image_tokens", "add": "add_at_image_tokens"}[op]
    leaves = tuple(x.to(device) for x in case.inputs(dtype))
    counts = mask.sum(1).tolist()

    def run(*leaves: Tensor) -> Tensor:
        if op == "add":  # and how many features each sample has is checked
            return add_at_image_tokens(*leaves, mask, features_per_sample=counts)
        return case.run(leaves, mask, index, "auto")

    return OpCall(name, run, leaves, name, {"image_mask": mask})


def local_call(device: torch.device, dtype: torch.dtype) -> OpCall:
    grid = sized(device, (4, 3), (24, 20))
    case = LocalCase("call", "", 2, 3, 32, grid, (1, 3, 2), masked=True)
    query, keys, values = case.inputs(dtype)
    masks = [mask.to(device) for mask in case.masks()]
    count = len(keys)

    def run(query: Tensor, *maps: Tensor) -> Tensor:
        return local_cross_attention(query, maps[:count], maps[count:], case.grid, masks)

    leaves = tuple(x.to(device) for x in (query, *keys, *values))
    return OpCall("local_cross_attention", run, leaves, "local_cross_attention")


def grids_call(device: torch.device, dtype: torch.dtype, mode: str) -> OpCall:
    """One map is resized and then projected, one the other way round, and one passes as it is."""
    case = GridCase("call", "", 2, ((5, 7), (3, 2), (4, 4)), (20, 60, 30), (4, 4), 40, mode)
    leaves = tuple(x.to(device) for x in (*case.features(dtype), *case.projection(dtype)))

    def run(*leaves: Tensor) -> Tensor:
        *features, weight, bias = leaves
        return fuse_grids(features, case.grids, case.target, weight, bias, mode)

    return OpCall("fuse_grids", run, leaves, f"fuse_grids {mode}")


def patches_call(device: torch.device, dtype: torch.dtype) -> OpCall:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 12, 20), (2, 8, 30), (40, 60), (40, 60), (40,), (40,))
    leaves = tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)

    def run(*leaves: Tensor) -> Tensor:
        return patches_to_token(leaves[:2], leaves[2:4], (3, 2), leaves[4:])

    return OpCall("patches_to_token", run, leaves, "patches_to_token")


def resample_call(device: torch.device, dtype: torch.dtype) -> OpCall:
    """A composition, whose kernels are those of attention."""
    case = ResampleCase("call", "", 2, 7, 3, 64, 4, 40)
    module = case.module().to(device, dtype)
    names = [name for name, _ in module.named_parameters()]

    def run(features: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (features,))

    leaves = (case.features().to(device, dtype), *(p.detach() for p in module.parameters()))
    return OpCall("span_attention", run, leaves, "resample")


def gating_call(device: torch.device, dtype: torch.dtype, gated: bool = True) -> OpCall:
    generator = torch.Generator().manual_seed(3)
    rows, width = sized(device, (90, 130), (900, 1300))
    gate, up = torch.randn(2, rows, 2 * width, generator=generator).to(device, dtype).chunk(2, dim=-1)
    return OpCall(
        "gated_activation",
        lambda gate, *up: gated_activation(gate, up[0] if up else None, "silu" if gated else "quick_gelu"),
        (gate, up) if gated else (gate,),
    )


def norm_call(device: torch.device, dtype: torch.dtype, unit_offset: bool = False) -> OpCall:
    generator = torch.Generator().manual_seed(3)
    rows = sized(device, 40, 4000)  # more than programs have one each
    x = torch.randn(2, rows, 3, 96, generator=generator).to(device, dtype).transpose(1, 2)
    weight = torch.randn(96, generator=generator).to(device, dtype)
    return OpCall("rms_norm", lambda x, weight: rms_norm(x, weight, 1e-6, unit_offset), (x, weight))


CALLS: dict[str, Callable[[torch.device, torch.dtype], OpCall]] = {
    "span_attention mmca": attention_call,
    "span_attention joint": lambda device, dtype: attention_call(device, dtype, "bidirectional_image"),
    "token_choice and expert_mlp": lambda device, dtype: routed_call(device, dtype, "token_choice"),
    "expert_choice and expert_mlp": lambda device, dtype: routed_call(device, dtype, "expert_choice"),
    "routing_from_choices and expert_mlp": lambda device, dtype: routed_call(device, dtype, "choices"),
    "merge_routings and expert_mlp": lambda device, dtype: routed_call(device, dtype, "merge_routings"),
    "linear_cross_entropy": loss_call,
    "merge_levels": merge_call,
    "merge_levels of several projections": lambda device, dtype: merge_call(device, dtype, "wbgn"),
    "place_image_tokens": lambda device, dtype: placement_call(device, dtype, "place"),
    "pack_image_tokens": lambda device, dtype: placement_call(device, dtype, "pack"),
    "add_at_image_tokens": lambda device, dtype: placement_call(device, dtype, "add"),
    "local_cross_attention": local_call,
    "fuse_grids bilinear": lambda device, dtype: grids_call(device, dtype, "bilinear"),
    "fuse_grids area": lambda device, dtype: grids_call(device, dtype, "area"),
    "patches_to_token": patches_call,
    "resample": resample_call,
    "gated_activation": gating_call,
    "gated_activation without a gate": lambda device, dtype: gating_call(device, dtype, gated=False),
    "rms_norm": norm_call,
    "rms_norm of Gemma": lambda device, dtype: norm_call(device, dtype, unit_offset=True),
}

"""Model-FLOP utilisation: the operations of a step, and how many a second the machine does at most.

FLOPs are counted op by op as they go by, forward and backward, 2 a multiply-add, of products alone. Only
useful work counts: pairs of query and key that the mask allows, rows that have a label, tokens that an expert
took, gradients that are needed. What gradient checkpointing computes again counts too.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCounter(TorchDispatchMode):
    """A context manager that adds up the FLOPs of what runs inside, in `total`.

    Unlike `torch.utils.flop_counter.FlopCounterMode`, whose formulas it takes for torch's own ops, it never
    takes an op apart, so that what is counted computes the same, bit for bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        formula = flop_registry.get(packet)
        if func.namespace == "pyvlm":
            formula = _FORMULAS.get(packet.__name__)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


@cache
def measured_limit(device: torch.device, precision: str) -> float:
    """FLOPs a second of `torch.mm` of square matrices in a recipe's precision: the median of three runs."""
    size = 4096 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Random: zeros are multiplied faster. Of a generator of their own, so that no other draw changes.
    generator = torch.Generator(device).manual_seed(0)
    a, b, out = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(3))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def visible_pairs(
    bounds: Tensor, key_class: Tensor, range_classes: list[int], separate: bool, *_: Any
) -> int:
    """Pairs of query and key over a batch, from the fields of `AttentionSpans`."""

    def count(lo_BQ: Tensor, hi_BQ: Tensor, classes: int) -> int:
        sees_BK = (classes >> key_class.long()) & 1
        before_BK1 = torch.nn.functional.pad(sees_BK.cumsum(1), (1, 0))
        pairs_BQ = before_BK1.gather(1, hi_BQ.long()) - before_BK1.gather(1, lo_BQ.long())
        return int(pairs_BQ.clamp(min=0).sum())

    lo_BQR, hi_BQR = bounds.unbind(-1)
    pairs = sum(count(lo_BQR[:, :, r], hi_BQR[:, :, r], classes) for r, classes in enumerate(range_classes))
    if not separate and len(range_classes) == 2:  # a key in both ranges counts once
        pairs -= count(lo_BQR.amax(-1), hi_BQR.amin(-1), range_classes[0] & range_classes[1])
    return pairs


def _attention(q: Tensor, k: Tensor, v: Tensor, *spans: Any, out_val: Any = None) -> int:
    return 4 * q.shape[1] * q.shape[3] * visible_pairs(*spans)


def _attention_backward(grad_out: Any, grad_lse: Any, *inputs: Any, out_val: Any = None) -> int:
    # Five products for the two of the forward pass, as torch counts its own attention.
    return _attention(*inputs) * 5 // 2


def _linear(x: Tensor, weight: Tensor, *_: Any, out_val: Any = None) -> int:
    return 2 * x.numel() * len(weight)


def _linear_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, needs: list[bool], out_val: Any = None
) -> int:
    return _linear(x, weight) * sum(needs[:2])


def _loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, *_: Any, out_val: Any = None
) -> int:
    return 2 * int((labels != ignore_index).sum()) * weight.numel()


def _loss_backward(grad_loss: Tensor, *inputs: Any, out_val: Any = None) -> int:
    return _loss(*inputs) * sum(inputs[-1][:2])


def _experts(x: Tensor, token: Tensor, *inputs: Any, out_val: Any = None) -> int:
    gate_up, down = inputs[4], inputs[5]
    return 2 * len(token) * (gate_up[0].numel() + down[0].numel())


def _experts_backward(
    grad_y: Tensor, x: Tensor, hidden: Tensor, token: Tensor, *inputs: Any, out_val: Any = None
) -> int:
    gate_up, down = inputs[4], inputs[5]
    needs_x, _, needs_gate_up, needs_down, *_ = inputs[-1]
    products = gate_up[0].numel() * (needs_x + needs_gate_up) + down[0].numel() * (1 + needs_down)
    return 2 * len(token) * products


def _fuse(
    features: list[Tensor], grids: Any, target: Any, weight: Tensor | None, *_: Any, out_val: Any
) -> int:
    return 0 if weight is None else 2 * out_val.numel() * weight.shape[1]


def _fuse_backward(
    grad_y: Tensor, features: Any, grids: Any, target: Any, weight: Tensor | None, *rest: Any, out_val: Any
) -> int:
    *needs_features, needs_weight, _ = rest[-1]
    products = any(needs_features) + needs_weight
    return 0 if weight is None else 2 * grad_y.numel() * weight.shape[1] * products


def _patches(features: list[Tensor], weights: list[Tensor], *_: Any, out_val: Any = None) -> int:
    return sum(2 * x.numel() * len(weight) for x, weight in zip(features, weights, strict=True))


def _patches_backward(
    grad_y: Tensor, features: list[Tensor], weights: list[Tensor], patches: Any, needs: Any, out_val: Any
) -> int:
    return sum(
        _patches([x], [weight]) * (needs[i] + needs[len(features) + i])
        for i, (x, weight) in enumerate(zip(features, weights, strict=True))
    )


def _local_attention(query: Tensor, keys: list[Tensor], *_: Any, out_val: Any = None) -> int:
    return sum(4 * key.numel() for key in keys)  # each key is in the window of one query


def _local_attention_backward(
    grad_out: Tensor, query: Tensor, keys: list[Tensor], *_: Any, out_val: Any
) -> int:
    return _local_attention(query, keys) * 5 // 2


# One a `pyvlm` op that multiplies; those that only move or weigh rows count as nothing.
_FORMULAS: dict[str, Callable[..., int]] = {
    "span_attention": _attention,
    "span_attention_backward": _attention_backward,
    "linear": _linear,
    "linear_backward": _linear_backward,
    "linear_cross_entropy": _loss,
    "linear_cross_entropy_backward": _loss_backward,
    "expert_mlp": _experts,
    "expert_mlp_backward": _experts_backward,
    "fuse_grids": _fuse,
    "fuse_grids_backward": _fuse_backward,
    "patches_to_token": _patches,
    "patches_to_token_backward": _patches_backward,
    "local_cross_attention": _local_attention,
    "local_cross_attention_backward": _local_attention_backward,
}

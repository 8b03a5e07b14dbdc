"""Counts what a module's matrix products and convolutions cost, on the meta device: no memory, no numbers.

So any encoder of transformers is counted exactly, by what it does and not by a formula of what it should do.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """FLOPs of forward and backward, and the elements that each reads and writes.

    A multiply-add is two FLOPs. Only matrix products and convolutions count. Their inputs and outputs are
    read and written once each; what is elementwise is taken as fused into them. `saved`: the elements that
    forward keeps for backward, parameters left out.
    """

    forward: int = 0
    backward: int = 0
    forward_elements: int = 0
    backward_elements: int = 0
    saved: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(self.numbers, other.numbers, strict=True)))

    def __sub__(self, other: "Cost") -> "Cost":
        return self + other * -1

    def __mul__(self, times: int) -> "Cost":
        return Cost(*(times * a for a in self.numbers))

    def __floordiv__(self, parts: int) -> "Cost":
        return Cost(*(a // parts for a in self.numbers))

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        return self.forward, self.backward, self.forward_elements, self.backward_elements, self.saved


def count_products(run: Callable[[], Tensor], regions: Mapping[str, nn.Module], rest: str) -> dict[str, Cost]:
    """The cost of `run` and, where its result has a gradient, of its backward pass.

    Args:
        run: gives one tensor; its modules and inputs lie on the meta device.
        regions: modules, none inside another, to tell apart.
        rest: the name of what is outside them.

    Returns:
        One entry a region, in their order, and `rest`.
    """
    counter, saved = _ProductCounter(rest), _Saved(regions)
    handles = []
    for name, module in regions.items():
        if any(True for _ in module.parameters()):  # without any there is nothing to count
            handles += _watch(counter, name, rest, module)
    try:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.keep(x, counter.region), lambda x: x)
        with torch.enable_grad(), counter, hooks, _FusedAttention(counter):
            result = run()
            forward, counter.counts = counter.counts, Counter()
            if result.requires_grad:
                counter.region = rest
                result.backward(torch.empty_like(result))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Cost(
            forward[name, "flops"],
            counter.counts[name, "flops"],
            forward[name, "elements"],
            counter.counts[name, "elements"],
            saved.elements[name],
        )
        for name in dict.fromkeys([*regions, rest])
    }


def _watch(counter: "_ProductCounter", name: str, rest: str, module: nn.Module) -> list[Any]:
    def enter(*_: Any) -> None:
        counter.region = name

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        counter.region = rest
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(enter)  # fires when backward gets here

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


class _ProductCounter(TorchDispatchMode):
    """Counts under the name that `region` has at the time."""

    def __init__(self, region: str) -> None:
        super().__init__()
        self.region = region
        self.counts: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        packet = func._overloadpacket
        if packet is _aten._local_scalar_dense and args[0].dtype == torch.bool:
            return True  # LayoutLMv3 asks whether its mask is all ones, which it is: pictures have no padding
        out = func(*args, **kwargs)
        if packet is _aten.convolution_backward:
            flops = _convolution_backward(*args)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        else:
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.add(flops, sum(x.numel() for x in tensors))
        return out

    def add(self, flops: int, elements: int) -> None:
        self.counts[self.region, "flops"] += flops
        self.counts[self.region, "elements"] += elements


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    """Each of the two gradients takes the products of forward; torch's own formula forgets the groups."""
    transposed, output_mask = rest[4], rest[7]
    positions = x if transposed else grad
    forward = 2 * positions.shape[0] * positions.shape[2:].numel() * weight.numel()
    return forward * sum(output_mask[:2])


class _Saved:
    """Elements kept for backward by region: each storage once, those of parameters not at all."""

    def __init__(self, regions: Mapping[str, nn.Module]) -> None:
        parameters = (p for module in regions.values() for p in module.parameters())
        self.known = {_storage(p) for p in parameters}
        self.elements: Counter[str] = Counter()

    def keep(self, tensor: Tensor, region: str) -> Tensor:
        if tensor.is_floating_point() and _storage(tensor) not in self.known:
            self.known.add(_storage(tensor))
            self.elements[region] += tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _FusedAttention(TorchFunctionMode):
    """Attention as every device has it, without its scores in memory; the meta device would keep them."""

    def __init__(self, counter: _ProductCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value")
        query, key, value = (*args, *((kwargs or {})[name] for name in names[len(args) :]))[:3]
        return _Attention.apply(self.counter, query, key, value)


class _Attention(torch.autograd.Function):
    """Two products forward and four backward: none is made twice."""

    @staticmethod
    def forward(ctx: Any, counter: _ProductCounter, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        ctx.counter = counter
        pairs = query.shape[:-1].numel() * key.shape[-2]
        ctx.flops = 2 * pairs * (query.shape[-1] + value.shape[-1])
        ctx.elements = sum(x.numel() for x in (query, key, value, out))
        counter.add(ctx.flops, ctx.elements)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _ = ctx.saved_tensors
        ctx.counter.add(2 * ctx.flops, 2 * ctx.elements)
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

"""Logits that are computed only where somebody reads them.

`lazy_logits` gives a tensor of the right shape, dtype, device and autograd history, behind which lie the
hidden states and the head's weight. Reading it in any way computes the product, once. Until then a loss may
take the states and the weight instead: see `LazyLogits.source`.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyvlm._autocast import autocasts

aten = torch.ops.aten


@dataclass(frozen=True)
class Source:
    """What lies behind logits: softcap·tanh(scale·z / softcap) with z = hidden·weightᵀ + bias.

    hidden [.., H], weight [V, H] and bias [V] are the head's own inputs, with their history; without a
    `softcap` the logits are scale·z.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    def times(self, factor: float) -> "Source | None":
        """The source of the logits times a factor; None where the form cannot express it."""
        if self.softcap is None:
            return Source(self.hidden, self.weight, self.bias, self.scale * factor)
        if not factor > 0.0:
            return None
        scale = self.scale * factor  # so that scale / softcap, the factor inside of tanh, stays
        if math.isclose(scale, 1.0, rel_tol=1e-12):
            scale = 1.0  # c · (1 / c), rounded
        return Source(self.hidden, self.weight, self.bias, scale, self.softcap * factor)

    def tanh(self) -> "Source | None":
        """The source of tanh(logits); None where there is a tanh already."""
        if self.softcap is not None:
            return None
        return Source(self.hidden, self.weight, self.bias, self.scale, 1.0)


@dataclass(eq=False)
class _Values:
    """The values behind a lazy tensor and its aliases."""

    compute: Callable[[], Tensor] | None
    source: Source | None
    computed: Tensor | None = None
    # Those derived from these and not computed yet; weak, for they hold these: a cycle would keep the states.
    pending: "weakref.WeakSet[_Values]" = field(default_factory=weakref.WeakSet)

    def get(self) -> Tensor:
        if self.computed is None:
            assert self.compute is not None
            self.computed, self.compute = self.compute(), None
        return self.computed

    def expose(self) -> Tensor:
        """The values, for aliases and writes.

        Those derived are computed while these still hold; from then on all is computed at once, for there is
        no source any more.
        """
        values = self.get()
        for derived in self.pending:
            derived.get()
        self.pending.clear()
        self.source = None
        return values


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _scaled(source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source | None:
    return source.times(float(args[0])) if len(args) == 1 and _is_number(args[0]) and not kwargs else None


def _divided(source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source | None:
    if len(args) != 1 or not _is_number(args[0]) or args[0] == 0 or kwargs:
        return None
    return source.times(1.0 / args[0])


def _squashed(source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source | None:
    return source.tanh()


def _copied(source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source | None:
    dtype = kwargs.get("dtype")
    same_place = kwargs.get("device") in (None, source.hidden.device) and not kwargs.get("pin_memory")
    same_layout = kwargs.get("memory_format") in (None, torch.preserve_format, torch.contiguous_format)
    return source if same_place and same_layout and (dtype is None or dtype.is_floating_point) else None


# The ops that leave logits lazy, and what they make of the source.
_LAZY: dict[Any, Callable[[Source, tuple[Any, ...], dict[str, Any]], Source | None]] = {
    aten.mul.Tensor: _scaled,
    aten.div.Tensor: _divided,
    aten.tanh.default: _squashed,
    aten._to_copy.default: _copied,
    aten.clone.default: _copied,
}

# What torch does in C++ with a tensor's own memory, or writes down of it, without asking the dispatcher.
_NEEDS_MEMORY = frozenset(
    (
        *(
            "__array__",
            "__cuda_array_interface__",
            "__deepcopy__",
            "__dlpack__",
            "__format__",
            "__reduce_ex__",
        ),
        *("__repr__", "data_ptr", "is_shared", "numpy", "pin_memory", "share_memory_", "storage", "tolist"),
        *("typed_storage", "untyped_storage"),
    )
)


class LazyLogits(Tensor):
    """Logits [.., V] that are computed when they are read: a tensor as any other to all who use it.

    Scaling by a number, tanh, a change of the floating-point dtype, `clone` and `detach` do not read them.

    Reading raises a RuntimeError where the hidden states or the weight were changed in place since. So does
    `retain_grad`. Hooks are taken, for FSDP sets some on every output; they see the gradients of those who
    read the logits.
    """

    behind: _Values

    @staticmethod
    def __new__(cls, like: Tensor, shape: torch.Size, dtype: torch.dtype, values: _Values) -> "LazyLogits":
        lazy: LazyLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=like.device)
        lazy.behind = values
        return lazy

    @property
    def source(self) -> Source | None:
        """What the logits are made of; None where they were written to, or read in a way that allows it."""
        source = self.behind.source
        if source is None or self.requires_grad:
            return source
        bias = None if source.bias is None else source.bias.detach()
        return Source(source.hidden.detach(), source.weight.detach(), bias, source.scale, source.softcap)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name == "retain_grad":
            raise RuntimeError(
                "retain_grad: the loss is computed without these logits and gives them no gradient; "
                "to see it, run the model without pyvlm's loss"
            )
        if name in _NEEDS_MEMORY:
            args = tree_map_only(LazyLogits, lambda lazy: lazy.view(lazy.shape), args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyLogits):
            values = first.behind
            if func in (aten.detach.default, aten.alias.default):
                return LazyLogits(first, first.shape, first.dtype, values)
            lazily = _LAZY.get(func)
            if lazily is not None and values.source is not None:
                source = lazily(values.source, args[1:], kwargs)
                if source is not None:
                    return _derived(first, source, func, args[1:], kwargs)
        shares = any(part.alias_info is not None for part in func._schema.arguments)
        read = _Values.expose if shares else _Values.get
        with torch.no_grad():
            plain = tree_map_only(LazyLogits, lambda lazy: read(lazy.behind), (args, kwargs))
            out = func(*plain[0], **plain[1])
        for part, given in zip(func._schema.arguments, args, strict=False):
            if part.alias_info is not None and part.alias_info.is_write and isinstance(given, LazyLogits):
                return given  # an in-place op returns what it wrote to
        return out


def _derived(
    lazy: LazyLogits, source: Source, func: Callable[..., Tensor], args: Any, kwargs: Any
) -> LazyLogits:
    parent = lazy.behind

    def compute() -> Tensor:
        with torch.no_grad():
            return func(parent.get(), *args, **kwargs)

    values = _Values(compute, source)
    parent.pending.add(values)
    return LazyLogits(lazy, lazy.shape, kwargs.get("dtype") or lazy.dtype, values)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _Head(torch.autograd.Function):
    """The head's product, with the values left out."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, values: _Values
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        return LazyLogits(hidden, torch.Size((*hidden.shape[:-1], len(weight))), dtype, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 5
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            grads[0] = (grad @ weight.to(grad.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grads[1] = (rows.mT @ hidden.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            grads[2] = rows.sum(0).to(bias.dtype)
        return tuple(grads)


def lazy_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> LazyLogits:
    """`torch.nn.functional.linear(hidden, weight, bias)`, computed when it is read.

    Args:
        hidden: [.., H], of two dimensions or more.
        weight, bias: [V, H] and [V].

    Returns:
        [.., V], in the dtype of autocast where that is on.
    """
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocasts(hidden.device) else hidden.dtype
    versions = [_version(x) for x in inputs]

    def compute() -> Tensor:
        if [_version(x) for x in inputs] != versions or weight.untyped_storage().size() == 0:
            raise RuntimeError(
                "the logits were not read before the hidden states or the head's weight changed; read "
                "outputs.logits before optimizer.step()"
            )
        with torch.no_grad():
            return F.linear(*(x.detach().to(dtype) for x in inputs))

    values = _Values(compute, Source(hidden, weight, bias))
    return _Head.apply(hidden, weight, bias, dtype, values)

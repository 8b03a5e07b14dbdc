"""Linear layers of transformers' models by `pyvlm.ops.linear`, where that is measured to be faster."""

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyvlm.integrations.transformers.changes import Change
from pyvlm.nn.linear import Linear
from pyvlm.ops import _backends
from pyvlm.ops.linear import linear

_KERNEL = "pyvlm.ops.linear"
ADVANTAGE = 1.1  # what a layer must gain: less may be the noise of the measurement
TOKENS = 256  # rows measured; products of a few tokens are torch's in either case
ROUNDS = 7


def apply(model: nn.Module, where: Callable[[str], bool] | None = None) -> list[Change]:
    """Lets the plain linear layers of a model run on pyvlm's kernel, where it is the faster here.

    Every shape is measured once in a process (see `faster_on`). Parameters and state_dict stay as they are.
    pyvlm's layer has no second derivative; results differ from torch's by rounding.

    Args:
        model: any module. Only layers whose type is exactly `nn.Linear` are changed: subclasses, such as
            those of quantised models, have a forward of their own.
        where: which layers to look at, by their dotted names; None for all.

    Returns:
        One `Change` for each plain linear layer looked at.
    """
    layers = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear]
    return [_serve(name, layer) for name, layer in layers if where is None or where(name)]


def _serve(name: str, layer: nn.Linear) -> Change:
    reason = _why_not(layer)
    if reason is not None:
        return Change(name, "linear", None, reason, None)
    ratio = faster_on((layer.out_features, layer.in_features), layer.weight.dtype)
    measured = f"{ratio:.2f} times as fast as torch, forward and backward of {TOKENS} tokens"
    if ratio < ADVANTAGE:
        return Change(name, "linear", None, f"{measured}, expected {ADVANTAGE} or more", None)
    layer.__class__ = Linear

    def undo() -> None:
        if type(layer) is Linear:
            layer.__class__ = nn.Linear  # type: ignore[assignment]

    return Change(name, "linear", _KERNEL, f"{measured}; it has no second derivative", undo)


def _why_not(layer: nn.Linear) -> str | None:
    weight = layer.weight
    if "forward" in vars(layer):
        return "another library has replaced its forward"
    if type(weight) is not nn.Parameter or weight.dim() != 2 or not weight.is_floating_point():
        return "its weight is no plain matrix of floating-point numbers"
    return _backends.why_unavailable("linear", "native", weight.device)


def faster_on(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """How many times as fast as torch's the CPU product of a [N, K] weight is, forward and backward.

    Measured once for each shape, dtype and number of threads in a process: medians of alternating calls.
    """
    return _faster_on(shape, dtype, torch.get_num_threads())


@functools.cache
def _faster_on(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> float:
    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        start = time.perf_counter()
        torch.autograd.grad(product(x, weight), (x, weight), grad)
        return time.perf_counter() - start

    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        x = torch.randn(TOKENS, shape[1], generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        grad = torch.randn(TOKENS, shape[0], generator=generator).to(dtype)
        seconds(linear), seconds(nn.functional.linear)  # the first calls warm up
        pairs = [(seconds(linear), seconds(nn.functional.linear)) for _ in range(ROUNDS)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return theirs / ours

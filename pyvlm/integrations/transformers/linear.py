"""Linear layers of transformers' models by `pyvlm.ops.linear`, where that is measured to be faster."""

import functools
import statistics
import time
from collections.abc import Callable
from weakref import ref

import torch
from torch import Tensor, nn

from pyvlm.integrations.transformers.changes import Change
from pyvlm.nn.linear import DecodingLinear, Linear, few_tokens
from pyvlm.ops import _backends
from pyvlm.ops.linear import linear

_KERNEL = "pyvlm.ops.linear"
ADVANTAGE = 1.1  # what a layer must gain: less may be the noise of the measurement
TOKENS = 256  # rows measured forward and backward
ROUNDS = 7
READ_BYTES = 1 << 26  # of weights, one after the other, for a decoded token: more than caches hold
MOST_WEIGHTS = 512  # of them: smaller ones lie in a cache between two tokens of a model too


def apply(model: nn.Module, where: Callable[[str], bool] | None = None) -> list[Change]:
    """Lets the plain linear layers of a model run on pyvlm's kernel, where it is the faster here.

    Every shape is measured once in a process: with many tokens, forward and backward, and where that gains
    nothing, as in bfloat16, with one decoded token, whose product alone is then pyvlm's. Parameters and
    state_dict stay as they are. pyvlm's layer of many tokens has no second derivative; results differ from
    torch's by rounding.

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
    shape, dtype = (layer.out_features, layer.in_features), layer.weight.dtype
    ratio = faster_on(shape, dtype)
    measured = f"{ratio:.2f} times as fast as torch, forward and backward of {TOKENS} tokens"
    if ratio >= ADVANTAGE:
        return _swap(name, layer, Linear, f"{measured}; it has no second derivative")
    decoding = decodes_faster_on(shape, dtype)
    measured = f"{measured}, and {decoding:.2f} times for one token"
    if decoding >= ADVANTAGE:
        return _swap(name, layer, DecodingLinear, f"{measured}; only decoded tokens take it")
    return Change(name, "linear", None, f"{measured}, expected {ADVANTAGE} or more", None)


def _swap(name: str, layer: nn.Linear, made: type[nn.Linear], reason: str) -> Change:
    layer.__class__ = made
    held = ref(layer)

    def undo() -> None:
        if isinstance(swapped := held(), nn.Linear) and type(swapped) is made:
            swapped.__class__ = nn.Linear

    return Change(name, "linear", _KERNEL, reason, undo)


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


def decodes_faster_on(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """The same of one token, forward, with weights that come from memory, as those of a model do."""
    return _decodes_faster_on(shape, dtype, torch.get_num_threads())


@functools.cache
def _faster_on(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> float:
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        x = torch.randn(TOKENS, shape[1], generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        grad = torch.randn(TOKENS, shape[0], generator=generator).to(dtype)

        def train(product: Callable[..., Tensor]) -> None:
            torch.autograd.grad(product(x, weight, None), (x, weight), grad)

        return _ratio(train, linear)


@functools.cache
def _decodes_faster_on(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> float:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = torch.randn(1, shape[1], generator=generator).to(dtype)
        weight = torch.randn(shape, generator=generator).to(dtype)
        weights = [weight.clone() for _ in range(min(MOST_WEIGHTS, -(-READ_BYTES // max(1, weight.nbytes))))]

        def decode(product: Callable[..., Tensor]) -> None:
            for each in weights:
                product(x, each, None)

        return _ratio(decode, few_tokens)


def _ratio(run: Callable[[Callable[..., Tensor]], None], ours: Callable[..., Tensor]) -> float:
    """Torch's time over ours."""

    def seconds(product: Callable[..., Tensor]) -> float:
        start = time.perf_counter()
        run(product)
        return time.perf_counter() - start

    seconds(ours), seconds(nn.functional.linear)  # the first calls warm up
    pairs = [(seconds(ours), seconds(nn.functional.linear)) for _ in range(ROUNDS)]
    own, torchs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return torchs / own

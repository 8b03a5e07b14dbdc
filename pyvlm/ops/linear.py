"""Linear layers.

Shape legend
    K features of x · N features of y · x has any dimensions before its features
"""

import torch
from torch import Tensor

from pyvlm import _native
from pyvlm.ops import _backends
from pyvlm.ops._checks import Shapes
from pyvlm.reference import linear as reference


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """y = x Wᵀ + b, as `torch.nn.functional.linear`, which on CPU it outruns where it can.

    The native product is taken for float32 on processors with AVX-512 and without AMX (where torch's library
    reaches 40 % of the peak of AMD's) and for float16. Up to eight tokens have one of their own, which reads
    the weight once, at the speed of memory (without AMX; not for float64, nor for several bfloat16 tokens of
    more than 10,000 numbers in all). The rest is torch's.
    The native products give the same bits for any number of threads. The gradients are made alike.

    Args:
        x: [.., K].
        weight: [N, K].
        bias: [N].
        backend: "auto", "reference" or "native".

    Returns:
        [.., N] in the dtype of x (of autocast, where that is on).

    Raises:
        TypeError: dtypes that differ outside autocast, or are not floating-point.
        ValueError: shapes that do not fit together, or several devices.
    """
    if isinstance(x, Tensor) and x.dim() < 1:
        raise ValueError("linear: x has no dimensions, expected [.., K] with K = weight's columns")
    shapes = Shapes("linear").check("x", x, (*(f"x.shape[{i}]" for i in range(x.dim() - 1)), "K"))
    shapes.check("weight", weight, "NK").check("bias", bias, "N")
    if _backends.resolve("linear", backend, x.device) == "reference":
        return reference.linear(x, weight, bias)
    y: Tensor = torch.ops.pyvlm.linear(x, weight, bias)
    return y


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    grad_x, grad_weight, grad_bias = (
        x.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs, strict=True)
    )
    return grad_x, grad_weight, grad_bias


if _native.C is not None:  # it defines the schemas, and the gradient (csrc/bindings/linear.cpp)
    torch.library.register_fake("pyvlm::linear", _fake)
    torch.library.register_fake("pyvlm::linear_backward", _fake_backward)
    _backends.refuse_second_derivative("linear")

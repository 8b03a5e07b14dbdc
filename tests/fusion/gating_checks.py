"""What tests of gated activations on every backend share."""

import torch
from tolerance import assert_close
from torch import Tensor

from pyvlm.ops import gated_activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def results(
    gate: Tensor,
    up: Tensor | None,
    grad_y: Tensor,
    activation: str,
    backend: str,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The output and the gradients of what is there; `dtype` where it is not that of gate."""
    given = {"gate": gate, "up": up}
    leaves = {
        name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in given.items() if x is not None
    }
    y = gated_activation(leaves["gate"], leaves.get("up"), activation, backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def assert_right(gate: Tensor, up: Tensor | None, activation: str, backend: str = "native") -> None:
    """Output and gradients of a backend, beside the reference in float64 and in the dtype; and in place."""
    grad_y = torch.randn(gate.shape).to(gate.dtype)
    actual = results(gate, up, grad_y, activation, backend)
    plain = results(gate, up, grad_y, activation, "reference")
    expected = results(gate, up, grad_y, activation, "reference", torch.float64)
    for name, tensor in actual.items():
        assert tensor.dtype == gate.dtype
        assert_close(tensor, expected[name], plain=plain[name], name=name)
    with torch.no_grad():
        overwritten = gate.clone(memory_format=torch.preserve_format)
        assert gated_activation(overwritten, up, activation, inplace=True, backend=backend) is overwritten
        assert overwritten.equal(actual["y"])

"""What tests of RMSNorm on every backend share."""

import torch
from tolerance import assert_close
from torch import Tensor

from pyvlm.ops import rms_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def results(
    x: Tensor,
    weight: Tensor | None,
    grad_y: Tensor,
    backend: str,
    unit_offset: bool = False,
    eps: float = 1e-6,
    wide: bool = False,
) -> dict[str, Tensor]:
    """The output and all gradients; `wide` in float64."""
    leaves = {"x": x} if weight is None else {"x": x, "weight": weight}
    leaves = {
        name: (leaf.double() if wide else leaf).detach().requires_grad_() for name, leaf in leaves.items()
    }
    y = rms_norm(leaves["x"], leaves.get("weight"), eps, unit_offset, backend)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def assert_right(
    x: Tensor,
    weight: Tensor | None,
    unit_offset: bool = False,
    eps: float = 1e-6,
    backend: str = "native",
) -> None:
    """Output and gradients of a backend, beside the reference in float64 and in x's dtype."""
    grad_y = torch.randn(x.shape).to(x.dtype)
    actual = results(x, weight, grad_y, backend, unit_offset, eps)
    plain = results(x, weight, grad_y, "reference", unit_offset, eps)
    expected = results(x, weight, grad_y, "reference", unit_offset, eps, wide=True)
    # Of x's gradient two terms cancel, all of them where there is one channel.
    scale = 1.0 if weight is None else weight.double() + unit_offset
    term = grad_y.double() * scale * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    for name, tensor in actual.items():
        assert tensor.dtype == plain[name].dtype
        terms = term.abs().max().item() if name == "x" and term.numel() else 0.0
        assert_close(tensor, expected[name], plain=plain[name], name=name, terms=terms)

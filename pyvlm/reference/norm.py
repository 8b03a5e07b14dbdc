"""RMSNorm in plain PyTorch: the definition of `pyvlm.ops.norm`."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (weight, or 1 + weight), for x [.., C] and weight [C], rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + unit_offset)
    return y.to(x.dtype)

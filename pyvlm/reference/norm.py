"""RMSNorm in plain PyTorch: the definition of `pyvlm.ops.norm`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (weight, or 1 + weight), for x [.., C] and weight [C], rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = None if weight is None else weight.to(wide) + unit_offset
    return F.rms_norm(x.to(wide), x.shape[-1:], scale, eps).to(x.dtype)

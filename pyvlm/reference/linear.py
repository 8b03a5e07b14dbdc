"""A linear layer in plain PyTorch: the definition of `pyvlm.ops.linear`."""

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, for x [.., K], W [N, K] and b [N]."""
    return F.linear(x, weight, bias)

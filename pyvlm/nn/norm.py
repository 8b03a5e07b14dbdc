"""RMSNorm, and that of the Gemma models."""

import torch
from torch import Tensor, nn

from pyvlm.ops import rms_norm
from pyvlm.ops._backends import resolve


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight in one pass (arXiv 1910.07467), with the parameters of `torch.nn.RMSNorm`.

    Args:
        channels: the size of the last dimension, which is normalized.
        eps: what is added to the mean of the squares.
        backend: of `pyvlm.ops.rms_norm`.
    """

    def __init__(self, channels: int, eps: float = 1e-6, backend: str = "auto") -> None:
        super().__init__(channels, eps)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] → [.., C] in the wider dtype of x and the weight."""
        if resolve("rms_norm", self.backend, x.device, x.dtype) == "reference":  # torch may have its own
            return super().forward(x)
        return promoting_rms_norm(x, self.weight, self.eps or 0.0, self.backend)


class UnitOffsetRMSNorm(RMSNorm):
    """RMSNorm whose weight is stored less 1: x / rms(x) · (1 + weight) (Gemma, arXiv 2403.08295).

    Near 1 a half-precision weight has few digits, near 0 many; so the sum is made in float32 or wider.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] → [.., C] in the dtype of x."""
        return rms_norm(x, self.weight, self.eps or 0.0, unit_offset=True, backend=self.backend)


def promoting_rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """`pyvlm.ops.rms_norm` in the wider dtype of x and the weight, as PyTorch's operators promote them."""
    wide = x if x.dtype == weight.dtype else x.to(torch.promote_types(x.dtype, weight.dtype))
    return rms_norm(wide, weight, eps, backend=backend)

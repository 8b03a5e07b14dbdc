"""The norm of the Gemma models."""

import torch
from torch import Tensor, nn


class UnitOffsetRMSNorm(nn.RMSNorm):
    """RMSNorm whose weight is stored less 1: x / rms(x) · (1 + weight) (Gemma, arXiv 2403.08295).

    Near 1 a half-precision weight has few digits, near 0 many; so the sum is made in float32 or wider.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = 1 + self.weight.to(wide)
        return nn.functional.rms_norm(x.to(wide), self.normalized_shape, scale, self.eps).to(x.dtype)

"""The linear layer of pyvlm's modules."""

import torch
from torch import Tensor, nn

from pyvlm import _native
from pyvlm.ops.linear import linear

# With fewer tokens the checks of the op are a part of a decoded token's time: 20 us a layer, 4 % of a model
# of four layers at the width of 0.5B.
FEWEST_TOKENS = 32


class Linear(nn.Linear):
    """`nn.Linear`, with the same parameters, by `pyvlm.ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Projects [.., in_features] to [.., out_features]."""
        if input.numel() < FEWEST_TOKENS * self.in_features:
            return few_tokens(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


class DecodingLinear(nn.Linear):
    """`nn.Linear`, with the same parameters, of which only decoded tokens are `pyvlm.ops.linear`'s."""

    def forward(self, input: Tensor) -> Tensor:
        """Projects [.., in_features] to [.., out_features]."""
        if input.numel() < FEWEST_TOKENS * self.in_features:
            return few_tokens(input, self.weight, self.bias)
        return super().forward(input)


def few_tokens(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` of a decoded token, or a few, for which the op is called unchecked.

    Where gradients may be wanted it is torch's, whose own can be differentiated again.
    """
    own = x.dtype == weight.dtype and x.is_cpu and _native.C is not None
    if own and not torch.is_grad_enabled():
        y: Tensor = torch.ops.pyvlm.linear(x, weight, bias)
        return y
    return nn.functional.linear(x, weight, bias)

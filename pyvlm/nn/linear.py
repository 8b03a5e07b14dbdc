"""The linear layer of pyvlm's modules."""

from torch import Tensor, nn

from pyvlm.ops.linear import linear


class Linear(nn.Linear):
    """`nn.Linear`, with the same parameters, by `pyvlm.ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Projects [.., in_features] to [.., out_features]."""
        return linear(input, self.weight, self.bias)

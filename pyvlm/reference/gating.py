"""Activations and their gated form in plain PyTorch: the definition of `pyvlm.ops.gating`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up, for gate and up [.., I]."""
    return ACTIVATIONS[activation](gate) * up

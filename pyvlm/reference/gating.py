"""Activations and their gated form in plain PyTorch: the definition of `pyvlm.ops.gating`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * F.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """act(gate) · up, for gate and up [.., I]; without up act(gate)."""
    y = ACTIVATIONS[activation](gate)
    return y if up is None else y * up

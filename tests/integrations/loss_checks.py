"""How a model's loss and gradients are compared with those of the same model in plain transformers."""

from typing import Any

import torch
from torch import Tensor, nn

from pyvlm.integrations.transformers.lazy_logits import LazyLogits

NO_GRADIENT = "k_proj.bias"  # softmax does not change with it: its gradient is rounding


def is_read(logits: Tensor) -> bool:
    return not isinstance(logits, LazyLogits) or logits.behind.computed is not None


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Any]:
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return outputs.loss.detach(), grads, outputs


def assert_same_gradient(grad: Tensor, other: Tensor, name: str) -> None:
    error, largest = (grad - other).abs().max(), other.abs().max()
    assert error <= 1e-5 * largest, f"{name}: error {error:.3g}, largest {largest:.3g}"


def assert_same_step(plain: nn.Module, ours: nn.Module, inputs: dict[str, Any]) -> Any:
    """Loss and every gradient agree; returns our outputs."""
    loss, grads, outputs = step(ours, inputs)
    plain_loss, plain_grads, plain_outputs = step(plain, inputs)
    torch.testing.assert_close(loss, plain_loss, rtol=2e-6, atol=0, equal_nan=True)
    assert grads.keys() == plain_grads.keys()
    for key, grad in grads.items():
        if NO_GRADIENT not in key:
            assert_same_gradient(grad, plain_grads[key], key)
    assert torch.equal(outputs.logits.detach().clone(), plain_outputs.logits)
    return outputs

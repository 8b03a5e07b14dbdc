"""The language-model head fused with its loss: the public function.

Shapes: T tokens · H features · V words.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyvlm import _native
from pyvlm.ops import _backends
from pyvlm.ops._checks import Shapes
from pyvlm.reference import loss as reference


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias`, computed only for the rows that have a label.

    In a VLM most rows (image tokens, prompts) carry no loss, and the head is the largest product of a small
    model. Rows that are ignored cost nothing and get gradient 0; where all are, the loss is 0, not NaN.

    Args:
        hidden: [T, H].
        weight, bias: [V, H] and [V].
        labels: int64 [T], each in [0, V) or `ignore_index`. Already shifted: row t is scored against
            labels[t].
        ignore_index: the label of rows that have none.
        softcap: logits become softcap·tanh(logits / softcap) (Gemma 2, arXiv 2408.00118).
        label_smoothing: in [0, 1], as in `torch.nn.functional.cross_entropy`.
        z_loss: coefficient of log² Z, added row by row (ST-MoE, arXiv 2202.08906).
        reduction: "mean" over the labelled rows, or "sum".
        backend: "auto", "reference", "native" or "triton".

    Returns:
        A scalar in float32 (float64 for float64 inputs).

    Raises:
        TypeError: a dtype. ValueError: a shape, a device, an option, or (on the CPU) a label outside the
            vocabulary. On a GPU such a label is found there, and its error comes with a later call.
    """
    op = "linear_cross_entropy"
    shapes = Shapes(op).check("hidden", hidden, "TH").check("weight", weight, "VH").check("bias", bias, "V")
    shapes.check("labels", labels, "T", dtypes=(torch.int64,))
    if reduction not in ("mean", "sum"):
        raise ValueError(f'{op}: reduction={reduction!r} is unknown; expected "mean" or "sum"')
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected a number in [0, 1]")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"{op}: softcap is {softcap}, expected a positive number or None")
    if not z_loss >= 0.0:
        raise ValueError(f"{op}: z_loss is {z_loss}, expected a number of at least 0")
    implementation = _backends.resolve(op, backend, hidden.device, hidden.dtype)
    if implementation == "reference":
        if labels.is_cpu and not torch.compiler.is_compiling():
            _check_labels(labels, ignore_index, len(weight))
        return reference.linear_cross_entropy(
            hidden, weight, labels, ignore_index, bias, softcap, label_smoothing, z_loss, reduction
        )
    interpreted = implementation == "triton" and hidden.device.type == "cpu"
    call = _InterpretedTriton.apply if interpreted else torch.ops.pyvlm.linear_cross_entropy
    options = (softcap or 0.0, label_smoothing, z_loss, reduction == "mean")
    loss, _ = call(hidden, weight, labels, ignore_index, bias, *options)
    return loss


def _check_labels(labels: Tensor, ignore_index: int, words: int) -> None:
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= words))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"linear_cross_entropy: labels[{row}] is {int(labels[row])}, expected ignore_index "
            f"{ignore_index} or a word in [0, {words})"
        )


def _fake(hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(labels.shape, dtype=dtype)


def _fake_backward(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    bias, needs = args[1], args[-1]
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if needed and t is not None
        else hidden.new_empty(0)
        for t, needed in zip((hidden, weight, bias), needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, labels, ctx.ignore_index, bias, *ctx.options = inputs
    lse = output[1]
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, labels, bias, lse)


def _backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return _gradients(torch.ops.pyvlm.linear_cross_entropy_backward, ctx, grad_loss)


def _gradients(
    op: Callable[..., tuple[Tensor, ...]], ctx: Any, grad_loss: Tensor | None
) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 9
    if grad_loss is None:
        return tuple(grads)
    hidden, weight, labels, bias, lse = ctx.saved_tensors
    differentiable = (0, 1, 4)  # hidden, weight and bias among the inputs
    needs = [ctx.needs_input_grad[i] for i in differentiable]
    found = op(grad_loss, hidden, weight, labels, ctx.ignore_index, bias, *ctx.options, lse, needs)
    for i, needed, grad in zip(differentiable, needs, found, strict=True):
        grads[i] = grad if needed else None
    return tuple(grads)


_triton = _backends.triton_function("loss", "linear_cross_entropy")
_triton_backward = _backends.triton_function("loss", "linear_cross_entropy_backward")


class _InterpretedTriton(torch.autograd.Function):
    """The Triton kernels on CPU tensors, in Triton's interpreter: torch's CPU kernels are the native ones."""

    forward = staticmethod(_triton)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return _gradients(_triton_backward, ctx, grad_loss)


if _native.C is not None:  # it defines the schemas
    torch.library.impl("pyvlm::linear_cross_entropy", "CUDA", _triton)
    torch.library.impl("pyvlm::linear_cross_entropy_backward", "CUDA", _triton_backward)
    torch.library.register_fake("pyvlm::linear_cross_entropy", _fake)
    torch.library.register_fake("pyvlm::linear_cross_entropy_backward", _fake_backward)
    torch.library.register_autograd("pyvlm::linear_cross_entropy", _backward, setup_context=_setup_context)
    _backends.refuse_second_derivative("linear_cross_entropy")

"""The language-model head fused with its loss: the public function.

Shapes: T tokens · H features · V words.
"""

import torch
from torch import Tensor

from pyvlm.ops._backends import resolve
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
        softcap: logits become softcap·tanh(logits / softcap) (Gemma 2, arXiv 2408.00118).
        label_smoothing: in [0, 1], as in `torch.nn.functional.cross_entropy`.
        z_loss: coefficient of log² Z, added row by row (ST-MoE, arXiv 2202.08906).
        reduction: "mean" over the labelled rows, or "sum".

    Returns:
        A scalar in float32 (float64 for float64 inputs).

    Raises:
        TypeError: a dtype. ValueError: a shape, a device, an option, or (on the CPU) a label outside the
            vocabulary.
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
    if labels.is_cpu and not torch.compiler.is_compiling():
        outside = (labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"{op}: labels[{row}] is {int(labels[row])}, expected ignore_index {ignore_index} or a word "
                f"in [0, {weight.shape[0]})"
            )
    resolve(op, backend, hidden.device)
    return reference.linear_cross_entropy(
        hidden, weight, labels, ignore_index, bias, softcap, label_smoothing, z_loss, reduction
    )

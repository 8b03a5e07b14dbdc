"""The language-model head and its loss in plain PyTorch: what `pyvlm.ops.loss` is held to.

Shapes: T tokens · H features · V words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvlm.reference.fusion import accumulator


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    ignore_index: int = -100,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the rows that have a label; the others never reach the vocabulary."""
    dtype = accumulator(hidden_TH.dtype)
    labeled = (labels_T != ignore_index).nonzero().squeeze(1)
    logits = F.linear(
        hidden_TH[labeled].to(dtype), weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
    )
    logits = logits.to(dtype)  # autocast may have lowered the product
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, labels_T[labeled], label_smoothing=label_smoothing, reduction="sum")
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square().sum()
    return loss / max(labeled.numel(), 1) if reduction == "mean" else loss

"""The language-model head fused with its loss, as a module."""

import torch
from torch import Tensor, nn

from pyvlm.ops.loss import linear_cross_entropy


class LinearCrossEntropy(nn.Linear):
    """A head that is asked for a loss in place of logits: see `pyvlm.ops.linear_cross_entropy`.

    `weight` and `bias` are those of a plain `nn.Linear`, so that a head's weights load, and may be tied to
    the embedding's.

    Args:
        in_features, out_features, bias: hidden size and vocabulary, as in `nn.Linear`.
        ignore_index, softcap, label_smoothing, z_loss, reduction: as in the op.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        ignore_index: int = -100,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.ignore_index, self.softcap = ignore_index, softcap
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.reduction, self.backend = reduction, backend

    def forward(self, hidden_states: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """The loss of hidden states [.., H] against labels [..], already shifted.

        Rows whose label is `ignore_index` cost nothing.
        """
        return linear_cross_entropy(
            hidden_states.flatten(0, -2),
            self.weight,
            labels.flatten(),
            self.ignore_index,
            self.bias,
            self.softcap,
            self.label_smoothing,
            self.z_loss,
            self.reduction,
            self.backend,
        )

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [.., V], for generation."""
        logits = nn.functional.linear(hidden_states, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

"""Partial LoRA: a low-rank update of a language model's linear layers that only image tokens get."""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from pyvlm.ops.placement import add_at_image_tokens, pack_image_tokens


class ImageTokens(NamedTuple):
    """Which of the tokens are image tokens.

    Attributes:
        mask: bool [B, L], True at the image tokens.
        number: how many they are; a caller that knows spares a GPU the wait for their count.
    """

    mask: Tensor
    number: int | None = None


def project(linear: nn.Module, hidden_states: Tensor, image_tokens: ImageTokens | None) -> Tensor:
    """`linear(hidden_states)`; a `PartialLoRALinear` gets the image tokens too (None: there are none)."""
    if image_tokens is not None and isinstance(linear, PartialLoRALinear):
        return linear(hidden_states, image_tokens.mask, image_tokens.number)
    return linear(hidden_states)


class PartialLoRALinear(nn.Linear):
    """A linear layer with a low-rank update for image tokens only: W x + b + [image] (α/r) B A x.

    Source: "InternLM-XComposer2" (arXiv 2401.16420), Partial LoRA. `weight` and `bias` are those of a plain
    `nn.Linear`. The update is 0 at the start, and computed for image tokens alone.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        rank, alpha: r and α.
        dropout: on the input of the update, in training.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias)
        if rank < 1:
            raise ValueError(f"PartialLoRALinear: rank is {rank}, expected at least 1")
        self.scaling, self.backend = alpha / rank, backend
        self.dropout = nn.Dropout(dropout)
        self.lora_a = nn.Linear(in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Self:
        """Takes the place of a plain layer: its very weight and bias, and a new update on their device.

        Args:
            options: rank, alpha, dropout and backend.
        """
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **options)
        layer.weight, layer.bias = linear.weight, linear.bias
        for matrix in (layer.lora_a, layer.lora_b):
            matrix.to_empty(device=linear.weight.device).to(linear.weight.dtype)
        layer.lora_a.reset_parameters()
        nn.init.zeros_(layer.lora_b.weight)
        return layer.train(linear.training)

    def forward(
        self, hidden_states: Tensor, image_mask: Tensor | None = None, num_image_tokens: int | None = None
    ) -> Tensor:
        """Maps [B, L, in_features] to [B, L, out_features].

        Args:
            image_mask: bool [B, L], True at the image tokens; None: there are none.
            num_image_tokens: how many they are; a caller that knows spares a GPU the wait for their count.
        """
        if image_mask is None:
            return super().forward(hidden_states)
        if num_image_tokens is None:
            num_image_tokens = int(image_mask.sum())
        positions = torch.nonzero_static(image_mask.flatten(), size=num_image_tokens).squeeze(1)
        image_states = pack_image_tokens(hidden_states.flatten(0, 1), positions, backend=self.backend)
        updates = self.lora_b(self.lora_a(self.dropout(image_states))) * self.scaling
        return add_at_image_tokens(super().forward(hidden_states), updates, image_mask, backend=self.backend)

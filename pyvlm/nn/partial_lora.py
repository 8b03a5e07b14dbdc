"""Partial LoRA: a low-rank update of a language model's linear layers that only image tokens get."""

import torch
from torch import Tensor, nn

from pyvlm.ops.placement import add_at_image_tokens, pack_image_tokens


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

    def forward(  # type: ignore[override]  # a linear layer that needs to know its image tokens
        self, hidden_states: Tensor, image_mask: Tensor, num_image_tokens: int | None = None
    ) -> Tensor:
        """Maps [B, L, in_features] to [B, L, out_features].

        Args:
            image_mask: bool [B, L], True at the image tokens.
            num_image_tokens: how many they are; a caller that knows spares a GPU the wait for their count.
        """
        if num_image_tokens is None:
            num_image_tokens = int(image_mask.sum())
        positions = torch.nonzero_static(image_mask.flatten(), size=num_image_tokens).squeeze(1)
        image_states = pack_image_tokens(hidden_states.flatten(0, 1), positions, backend=self.backend)
        updates = self.lora_b(self.lora_a(self.dropout(image_states))) * self.scaling
        return add_at_image_tokens(super().forward(hidden_states), updates, image_mask, backend=self.backend)

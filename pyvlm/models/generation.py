"""Continuing a prompt token by token.

Shapes: B samples, L tokens of the prompts, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyvlm.layout import PADDING, TEXT, TokenLayout
from pyvlm.models.inputs import check_inputs, default_layout
from pyvlm.models.language import slice_layout

if TYPE_CHECKING:
    from pyvlm.models.vlm import VLM


@torch.no_grad()
def generate(
    self: "VLM",
    input_ids: Tensor,
    images: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    image_sizes: Tensor | None = None,
    eos_token_id: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    callback: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continues each row, in evaluation mode; an image placeholder is never generated.

    Args:
        input_ids, images, attention_mask: as in `VLM.forward`; rows of unequal length are padded on the left.
        max_new_tokens: at most so many.
        image_sizes: as in `VLM.forward`, for a model with tiling.
        eos_token_id: ends a row; its later tokens are this one too. All stops when all rows have ended.
        temperature: 0 takes the likeliest token, otherwise one is drawn from softmax(logits / temperature).
        generator: the source of randomness, on the model's device.
        callback: called with the new token of each row, int64 [B], as soon as it is known.

    Returns:
        The new tokens only, int64 [B, at most max_new_tokens].

    Raises:
        TypeError, ValueError: as in `VLM.forward`; padding on the right; a number out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    image_sizes = None if image_sizes is None else image_sizes.cpu()
    check_inputs(self.config, input_ids, images, None, attention_mask, image_sizes)
    prompt = default_layout(self.config, input_ids, attention_mask, image_sizes=image_sizes)
    if prompt.length == 0 or (prompt.kind[:, -1] == PADDING).any():
        raise ValueError("every row must end with a token of its prompt: pad on the left")

    was_training = self.training
    self.eval()
    layout, cache = _extended(prompt, max_new_tokens), self.new_cache(prompt.length + max_new_tokens)
    finished_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    new_tokens: list[Tensor] = []
    try:
        for length in range(prompt.length, layout.length):
            so_far = slice_layout(layout, 0, length)
            hidden_BLC, _ = self.hidden_states(input_ids, images, so_far, cache, image_sizes)
            logits_BV = self.language.logits(hidden_BLC[:, -1]).float()
            logits_BV[:, self.config.image_token_id] = -torch.inf
            token_B = _choose(logits_BV, temperature, generator)
            if eos_token_id is not None:
                token_B = token_B.masked_fill(finished_B, eos_token_id)
                finished_B |= token_B == eos_token_id
            new_tokens.append(token_B)
            if callback is not None:
                callback(token_B)
            if finished_B.all():
                break
            input_ids, images = token_B[:, None], None
    finally:
        self.train(was_training)
    return torch.stack(new_tokens, dim=1)


def _choose(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token a row, int64 [B]."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    return (logits_BV / temperature).softmax(-1).multinomial(1, generator=generator)[:, 0]


def _extended(layout: TokenLayout, length: int) -> TokenLayout:
    """The layout with `length` text tokens more a row, in the document of its last token."""

    def append(field: Tensor, value: int) -> Tensor:
        return nn.functional.pad(field, (0, length), value=value)

    return replace(
        layout,
        kind=append(layout.kind, TEXT),
        image=append(layout.image, -1),
        document=torch.cat([layout.document, layout.document[:, -1:].expand(-1, length)], dim=1),
        prefix=None if layout.prefix is None else append(layout.prefix, False),
    )

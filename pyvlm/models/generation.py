"""Continuing a prompt token by token.

Shapes: B samples, L tokens of the prompts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyvlm.layout import PADDING, TEXT, TokenLayout
from pyvlm.models.config import VLMConfig
from pyvlm.models.inputs import check_inputs, default_layout
from pyvlm.models.language import slice_layout
from pyvlm.nn.attention import KeyValueCache

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
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    callback: Callable[[Tensor], bool | None] | None = None,
    cache: list[KeyValueCache] | None = None,
) -> Tensor:
    """Continues each row, in evaluation mode; an image placeholder is never generated.

    Args:
        input_ids, images, attention_mask: as in `VLM.forward`; rows of unequal length are padded on the left.
        max_new_tokens: at most so many.
        image_sizes: as in `VLM.forward`, for a model with tiling.
        eos_token_id: one or several, any of which ends a row; its later tokens are the first of these. All
            stops when all rows have ended.
        temperature: 0 takes the likeliest token, otherwise one is drawn from softmax(logits / temperature).
        top_p: of that distribution, draw among the likeliest tokens alone, as few as reach this probability
            together (nucleus sampling, arXiv 1904.09751).
        generator: the source of randomness, on the model's device.
        callback: called with the new token of each row, int64 [B], as soon as it is known; where it returns
            True, all stops after this token.
        cache: of `new_cache`, with room for the prompt and the new tokens. What it holds already are the
            first tokens of the prompt: they are not computed again, and `images` are those of the others.
            Afterwards it holds the prompt and all new tokens but the last. See `outlasts_its_prompt`.

    Returns:
        The new tokens only, int64 [B, at most max_new_tokens].

    Raises:
        TypeError, ValueError: as in `VLM.forward`; padding on the right; a number out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    cached = 0 if cache is None else cache[0].length
    new_mask = None if attention_mask is None else attention_mask[:, cached:]
    image_sizes = None if image_sizes is None else image_sizes.cpu()
    check_inputs(self.config, input_ids[:, cached:], images, None, new_mask, image_sizes)
    prompt = default_layout(self.config, input_ids, attention_mask, image_sizes=image_sizes)
    if cached and prompt.length <= cached:
        raise ValueError(
            f"the cache holds {cached} tokens a row and the prompt has {prompt.length}: "
            "at least one must be new"
        )
    if prompt.length == 0 or (prompt.kind[:, -1] == PADDING).any():
        raise ValueError("every row must end with a token of its prompt: pad on the left")

    was_training = self.training
    self.eval()
    layout = _extended(prompt, max_new_tokens)
    cache = self.new_cache(layout.length) if cache is None else cache
    input_ids = input_ids[:, cached:]
    ends = (
        [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else [*eos_token_id]
    )
    ends_E = torch.tensor(ends, dtype=torch.int64, device=input_ids.device)
    finished_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    new_tokens: list[Tensor] = []
    try:
        for length in range(prompt.length, layout.length):
            so_far = slice_layout(layout, 0, length)
            hidden_BLC, _ = self.hidden_states(input_ids, images, so_far, cache, image_sizes)
            logits_BV = self.language.logits(hidden_BLC[:, -1]).float()
            logits_BV[:, self.config.image_token_id] = -torch.inf
            token_B = _choose(logits_BV, temperature, top_p, generator)
            if ends:
                token_B = token_B.masked_fill(finished_B, ends[0])
                finished_B |= torch.isin(token_B, ends_E)
            new_tokens.append(token_B)
            stopped = callback is not None and callback(token_B)
            if stopped or finished_B.all():
                break
            input_ids, images = token_B[:, None], None
    finally:
        self.train(was_training)
    return torch.stack(new_tokens, dim=1)


def outlasts_its_prompt(config: VLMConfig) -> bool:
    """Whether a longer prompt may start from the cache of a shorter one: no token knows what comes later.

    Under the rules "prefix" and "all_images" earlier tokens see later ones, and under a capacity for tokens
    (`MoEConfig.eval_token_capacity_factor`) they compete with those that are computed together with them.
    With tiling, `image_sizes` would have to be known of the cached images and not checked against `images`.
    """
    language = config.language
    limited = language.moe is not None and language.moe.eval_token_capacity_factor is not None
    return not limited and config.tiling is None and language.attention_rule not in ("prefix", "all_images")


def _choose(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token a row, int64 [B]."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    p_BV = (logits_BV / temperature).softmax(-1)
    if top_p < 1:
        falling_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        reached_before_BV = falling_BV.cumsum(-1) - falling_BV >= top_p
        reached_before_BV[:, 0] = False  # whatever the rounding, one token is left
        p_BV = p_BV.scatter(-1, order_BV, falling_BV.masked_fill(reached_before_BV, 0))
    return p_BV.multinomial(1, generator=generator)[:, 0]


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

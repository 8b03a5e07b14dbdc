"""What a mixture-of-experts layer does between its logits and its experts, on top of `pyvlm.ops`.

Shape legend
    T tokens · E experts · S slots (token, expert) · B batch · L tokens a row
"""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvlm.layout import IMAGE, PADDING, TokenLayout
from pyvlm.nn.moe_options import IMAGE_ROW, TEXT_ROW, RouterOptions, Share
from pyvlm.ops.moe import Routing, token_choice


class TokenGroups(NamedTuple):
    """The rows of a flattened batch by modality; the same for every layer, so made once a forward pass.

    Attributes:
        text, image: int64, rising; padding is in neither.
        image_offsets: int64 [images + 1], where each image starts among the image rows.
        is_image: bool [T].
        image_sizes: the tokens of each image, on the host; None in a traced graph, which has no numbers.
    """

    text: Tensor
    image: Tensor
    image_offsets: Tensor
    is_image: Tensor
    image_sizes: list[int] | None = None

    @classmethod
    def of(cls, layout: TokenLayout) -> "TokenGroups":
        """How many rows there are of each is read from the device."""
        is_image = (layout.kind == IMAGE).flatten()
        is_text = (layout.kind != PADDING).flatten() & ~is_image
        text, image = is_text.nonzero()[:, 0], is_image.nonzero()[:, 0]
        offsets = _image_offsets(layout, image)
        sizes = None if torch.compiler.is_compiling() else offsets.diff().tolist()
        return cls(text, image, offsets, is_image, sizes)

    def rows(self, modalities: tuple[int, ...]) -> Tensor:
        """The rows of some modalities, rising."""
        groups = [{TEXT_ROW: self.text, IMAGE_ROW: self.image}[m] for m in modalities]
        filled = [rows for rows in groups if len(rows)] or groups[:1]
        return filled[0] if len(filled) == 1 else torch.cat(filled).sort().values

    def image_capacity(self, options: RouterOptions, num_experts: int) -> tuple[Tensor, int | None]:
        """How many tokens of each image an expert takes under expert choice, and how many slots that makes.

        Returns:
            int64 [images], and the number, which no device is asked for; None where `image_sizes` is.
        """
        factor = options.capacity_factor
        wanted = self.image_offsets.diff().double() * factor
        # By a tensor: a GPU divides by a number as it multiplies by its inverse, and would round otherwise
        # than the host does below.
        capacity = (wanted / wanted.new_full((), num_experts)).ceil().long()
        if self.image_sizes is None:
            return capacity, None
        taken = (min(n, math.ceil(n * factor / num_experts)) for n in self.image_sizes)
        return capacity, num_experts * sum(taken)


def _image_offsets(layout: TokenLayout, image_rows: Tensor) -> Tensor:
    if not len(image_rows):  # a generated token pays for no image
        return image_rows.new_zeros(1)
    # The layout guarantees that the tokens of an image are neighbours.
    new_BL = torch.zeros_like(layout.kind, dtype=torch.bool)
    new_BL[:, :1] = True
    for label_BL in (layout.document, layout.image):
        new_BL[:, 1:] |= label_BL[:, 1:] != label_BL[:, :-1]
    run_of_row = new_BL.flatten().cumsum(0)[image_rows]
    tokens_of_image = run_of_row.unique_consecutive(return_counts=True)[1]
    return F.pad(tokens_of_image.cumsum(0), (1, 0))


def choose_experts(
    logits_TE: Tensor, options: RouterOptions, training: bool, bias_E: Tensor | None, backend: str
) -> tuple[Routing, Routing | None]:
    """Token choice under the options: what the experts kept, and, with a capacity, what had been chosen."""
    noisy = training and options.noise == "gumbel"
    choice_TE = draw_second_choice(logits_TE) if noisy else logits_TE
    normalized = options.normalize != "none"
    choose = partial(
        token_choice, choice_TE, options.top_k, normalize=normalized, bias=bias_E, backend=backend
    )
    num_tokens, num_experts = logits_TE.shape
    capacity = options.token_capacity(num_tokens, num_experts, training)
    chosen = None if capacity is None else choose()
    kept = choose(capacity=capacity, drop=options.drop)
    before_drop = chosen is not None and options.normalize == "before_drop"
    if noisy or before_drop:
        summed = chosen if before_drop else kept if normalized else None
        kept = replace(kept, weight=slot_weights(logits_TE, kept, summed))
    return kept, chosen


def draw_second_choice(logits_TE: Tensor) -> Tensor:
    """Logits with the same best expert, whose next one is drawn from the softmax of the others.

    They serve the choice alone and have no gradient. The Gumbel-max trick: arXiv 1611.01144.
    """
    noisy_TE = logits_TE.detach() - torch.empty_like(logits_TE).exponential_().log()
    first_T1 = logits_TE.argmax(-1, keepdim=True)
    return noisy_TE.scatter(-1, first_T1, noisy_TE.amax(-1, keepdim=True) + 1)


def slot_weights(logits_TE: Tensor, routing: Routing, summed: Routing | None) -> Tensor:
    """p at the slots of `routing`, over its sum at the token's slots in `summed` where that is given: [S]."""
    p_TE = logits_TE.softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))
    if summed is not None:
        counted_TE = torch.zeros_like(p_TE).index_put((summed.token.long(), summed.expert), p_TE.new_ones(()))
        p_TE = p_TE / (p_TE * counted_TE).sum(-1, keepdim=True).clamp(min=torch.finfo(p_TE.dtype).eps)
    return p_TE[routing.token.long(), routing.expert]


def among_all(routing: Routing, share: Share, num_experts: int) -> Routing:
    """The routing to a share's experts as one to all experts of the layer."""
    if share.num_experts == num_experts:
        return routing
    expert = torch.arange(num_experts + 1, device=routing.token.device)
    offsets = routing.expert_offsets[(expert - share.first).clamp(0, share.num_experts)]
    return replace(routing, expert_offsets=offsets)


def count_slots(routing: Routing, is_image_T: Tensor) -> Tensor:
    """Slots by modality (text, image) and expert: int64 [2, E]."""
    # Differences of a running count: neither atomics nor a histogram, which would wait for the device.
    image_slots = F.pad(is_image_T[routing.token].cumsum(0), (1, 0))
    image_E = image_slots[routing.expert_offsets].diff()
    return torch.stack([routing.expert_offsets.diff() - image_E, image_E])


def quantile(logits_TE: Tensor, top_k: int) -> Tensor:
    """For each expert the p that round(T · top_k / E) of the tokens, but at least one, reach: [E]."""
    num_tokens, num_experts = logits_TE.shape
    reaching = max(1, round(num_tokens * top_k / num_experts))
    return logits_TE.softmax(-1).kthvalue(num_tokens - reaching + 1, dim=0).values

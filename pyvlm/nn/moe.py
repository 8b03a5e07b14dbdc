"""A mixture-of-experts feed-forward layer that treats image and text tokens each in their own way.

Shape legend
    B batch · L tokens a row · T = B·L · E experts · H hidden · I intermediate
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvlm.layout import IMAGE, PADDING, TokenLayout
from pyvlm.ops.moe import Routing, expert_choice, merge_routings, token_choice
from pyvlm.ops.moe_experts import Activation, expert_mlp
from pyvlm.ops.moe_losses import load_balancing_loss, router_z_loss

MODALITIES = ("text", "image")  # the rows of the statistics; text stands for all but image and padding


class MoEStats(NamedTuple):
    """What a layer adds to the loss, and what it did with its tokens.

    Attributes:
        aux_loss: the layer's share of the training loss, coefficients included; a differentiable scalar.
        dispatched: int64 [2, E], the tokens of each modality (text, image) that each expert worked on.
        dropped: int64 [2], the tokens of each modality that no expert took.
    """

    aux_loss: Tensor
    dispatched: Tensor
    dropped: Tensor


class MoE(nn.Module):
    """E gated MLPs behind one router: image tokens by expert choice within each image, text by token choice.

    Expert choice balances the experts by construction but lets a token depend on all others of its group, so
    it is kept inside an image, whose tokens are read together. A text token chooses its `top_k` experts by
    itself, without a capacity, so that no row depends on a later one and token-by-token generation gives the
    rows of one full pass. Padding is routed nowhere; its rows are zero, as are those of image tokens that no
    expert took.

    Expert choice: arXiv 2202.09368. Token choice, text by text: MoE-LLaVA (arXiv 2401.15947), where
    `image_router="token_choice"` treats image tokens like text.

    Args:
        hidden_size: H.
        intermediate_size: I of each expert.
        num_experts: E.
        top_k: experts a token chooses under token choice.
        capacity_factor: mean number of experts an image token gets under expert choice; each expert takes
            ceil(capacity_factor · tokens of the image / E) of them.
        activation: as for `pyvlm.ops.expert_mlp`.
        gated: gated experts, act(gate x) ⊙ (up x), or plain ones, act(up x).
        image_router: "expert_choice" or "token_choice".
        text_router: "token_choice"; expert choice would leak the future.
        aux_loss_coef: weight of the load-balancing loss over the tokens under token choice (DeepSpeed's
            form).
        z_loss_coef: weight of the router's z-loss over all tokens but padding.
        backend: as for `pyvlm.ops.expert_mlp`.

    Raises:
        ValueError: a size below 1, top_k above num_experts, a capacity factor that is not above 0, an unknown
            activation or router.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        capacity_factor: float = 1.0,
        activation: Activation = "silu",
        gated: bool = True,
        image_router: Literal["expert_choice", "token_choice"] = "expert_choice",
        text_router: Literal["token_choice"] = "token_choice",
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        sizes = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_experts": num_experts,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be 1 to num_experts={num_experts}, got {top_k}")
        if not capacity_factor > 0:
            raise ValueError(f"capacity_factor must be above 0, got {capacity_factor}")
        if activation not in get_args(Activation):
            expected = ", ".join(map(repr, get_args(Activation)))
            raise ValueError(f"activation={activation!r} is unknown; expected one of {expected}")
        if image_router not in ("expert_choice", "token_choice"):
            raise ValueError(
                f'image_router={image_router!r} is unknown; expected "expert_choice" or "token_choice"'
            )
        if text_router != "token_choice":
            raise ValueError(
                f'text_router={text_router!r} is unknown; expected "token_choice" '
                "(under expert choice a token would depend on later ones)"
            )
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.activation = activation
        self.gated = gated
        self.image_router = image_router
        self.aux_loss_coef = aux_loss_coef
        self.z_loss_coef = z_loss_coef
        self.backend = backend
        up_rows = 2 * intermediate_size if gated else intermediate_size
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, up_rows, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The router near zero, so that all experts start equal; the experts as `nn.Linear` starts."""
        nn.init.normal_(self.gate.weight, std=0.02)
        for weight in (self.gate_up_proj, self.down_proj):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, hidden_states: Tensor, layout: TokenLayout) -> tuple[Tensor, MoEStats]:
        """Routes every token but padding through its experts.

        Args:
            hidden_states: [B, L, H].
            layout: of these very tokens; in generation, of the new ones. An image must not be split between
                calls.

        Returns:
            [B, L, H] without the residual, and the statistics.

        Raises:
            ValueError: hidden_states does not match the layout or the layer, or the router's logits are not
                finite.
        """
        if hidden_states.shape != (*layout.kind.shape, self.gate.in_features):
            raise ValueError(
                f"hidden_states must be {[*layout.kind.shape, self.gate.in_features]}, after the layout and "
                f"the hidden size of the layer, got {list(hidden_states.shape)}"
            )
        x_TH = hidden_states.flatten(0, 1)
        logits_TE = self._router_logits(x_TH)
        routing, aux_loss = self._route(logits_TE, layout)
        y_TH = expert_mlp(
            x_TH,
            routing,
            self.gate_up_proj,
            self.down_proj,
            activation=self.activation,
            gated=self.gated,
            backend=self.backend,
        )
        return y_TH.view_as(hidden_states), self._stats(routing, layout, aux_loss)

    def extra_repr(self) -> str:
        experts, hidden, intermediate = self.down_proj.shape
        return (
            f"{experts} experts {hidden}→{intermediate}, text: top {self.top_k}, image: {self.image_router}"
            + (f" (capacity factor {self.capacity_factor})" if self.image_router == "expert_choice" else "")
        )

    def _router_logits(self, x_TH: Tensor) -> Tensor:
        # In float32 whatever the model and autocast say: in bf16, near ties between experts fall at random.
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        with torch.autocast(x_TH.device.type, enabled=False):
            return F.linear(x_TH.to(dtype), self.gate.weight.to(dtype))

    def _route(self, logits_TE: Tensor, layout: TokenLayout) -> tuple[Routing, Tensor]:
        by_expert_BL = (layout.kind == IMAGE) & (self.image_router == "expert_choice")
        by_token_BL = (layout.kind != PADDING) & ~by_expert_BL
        token_rows, image_rows = by_token_BL.flatten().nonzero()[:, 0], by_expert_BL.flatten().nonzero()[:, 0]
        token_logits, image_logits = logits_TE[token_rows], logits_TE[image_rows]

        parts = [(token_choice(token_logits, self.top_k, backend=self.backend), token_rows)]
        if len(image_rows):  # a generated token pays for no image
            offsets = _image_offsets(layout, image_rows)
            capacity = (offsets.diff().double() * self.capacity_factor / self.num_experts).ceil().long()
            parts.append((expert_choice(image_logits, capacity, offsets, backend=self.backend), image_rows))
        aux_loss = self.aux_loss_coef * load_balancing_loss(token_logits, self.top_k)
        if self.z_loss_coef:
            aux_loss = aux_loss + self.z_loss_coef * router_z_loss(torch.cat([token_logits, image_logits]))
        return merge_routings(parts, len(logits_TE)), aux_loss

    def _stats(self, routing: Routing, layout: TokenLayout, aux_loss: Tensor) -> MoEStats:
        kind_T = layout.kind.flatten()
        modality_T = (kind_T == IMAGE).long()
        count = len(MODALITIES)
        dispatched = torch.bincount(
            modality_T[routing.token] * self.num_experts + routing.expert, minlength=count * self.num_experts
        ).view(count, self.num_experts)
        dropped_T = (routing.token_offsets.diff() == 0) & (kind_T != PADDING)
        dropped = torch.stack([(dropped_T & (modality_T == m)).sum() for m in range(count)])
        return MoEStats(aux_loss, dispatched, dropped)


def _image_offsets(layout: TokenLayout, image_rows: Tensor) -> Tensor:
    """Where each image starts among the image tokens: int64 [images + 1]."""
    # The layout guarantees that the tokens of an image are neighbours.
    new_BL = torch.zeros_like(layout.kind, dtype=torch.bool)
    new_BL[:, :1] = True
    for label_BL in (layout.document, layout.image):
        new_BL[:, 1:] |= label_BL[:, 1:] != label_BL[:, :-1]
    run_of_row = new_BL.flatten().cumsum(0)[image_rows]
    tokens_of_image = run_of_row.unique_consecutive(return_counts=True)[1]
    return F.pad(tokens_of_image.cumsum(0), (1, 0))

"""A mixture-of-experts feed-forward layer that treats image and text tokens each in their own way.

Shape legend
    B batch · L tokens a row · T = B·L · E experts · H hidden · I intermediate
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvlm.layout import TokenLayout
from pyvlm.nn.experts import Experts
from pyvlm.nn.moe_options import MODALITIES, RouterOptions, Share
from pyvlm.nn.moe_routing import TokenGroups, among_all, choose_experts, count_slots, quantile
from pyvlm.ops.moe import Routing, expert_choice, merge_routings, threshold_choice
from pyvlm.ops.moe_experts import Activation, expert_mlp
from pyvlm.ops.moe_losses import (
    balance_bias,
    importance_loss,
    load_balancing_loss,
    load_loss,
    router_z_loss,
)


class MoEStats(NamedTuple):
    """What a layer adds to the loss, and what it did with its tokens.

    Attributes:
        aux_loss: the layer's share of the training loss, coefficients included; a differentiable scalar.
        dispatched: int64 [2, E], the tokens of each modality (text, image) that each expert worked on.
        dropped: int64 [2, E], the tokens that chose an expert and were refused for want of capacity.
        unrouted: int64 [2], the tokens that no expert worked on.
        routing: of all T tokens, padding included, to the E experts.
        quantiles: float [2, E], what the thresholds move towards (see `MoE.update_router`); None outside
            training and without threshold choice.
    """

    aux_loss: Tensor
    dispatched: Tensor
    dropped: Tensor
    unrouted: Tensor
    routing: Routing
    quantiles: Tensor | None


class _Routed(NamedTuple):
    """What one router did: its tokens' logits, without and with noise, and its routing of these rows."""

    share: Share
    rows: Tensor
    logits: Tensor
    noisy: Tensor
    routing: Routing
    chosen: Routing | None  # before the capacity, where there is one


class MoE(Experts):
    """E MLPs behind a router: by default images by expert choice within each, text by token choice.

    Expert choice balances the experts by construction but lets a token depend on all others of its group, so
    it is kept inside an image, whose tokens are read together. Text tokens find their experts by themselves,
    by token choice or by threshold choice, so that no row depends on a later one and token-by-token
    generation gives the rows of one full pass; a capacity for token choice is off by default because it
    breaks this. Padding is routed nowhere; its rows are zero, as are those of tokens that no expert took.

    Threshold choice and loss-free balancing have a state, kept in buffers, and a forward pass only reads it:
    after each training step hand the statistics to `update_router`.

    Expert choice: arXiv 2202.09368. Token choice for both modalities with a capacity: MoE-LLaVA
    (arXiv 2401.15947).

    Args:
        hidden_size: H.
        intermediate_size: I of each expert.
        num_experts: E.
        activation, gated, bias, backend: as for `pyvlm.nn.experts.Experts`.
        routing: as for `RouterOptions`.

    Raises:
        TypeError: an unknown option.
        ValueError: a size below 1, an unknown activation, or as `RouterOptions`.
    """

    thresholds: Tensor | None
    balance_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        backend: str = "auto",
        **routing: Any,
    ) -> None:
        super().__init__(
            hidden_size,
            intermediate_size,
            num_experts,
            activation=activation,
            gated=gated,
            bias=bias,
            backend=backend,
        )
        self.options = options = RouterOptions(num_experts, **routing)
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        by_threshold = [share for share in options.shares if share.router == "threshold_choice"]
        thresholds = torch.zeros(len(MODALITIES), num_experts)
        for share in by_threshold:
            thresholds[share.modalities, share.experts] = 1 / share.num_experts
        self.register_buffer("thresholds", thresholds if by_threshold else None)
        self.register_buffer("balance_bias", torch.zeros(num_experts) if options.bias_rate else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The router near zero, so that all experts start equal; the experts as `nn.Linear` starts."""
        super().reset_parameters()
        nn.init.normal_(self.gate.weight, std=0.02)

    def forward(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        groups: TokenGroups | None = None,
        statistics: bool = True,
    ) -> tuple[Tensor, MoEStats | None]:
        """Routes every token but padding through its experts.

        Args:
            hidden_states: [B, L, H].
            layout: of these very tokens; in generation, of the new ones. An image must not be split between
                calls.
            groups: `TokenGroups.of(layout)`, for who has it already.
            statistics: False saves the work of making them, and of the losses.

        Returns:
            [B, L, H] without the residual, and the statistics or None.

        Raises:
            ValueError: hidden_states does not match the layout or the layer, or the router's logits are not
                finite.
        """
        if hidden_states.shape != (*layout.kind.shape, self.gate.in_features):
            raise ValueError(
                f"hidden_states must be {[*layout.kind.shape, self.gate.in_features]}, after the layout and "
                f"the hidden size of the layer, got {list(hidden_states.shape)}"
            )
        groups = TokenGroups.of(layout) if groups is None else groups
        x_TH = hidden_states.flatten(0, 1)
        routed = self._route(self._router_logits(x_TH), groups)
        if len(routed) == 1 and len(routed[0].rows) == len(x_TH):
            routing = routed[0].routing
        else:
            routing = merge_routings([(part.routing, part.rows) for part in routed], len(x_TH))
        y_TH = expert_mlp(x_TH, routing, **self.mlp_options)
        stats = self._stats(routed, routing, groups) if statistics else None
        return y_TH.view_as(hidden_states), stats

    @torch.no_grad()
    def update_router(self, *stats: MoEStats) -> None:
        """Moves the thresholds and the balancing bias; to be called once a training step, after backward.

        Thresholds: each keeps `threshold_momentum` of itself and takes the rest from the step's quantile, the
        p that a share top_k / E of the step's tokens reached, so that in the long run a token gets top_k
        experts. They start at 1 / E, which every token's best expert reaches, and so, while the router is
        near zero, about half of the experts; 22 steps at a momentum of 0.9 leave a tenth of that start.

        Bias: `pyvlm.ops.balance_bias` on the tokens that chose each expert.

        Where several processes train together, each moves its own; those of DistributedDataParallel then go
        on with the first one's.

        Args:
            stats: of the step's forward passes in training mode, one a batch that gradients were summed over.

        Raises:
            ValueError: there are none, or they are of evaluation.
        """
        if not stats:
            raise ValueError("update_router needs the statistics of at least one forward pass")
        if self.thresholds is not None:
            quantiles = [part.quantiles for part in stats if part.quantiles is not None]
            if len(quantiles) < len(stats):
                raise ValueError("the statistics must be of forward passes in training mode")
            target = torch.stack(quantiles).mean(0).to(self.thresholds)
            self.thresholds.lerp_(target, 1 - self.options.threshold_momentum)
        if self.balance_bias is not None:
            wanted = torch.stack([part.dispatched + part.dropped for part in stats]).sum(0)
            for share in self.options.shares:
                if share.router == "token_choice":
                    counts = wanted[list(share.modalities), share.experts].sum(0)
                    bias = self.balance_bias[share.experts]
                    bias.copy_(balance_bias(bias, counts, self.options.bias_rate))

    def extra_repr(self) -> str:
        experts, hidden, intermediate = self.down_proj.shape
        o = self.options
        split = "" if o.image_experts is None else f" ({o.image_experts} of them for images)"
        routers = f"text by {o.text_router}, images by {o.image_router}, top {o.top_k}"
        return f"{experts} experts {hidden}→{intermediate}{split}, {routers}"

    def _router_logits(self, x_TH: Tensor) -> Tensor:
        # In float32 whatever the model and autocast say: in bf16, near ties between experts fall at random.
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        with torch.autocast(x_TH.device.type, enabled=False):
            return F.linear(x_TH.to(dtype), self.gate.weight.to(dtype))

    def _route(self, logits_TE: Tensor, groups: TokenGroups) -> list[_Routed]:
        """One entry a router that has tokens; the first router's where none has any."""
        parts = [(share, groups.rows(share.modalities)) for share in self.options.shares]
        parts = [(share, rows) for share, rows in parts if len(rows)] or parts[:1]
        return [self._route_share(share, rows, logits_TE, groups) for share, rows in parts]

    def _route_share(self, share: Share, rows: Tensor, logits_TE: Tensor, groups: TokenGroups) -> _Routed:
        logits = logits_TE if len(rows) == len(logits_TE) else logits_TE[rows]
        logits = noisy = logits[:, share.experts]
        if self.training and self.options.noise == "gaussian":
            noisy = logits + torch.randn_like(logits) * (self.options.noise_std / share.num_experts)
        chosen = None
        if share.router == "expert_choice":
            capacity, slots = groups.image_capacity(self.options, share.num_experts)
            routing = expert_choice(noisy, capacity, groups.image_offsets, self.backend, slots)
        elif share.router == "threshold_choice":
            assert self.thresholds is not None
            thresholds = self.thresholds[share.modalities[0], share.experts]
            routing = threshold_choice(noisy, thresholds, backend=self.backend)
        else:
            bias = None if self.balance_bias is None else self.balance_bias[share.experts]
            routing, chosen = choose_experts(noisy, self.options, self.training, bias, self.backend)
        routing = among_all(routing, share, self.num_experts)
        chosen = None if chosen is None else among_all(chosen, share, self.num_experts)
        return _Routed(share, rows, logits, noisy, routing, chosen)

    def _stats(self, routed: list[_Routed], routing: Routing, groups: TokenGroups) -> MoEStats:
        dispatched = count_slots(routing, groups.is_image)
        dropped = torch.zeros_like(dispatched)
        for part in routed:
            if part.chosen is not None:
                is_image = groups.is_image[part.rows]
                dropped += count_slots(part.chosen, is_image) - count_slots(part.routing, is_image)
        alone_T = routing.token_offsets.diff() == 0
        unrouted = torch.stack([alone_T[rows].sum() for rows in (groups.text, groups.image)])
        return MoEStats(
            self._aux_loss(routed), dispatched, dropped, unrouted, routing, self._quantiles(routed)
        )

    def _aux_loss(self, routed: list[_Routed]) -> Tensor:
        o, loss = self.options, routed[0].logits.new_zeros(())
        num_tokens = max(sum(len(part.rows) for part in routed), 1)
        for part in routed:
            if o.z_loss_coef:
                loss = loss + o.z_loss_coef * len(part.rows) / num_tokens * router_z_loss(part.logits)
            if part.share.router != "token_choice":
                continue
            if o.aux_loss_coef:
                balance = load_balancing_loss(part.noisy, o.top_k, o.aux_loss_form)
                loss = loss + o.aux_loss_coef * balance
            if o.importance_loss_coef:
                loss = loss + o.importance_loss_coef * importance_loss(part.logits)
            if o.load_loss_coef and self.training:
                std = o.noise_std / part.share.num_experts
                loss = loss + o.load_loss_coef * load_loss(part.logits, part.noisy, o.top_k, std)
        return loss

    @torch.no_grad()
    def _quantiles(self, routed: list[_Routed]) -> Tensor | None:
        if self.thresholds is None or not self.training:
            return None
        quantiles = self.thresholds.clone()  # where a batch has no tokens, the threshold stays
        for part in routed:
            if part.share.router == "threshold_choice" and len(part.rows):
                of_share = quantiles[part.share.modalities[0], part.share.experts]
                of_share.copy_(quantile(part.noisy, self.options.top_k))
        return quantiles

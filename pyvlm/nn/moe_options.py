"""How a mixture-of-experts layer routes: every option, checked, and which router each modality gets."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

ImageRouter = Literal["expert_choice", "token_choice", "threshold_choice"]
TextRouter = Literal["token_choice", "threshold_choice"]
Drop = Literal["position", "priority"]
Normalize = Literal["after_drop", "before_drop", "none"]
Noise = Literal["gumbel", "gaussian"]
AuxLossForm = Literal["deepspeed", "transformers"]

MODALITIES = ("text", "image")  # text stands for all but image and padding
TEXT_ROW, IMAGE_ROW = range(2)


class Share(NamedTuple):
    """What one router of a layer does: tokens of `modalities` go to the experts first to last − 1."""

    router: ImageRouter
    modalities: tuple[int, ...]
    first: int
    last: int

    @property
    def num_experts(self) -> int:
        return self.last - self.first

    @property
    def experts(self) -> slice:
        return slice(self.first, self.last)


@dataclass(frozen=True)
class RouterOptions:
    """How the tokens of each modality find their experts, and what a layer adds to the loss.

    Under token and threshold choice, without a `token_capacity_factor`, no token depends on another one.

    Args:
        num_experts: E.
        top_k: experts a token chooses under token choice, or gets on average under threshold choice.
        image_router: "expert_choice" (each expert takes the best tokens of each image; an image is read
            whole), or one of those for text.
        text_router: "token_choice" (each token takes its best `top_k` experts) or "threshold_choice" (each
            expert takes the tokens whose p reaches a running quantile of earlier batches).
        image_experts: the first so many experts serve images alone and the rest text alone, each with a
            softmax of its own; None: all serve both.
        capacity_factor: of expert choice, the mean number of experts an image token gets: each expert takes
            ceil(capacity_factor · tokens of the image / experts) of them.
        token_capacity_factor: of token choice in training: an expert keeps
            ceil(token_capacity_factor · top_k · tokens of the batch / experts) tokens and drops the others;
            None: all. MoE-LLaVA trains with 1.5. **It breaks causality**: with a capacity, an earlier token
            may lose its expert to a later one, or to one of another row of the batch.
        eval_token_capacity_factor: the same in evaluation, where MoE-LLaVA has 2.0 (of 4 experts and top 2:
            nothing can be dropped).
        drop: whom an expert keeps, the first tokens or those with the largest p: see
            `pyvlm.ops.token_choice`.
        normalize: what the weights of a token's experts are divided by under token choice: their sum over
            those it keeps ("after_drop", as DeepSpeed and Mixtral), over those it chose, so that a drop
            makes its output smaller ("before_drop"), or nothing ("none").
        noise: of training alone. "gumbel": the second choice is drawn from softmax(logits) without the
            first, by Gumbel noise on the logits; weights and losses stay those of p (DeepSpeed's
            top2gating). "gaussian": normal noise of standard deviation noise_std / experts on the logits of
            every router, before the softmax (V-MoE, arXiv 2106.05974).
        noise_std: see `noise`.
        threshold_momentum: how much of the thresholds an update keeps.
        bias_rate: step of the loss-free balancing of token choice (arXiv 2408.15664; the paper has 0.001);
            0: none.
        aux_loss_coef: weight of the load-balancing loss of token choice.
        aux_loss_form: see `pyvlm.ops.load_balancing_loss`; of this layer's tokens alone in either form.
        z_loss_coef: weight of the router's z-loss over all tokens but padding.
        importance_loss_coef: weight of the importance loss of token choice.
        load_loss_coef: weight of V-MoE's load loss of token choice, in training; it needs Gaussian noise.

    Raises:
        ValueError: a number out of range, an unknown name, or options that contradict each other.
    """

    num_experts: int
    top_k: int = 2
    image_router: ImageRouter = "expert_choice"
    text_router: TextRouter = "token_choice"
    image_experts: int | None = None
    capacity_factor: float = 1.0
    token_capacity_factor: float | None = None
    eval_token_capacity_factor: float | None = None
    drop: Drop = "position"
    normalize: Normalize = "after_drop"
    noise: Noise | None = None
    noise_std: float = 1.0
    threshold_momentum: float = 0.9
    bias_rate: float = 0.0
    aux_loss_coef: float = 0.01
    aux_loss_form: AuxLossForm = "deepspeed"
    z_loss_coef: float = 0.0
    importance_loss_coef: float = 0.0
    load_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.text_router == "expert_choice":
            raise ValueError(
                'text_router="expert_choice": a token would depend on later ones; expected '
                + _alternatives(TextRouter)
            )
        for name, kind in (
            ("image_router", ImageRouter),
            ("text_router", TextRouter),
            ("drop", Drop),
            ("normalize", Normalize),
            ("aux_loss_form", AuxLossForm),
        ):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name}={value!r} is unknown; expected {_alternatives(kind)}")
        if self.noise is not None and self.noise not in get_args(Noise):
            raise ValueError(f"noise={self.noise!r} is unknown; expected {_alternatives(Noise)} or None")
        self._check_numbers()
        self._check_combinations()

    def _check_numbers(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {self.num_experts}")
        if self.image_experts is not None and not 1 <= self.image_experts < self.num_experts:
            raise ValueError(
                f"image_experts must leave experts for both modalities, 1 to {self.num_experts - 1}, "
                f"got {self.image_experts}"
            )
        for share in self.shares:
            if share.router != "expert_choice" and not 1 <= self.top_k <= share.num_experts:
                limit = f"num_experts={self.num_experts}"
                if self.image_experts is not None:
                    limit = f"the {share.num_experts} experts for {MODALITIES[share.modalities[0]]}"
                raise ValueError(f"top_k must be 1 to {limit}, got {self.top_k}")
        for name in ("capacity_factor", "token_capacity_factor", "eval_token_capacity_factor", "noise_std"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}; expected a finite number")
        if not 0 <= self.threshold_momentum < 1:
            raise ValueError(
                f"threshold_momentum must be at least 0 and below 1, got {self.threshold_momentum}"
            )
        for name in ("bias_rate", "aux_loss_coef", "z_loss_coef", "importance_loss_coef", "load_loss_coef"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")

    def _check_combinations(self) -> None:
        wants_token_choice = {
            "token_capacity_factor": self.token_capacity_factor,
            "eval_token_capacity_factor": self.eval_token_capacity_factor,
            'noise="gumbel"': self.noise == "gumbel",
            "bias_rate": self.bias_rate,
            "importance_loss_coef": self.importance_loss_coef,
            "load_loss_coef": self.load_loss_coef,
        }
        unused = [name for name, value in wants_token_choice.items() if value]
        if unused and not any(share.router == "token_choice" for share in self.shares):
            raise ValueError(f"{unused[0]} is of token choice, and no modality is routed by it")
        if self.noise == "gumbel" and (self.top_k != 2 or self.drop != "position" or self.bias_rate):
            raise ValueError(
                'noise="gumbel" draws the second of two choices: expected top_k=2, drop="position" and '
                f"bias_rate=0, got {self.top_k}, {self.drop!r} and {self.bias_rate}"
            )
        if self.load_loss_coef and self.noise != "gaussian":
            raise ValueError(
                f'load_loss_coef is of the loss that V-MoE\'s noise defines: expected noise="gaussian", '
                f"got {self.noise!r}"
            )

    @property
    def shares(self) -> tuple[Share, ...]:
        """Who routes what: one share for both modalities where both choose among the same experts."""
        split, last = self.image_experts, self.num_experts
        if split is None and self.image_router == self.text_router == "token_choice":
            return (Share("token_choice", (TEXT_ROW, IMAGE_ROW), 0, last),)
        return (
            Share(self.text_router, (TEXT_ROW,), split or 0, last),
            Share(self.image_router, (IMAGE_ROW,), 0, split or last),
        )

    def token_capacity(self, num_tokens: int, num_experts: int, training: bool) -> int | None:
        """How many of so many tokens an expert keeps under token choice; None: all."""
        factor = self.token_capacity_factor if training else self.eval_token_capacity_factor
        if factor is None:
            return None
        return max(1, math.ceil(factor * self.top_k * num_tokens / num_experts))


def _alternatives(kind: object) -> str:
    return " or ".join(f'"{name}"' for name in get_args(kind))

"""Sizes of expert layers that tests and benchmarks share, each with its reason."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyvlm.ops import Routing, expert_choice, token_choice


@dataclass(frozen=True)
class ExpertCase:
    name: str
    reason: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int  # experts a token; under expert choice on average
    router: str = "token_choice"
    large: bool = False
    decode: bool = False  # weights come from memory, and nothing is trained
    groups: int = 1  # of equally many tokens, of which an expert chooses

    def reduced(self) -> "ExpertCase":
        """The same kind of layer, small enough to run anywhere at once."""
        experts = min(self.experts, 8)
        return replace(
            self,
            tokens=min(self.tokens, 96),
            hidden=64,
            intermediate=48,
            experts=experts,
            top_k=min(self.top_k, experts),
            groups=min(self.groups, 4),
        )

    def logits(self) -> Tensor:
        """Scores of the router, fp32 [tokens, experts]."""
        return torch.randn(self.tokens, self.experts, generator=torch.Generator().manual_seed(1))

    def route(self, logits: Tensor) -> Routing:
        if self.router == "expert_choice":
            capacity = max(1, self.tokens // self.groups * self.top_k // self.experts)
            if self.groups == 1:
                return expert_choice(logits, capacity)
            offsets = torch.arange(self.groups + 1, device=logits.device) * (self.tokens // self.groups)
            num_slots = self.groups * self.experts * capacity
            return expert_choice(logits, capacity, offsets, num_slots=num_slots)
        return token_choice(logits, self.top_k)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x, gate_up and down, whose products are of unit variance before the activation."""
        generator = torch.Generator().manual_seed(2)

        def normal(*shape: int, fan_in: int = 1) -> Tensor:
            return (torch.randn(shape, generator=generator) * fan_in**-0.5).to(dtype)

        return (
            normal(self.tokens, self.hidden),
            normal(self.experts, 2 * self.intermediate, self.hidden, fan_in=self.hidden),
            normal(self.experts, self.hidden, self.intermediate, fan_in=self.intermediate),
        )


# The native kernels' own sizes: 32 slots and 64 channels a tile, 256 slots a chunk, 256 channels a step.
SMALL_CASES = (
    ExpertCase("less-than-a-tile", "padding in every direction", 9, 8, 8, 1, 1),
    ExpertCase("more-than-a-tile", "of slots and of channels", 70, 96, 130, 2, 1),
    ExpertCase("several-chunks", "slots of one expert", 600, 40, 24, 1, 1),
    ExpertCase("several-steps", "channels to sum over", 40, 600, 530, 2, 1),
    ExpertCase("odd-rows", "no row begins on a word", 100, 67, 33, 3, 2),
    ExpertCase("few-tokens", "products row by row", 8, 130, 67, 4, 2),
    ExpertCase("one-token", "generation", 1, 64, 96, 8, 2),
    ExpertCase("eight-tokens-an-expert", "the most that go row by row", 8, 67, 40, 1, 1),
    ExpertCase("expert-choice", "tokens with no expert and with several", 50, 40, 24, 4, 1, "expert_choice"),
)
LARGE_CASES = (
    ExpertCase("moe-llava", "MoE-LLaVA's layer", 2048, 2048, 5504, 4, 2, large=True),
    ExpertCase("moe-llava-expert-choice", "the same", 2048, 2048, 5504, 4, 2, "expert_choice", large=True),
    ExpertCase("fine-grained", "many small experts", 4096, 1024, 512, 64, 8, large=True),
    ExpertCase("decode-t1", "one new token", 1, 2048, 5504, 4, 2, large=True, decode=True),
    ExpertCase("decode-t8", "eight sequences", 8, 2048, 5504, 4, 2, large=True, decode=True),
    ExpertCase(
        "decode-fine-grained-t8", "most experts of many", 8, 1024, 512, 64, 8, large=True, decode=True
    ),
)
CASES = SMALL_CASES + LARGE_CASES

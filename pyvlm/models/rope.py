"""How rotary positions are scaled, and which layers have frequencies of their own.

Frequencies are radians a position, float32 [D/2], the fastest first.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pyvlm.models.tower_config import Config, Size

Positive = Annotated[float, Field(gt=0)]


class LinearScaling(Config):
    """Position interpolation (arXiv 2306.15595): all positions are divided by `factor`."""

    type: Literal["linear"] = "linear"
    factor: Positive

    @property
    def magnitude(self) -> float:
        return 1.0

    def scale(self, frequency: Tensor, theta: float) -> Tensor:
        return frequency / self.factor


class Llama3Scaling(Config):
    """Llama 3.1 (arXiv 2407.21783): waves longer than the old context are stretched by `factor`.

    Waves shorter than `original_length / high_freq_factor` tokens stay, those longer than
    `original_length / low_freq_factor` are stretched, and between the two it is done by degrees.
    """

    type: Literal["llama3"] = "llama3"
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_length: Size

    @property
    def magnitude(self) -> float:
        return 1.0

    def scale(self, frequency: Tensor, theta: float) -> Tensor:
        waves = self.original_length * frequency / (2 * math.pi)  # in the old context
        kept = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(frequency / self.factor, frequency, kept.clamp(0, 1))


class YarnScaling(Config):
    """YaRN (arXiv 2309.00071): waves that turn less than `beta_slow` times in the old context are stretched.

    Waves that turn more than `beta_fast` times stay, and between the two it is done by degrees.

    Attributes:
        attention_factor: multiplies queries and keys.
        truncate: whether the ends of the ramp are rounded to whole channels, outwards.
    """

    type: Literal["yarn"] = "yarn"
    factor: Positive
    original_length: Size
    attention_factor: Positive
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        return self.attention_factor

    def scale(self, frequency: Tensor, theta: float) -> Tensor:
        pairs = len(frequency)
        low, high = (self._channel(turns, 2 * pairs, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        if low == high:
            high += 0.001  # a ramp has some width, and this is transformers' one
        channel = torch.arange(pairs, device=frequency.device, dtype=frequency.dtype)
        stretched = ((channel - low) / (high - low)).clamp(0, 1)
        return torch.lerp(frequency, frequency / self.factor, stretched)

    def _channel(self, turns: float, head_dim: int, theta: float) -> float:
        """The channel, not whole, whose wave turns so often in the old context."""
        wave = self.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(theta))


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="type")]


class LocalRope(Config):
    """Layers whose rotary positions have a base of their own, and no scaling (Gemma 3, arXiv 2503.19786)."""

    layers: Annotated[list[int], Field(min_length=1)]
    theta: Positive

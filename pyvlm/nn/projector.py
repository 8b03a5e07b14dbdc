"""Projectors: small networks from the width of image features to that of tokens."""

from typing import Literal, get_args

from torch import nn

from pyvlm.nn.linear import Linear

Projector = Literal["linear", "linear_layernorm", "mlp2x_gelu", "prismatic", "gelu_linear"]


def build_projector(kind: str, in_size: int, out_size: int) -> nn.Module:
    """From [..., in_size] to [..., out_size].

    - "linear": LLaVA (arXiv 2304.08485).
    - "linear_layernorm": DeepSpeed-VisualChat's baseline (arXiv 2309.14327).
    - "mlp2x_gelu": two layers, LLaVA 1.5 (arXiv 2310.03744).
    - "prismatic": three layers, the first four times as wide as its input: Prismatic's projector of fused
      features (arXiv 2402.07865).
    - "gelu_linear": GELU first, for features that have passed a linear layer each: DeepSeek-VL (arXiv
      2403.05525), and MouSi (arXiv 2401.17221), whose experts share the second layer.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "linear":
        return Linear(in_size, out_size)
    if kind == "linear_layernorm":
        return nn.Sequential(Linear(in_size, out_size), nn.LayerNorm(out_size, eps=1e-12))
    if kind == "mlp2x_gelu":
        return nn.Sequential(Linear(in_size, out_size), nn.GELU(), Linear(out_size, out_size))
    if kind == "prismatic":
        return nn.Sequential(
            Linear(in_size, 4 * in_size),
            nn.GELU(),
            Linear(4 * in_size, out_size),
            nn.GELU(),
            Linear(out_size, out_size),
        )
    if kind == "gelu_linear":
        return nn.Sequential(nn.GELU(), Linear(in_size, out_size))
    raise ValueError(f"projector {kind!r} is unknown; expected one of {', '.join(get_args(Projector))}")

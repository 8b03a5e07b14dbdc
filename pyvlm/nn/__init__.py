"""Modules made of `pyvlm.ops`: parameters and wiring, no kernel logic."""

from pyvlm.nn.attention import KeyValueCache, SpanAttention, rotary_tables
from pyvlm.nn.cross_attention import LocalCrossAttention, Resampler
from pyvlm.nn.experts import SoftMoE
from pyvlm.nn.fusion import EncoderFeatures, FeatureFusion, MergeLevels, PatchesToToken
from pyvlm.nn.linear import Linear
from pyvlm.nn.moe import MoE, MoEStats
from pyvlm.nn.moe_options import RouterOptions
from pyvlm.nn.moe_routing import TokenGroups
from pyvlm.nn.partial_lora import PartialLoRALinear

__all__ = [
    "EncoderFeatures",
    "FeatureFusion",
    "KeyValueCache",
    "Linear",
    "LocalCrossAttention",
    "MergeLevels",
    "MoE",
    "MoEStats",
    "PartialLoRALinear",
    "PatchesToToken",
    "Resampler",
    "RouterOptions",
    "SoftMoE",
    "SpanAttention",
    "TokenGroups",
    "rotary_tables",
]

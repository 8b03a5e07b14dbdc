"""Modules made of `pyvlm.ops`: parameters and wiring, no kernel logic."""

from pyvlm.nn.anyres import AnyResPacker
from pyvlm.nn.attention import KeyValueCache, SpanAttention, rotary_tables
from pyvlm.nn.cross_attention import LocalCrossAttention, Resampler
from pyvlm.nn.experts import SoftMoE
from pyvlm.nn.fusion import EncoderFeatures, FeatureFusion, MergeLevels, PatchesToToken
from pyvlm.nn.linear import Linear
from pyvlm.nn.loss import LinearCrossEntropy
from pyvlm.nn.moe import MoE, MoEStats
from pyvlm.nn.moe_options import RouterOptions
from pyvlm.nn.moe_routing import TokenGroups
from pyvlm.nn.norm import RMSNorm, UnitOffsetRMSNorm
from pyvlm.nn.partial_lora import ImageTokens, PartialLoRALinear
from pyvlm.nn.projector import build_projector
from pyvlm.nn.qformer import QFormer, QFormerFusion
from pyvlm.nn.spatial_aggregator import SpatialVisionAggregator

__all__ = [
    "AnyResPacker",
    "EncoderFeatures",
    "FeatureFusion",
    "ImageTokens",
    "KeyValueCache",
    "Linear",
    "LinearCrossEntropy",
    "LocalCrossAttention",
    "MergeLevels",
    "MoE",
    "MoEStats",
    "PartialLoRALinear",
    "PatchesToToken",
    "QFormer",
    "QFormerFusion",
    "RMSNorm",
    "Resampler",
    "RouterOptions",
    "SoftMoE",
    "SpanAttention",
    "SpatialVisionAggregator",
    "TokenGroups",
    "UnitOffsetRMSNorm",
    "build_projector",
    "rotary_tables",
]

"""The public ops: functions of tensors, with checks, gradients and an implementation a device behind each."""

from pyvlm.ops.attention import span_attention
from pyvlm.ops.cross_attention import local_cross_attention, resample, resize_positions, sincos_positions
from pyvlm.ops.fusion import merge_levels
from pyvlm.ops.gating import gated_activation
from pyvlm.ops.grids import fuse_grids, patches_to_token
from pyvlm.ops.linear import linear
from pyvlm.ops.loss import linear_cross_entropy
from pyvlm.ops.moe import Routing, expert_choice, merge_routings, threshold_choice, token_choice
from pyvlm.ops.moe_choices import routing_from_choices
from pyvlm.ops.moe_experts import expert_mlp, soft_moe
from pyvlm.ops.moe_losses import (
    balance_bias,
    importance_loss,
    load_balancing_loss,
    load_loss,
    router_z_loss,
)
from pyvlm.ops.norm import rms_norm
from pyvlm.ops.placement import add_at_image_tokens, pack_image_tokens, place_image_tokens
from pyvlm.ops.tiling import (
    anyres_grid,
    anyres_index,
    anyres_tokens,
    letterbox_masks,
    pixel_shuffle_index,
    pixel_unshuffle_index,
)

__all__ = [
    "Routing",
    "add_at_image_tokens",
    "anyres_grid",
    "anyres_index",
    "anyres_tokens",
    "balance_bias",
    "expert_choice",
    "expert_mlp",
    "fuse_grids",
    "gated_activation",
    "importance_loss",
    "letterbox_masks",
    "linear",
    "linear_cross_entropy",
    "load_balancing_loss",
    "load_loss",
    "local_cross_attention",
    "merge_levels",
    "merge_routings",
    "pack_image_tokens",
    "patches_to_token",
    "pixel_shuffle_index",
    "pixel_unshuffle_index",
    "place_image_tokens",
    "resample",
    "resize_positions",
    "rms_norm",
    "router_z_loss",
    "routing_from_choices",
    "sincos_positions",
    "soft_moe",
    "span_attention",
    "threshold_choice",
    "token_choice",
]

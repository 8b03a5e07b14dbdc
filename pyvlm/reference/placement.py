"""Putting image rows into the token sequence, in plain PyTorch: what `pyvlm.ops.placement` is held to.

Shapes: B samples · L tokens · H features · R image feature rows, C features each · S placeholders, counted
row-major over [B, L]. Under autocast rows may come in another dtype; the tensor that they go into decides.
"""

import torch
from torch import Tensor


def pack_image_tokens(features_RC: Tensor, index: Tensor, newline_C: Tensor | None = None) -> Tensor:
    """Row s is feature row `index[s]`, the newline row where that is −1; [S, k] lays k rows side by side."""
    # As the last row of the table the newline is what index −1 means.
    rows = (
        features_RC if newline_C is None else torch.cat([features_RC, newline_C[None].to(features_RC.dtype)])
    )
    return rows[index] if index.dim() == 1 else rows[index].flatten(1)


def place_image_tokens(
    text_BLH: Tensor,
    features_RC: Tensor,
    image_mask_BL: Tensor,
    index: Tensor | None = None,
    newline_C: Tensor | None = None,
) -> Tensor:
    """The text embeddings with the s-th placeholder replaced by the s-th packed image row."""
    rows_SH = features_RC if index is None else pack_image_tokens(features_RC, index, newline_C)
    positions_S = _positions(image_mask_BL, rows_SH)
    placed = text_BLH.flatten(0, 1).index_copy(0, positions_S, rows_SH.to(text_BLH.dtype))
    return placed.view(text_BLH.shape)


def add_at_image_tokens(hidden_BLH: Tensor, updates_SH: Tensor, image_mask_BL: Tensor) -> Tensor:
    """The hidden states with the s-th update added at the s-th image token."""
    positions_S = _positions(image_mask_BL, updates_SH)
    added = hidden_BLH.flatten(0, 1).index_add(0, positions_S, updates_SH.to(hidden_BLH.dtype))
    return added.view(hidden_BLH.shape)


def _positions(image_mask_BL: Tensor, rows_SH: Tensor) -> Tensor:
    # The number of rows is known on the host, so that the placeholders are found without a host sync.
    return torch.nonzero_static(image_mask_BL.flatten(), size=rows_SH.shape[0]).squeeze(1)

"""Span attention as a user would write it: dense masks, and every step in the dtype of the inputs.

It is what the tolerance policy measures kernels against, and what they are to be faster than.
Shapes: B batch, H query heads, Q queries, K keys, D head dimension, S softmaxes (2 where separate, else 1).
"""

import torch
from torch import Tensor

from pyvlm.layout import AttentionSpans
from pyvlm.reference.attention import span_attention as reference


def plain_attention(
    q_BHQD: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, H, Q, D] and lse [B, H, S, Q], both in the dtype of q."""
    group = q_BHQD.shape[1] // k.shape[1]
    k_BHKD, v_BHKD = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s_BHQK = q_BHQD @ k_BHKD.mT * (q_BHQD.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s_BHQK = softcap * torch.tanh(s_BHQK / softcap)
    dense_BRQK = spans.dense()
    masks = dense_BRQK.unbind(1) if spans.separate else (dense_BRQK.any(1),)
    out, lse = torch.zeros_like(q_BHQD), []
    for mask_BQK in masks:
        mask_B1QK = mask_BQK.unsqueeze(1)
        empty_B1Q1 = ~mask_B1QK.any(-1, keepdim=True)
        s_masked = s_BHQK.masked_fill(~(mask_B1QK | empty_B1Q1), -torch.inf)
        out = out + s_masked.softmax(-1).masked_fill(empty_B1Q1, 0) @ v_BHKD
        lse.append(s_masked.logsumexp(-1).masked_fill(empty_B1Q1.squeeze(-1), -torch.inf))
    return out, torch.stack(lse, 2)


def results(
    attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    out_grad: Tensor,
    lse_grad: Tensor,
    **options,
) -> dict[str, Tensor]:
    """out, lse, and dq, dk, dv for cotangents of out and (where it is finite) lse, of one implementation."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, spans, **options)
    finite = lse.detach().isfinite()
    grads = torch.autograd.grad(
        (out, lse), (q, k, v), (out_grad.to(out.dtype), torch.where(finite, lse_grad, 0).to(lse.dtype))
    )
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def expected_and_plain(
    q: Tensor, k: Tensor, v: Tensor, spans: AttentionSpans, out_grad: Tensor, lse_grad: Tensor, **options
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`results` of the reference in float64 and of plain PyTorch in the dtype of the inputs."""
    expected = results(reference, q.double(), k.double(), v.double(), spans, out_grad, lse_grad, **options)
    return expected, results(plain_attention, q, k, v, spans, out_grad, lse_grad, **options)

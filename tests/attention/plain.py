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
    sinks_H: Tensor | None = None,
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
        if sinks_H is None:
            empty_B1Q1 = ~mask_B1QK.any(-1, keepdim=True)
            s_masked = s_BHQK.masked_fill(~(mask_B1QK | empty_B1Q1), -torch.inf)
            p_BHQK = s_masked.softmax(-1).masked_fill(empty_B1Q1, 0)
            lse.append(s_masked.logsumexp(-1).masked_fill(empty_B1Q1.squeeze(-1), -torch.inf))
        else:  # one more column, which softmax takes part in and values do not; no row is empty
            column_BHQ1 = sinks_H.to(q_BHQD.dtype)[:, None, None].expand(*q_BHQD.shape[:3], 1)
            s_masked = torch.cat([s_BHQK.masked_fill(~mask_B1QK, -torch.inf), column_BHQ1], -1)
            p_BHQK = s_masked.softmax(-1)[..., :-1]
            lse.append(s_masked.logsumexp(-1))
        out = out + p_BHQK @ v_BHKD
    return out, torch.stack(lse, 2)


def results(
    attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    out_grad: Tensor,
    lse_grad: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    **options,
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv (and dsinks) of one implementation, for cotangents of out and of finite lse."""
    inputs = {"dq": q, "dk": k, "dv": v, "dsinks": sinks}
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in inputs.items()}
    q, k, v, sinks = leaves.values()
    out, lse = attention(q, k, v, spans, scale, softcap, sinks, **options)
    finite = lse.detach().isfinite()
    cotangents = (out_grad.to(out.dtype), torch.where(finite, lse_grad, 0).to(lse.dtype))
    leaves = {name: x for name, x in leaves.items() if x is not None}
    grads = torch.autograd.grad((out, lse), list(leaves.values()), cotangents)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, grads, strict=True))}


def expected_and_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    out_grad: Tensor,
    lse_grad: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`results` of the reference in float64 and of plain PyTorch in the dtype of the inputs."""
    wide = (q.double(), k.double(), v.double(), spans, out_grad, lse_grad, scale, softcap)
    expected = results(reference, *wide, sinks=None if sinks is None else sinks.double())
    plain = results(plain_attention, q, k, v, spans, out_grad, lse_grad, scale, softcap, sinks)
    return expected, plain

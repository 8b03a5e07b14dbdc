"""Span attention in plain PyTorch, the whole mask and all scores in memory: the definition to test against.

Shapes: B batch, H query heads, G key-value heads, Q queries, K keys, D head size, R ranges a query.
"""

import torch
from torch import Tensor

from pyvlm._autocast import without_autocast
from pyvlm.layout import AttentionSpans


def span_attention(
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    spans: AttentionSpans,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query to the keys of its spans; differentiable.

    Query head h uses key-value head h // (H // G). Scores are q·k·scale (1/√D where None); with a softcap c
    they become c·tanh(score/c) (Gemma 2, arXiv 2408.00118). Joint spans take one softmax over the union of a
    query's sets; separate spans one a range, and add up the results (multimodal causal attention,
    DeepSpeed-VisualChat, arXiv 2309.14327). A sink is one more score in every softmax of its head, with no
    value (gpt-oss, arXiv 2508.10925). An empty set contributes 0, with lse −inf (or the sink) and gradient 0.
    All is computed in float32, or in float64 for float64 inputs, under autocast too.

    Returns:
        out [B, H, Q, D] in the dtype of q, and lse [B, H, R or 1 where joint, Q] in the dtype computed in.
    """
    with without_autocast(q_BHQD.device):
        heads, kv_heads, head_dim = q_BHQD.shape[1], k_BGKD.shape[1], q_BHQD.shape[-1]
        dtype = torch.promote_types(q_BHQD.dtype, torch.float32)
        k_BHKD, v_BHKD = (x.to(dtype).repeat_interleave(heads // kv_heads, dim=1) for x in (k_BGKD, v_BGKD))
        s_BHQK = q_BHQD.to(dtype) @ k_BHKD.mT * (head_dim**-0.5 if scale is None else scale)
        if softcap is not None:
            s_BHQK = softcap * torch.tanh(s_BHQK / softcap)
        sees_BRQK = spans.dense() if spans.separate else spans.dense().any(1, keepdim=True)
        empty_BRQ1 = ~sees_BRQK.any(-1, keepdim=True)
        hidden_BRQK = ~(sees_BRQK | empty_BRQ1)  # a row of nothing but −inf would have NaN gradients
        s_BHRQK = s_BHQK.unsqueeze(2).masked_fill(hidden_BRQK.unsqueeze(1), -torch.inf)
        lse_BHRQ1 = s_BHRQK.logsumexp(-1, keepdim=True)
        empty_BHRQ1 = empty_BRQ1.unsqueeze(1).expand_as(lse_BHRQ1)
        sinks_BHRQ1 = torch.full_like(lse_BHRQ1, -torch.inf)
        if sinks_H is not None:
            sinks_BHRQ1 = sinks_H.to(dtype)[:, None, None, None].expand_as(lse_BHRQ1)
            lse_BHRQ1 = torch.logaddexp(lse_BHRQ1, sinks_BHRQ1)
        p_BHQK = (s_BHRQK - lse_BHRQ1).exp().masked_fill(empty_BHRQ1, 0).sum(2)
        lse_BHRQ = torch.where(empty_BHRQ1, sinks_BHRQ1, lse_BHRQ1).squeeze(-1)
        return (p_BHQK @ v_BHKD).to(q_BHQD.dtype), lse_BHRQ

"""Mixture of experts: losses that keep a router balanced and small, and the bias that needs none.

Shape legend
    T tokens · E experts
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvlm.ops._moe_checks import check_logits, check_top_k
from pyvlm.reference import moe as reference


def load_balancing_loss(
    logits: Tensor, top_k: int, form: Literal["deepspeed", "transformers"] = "deepspeed"
) -> Tensor:
    """The loss that keeps token choice balanced: E · Σ_e (share of tokens that chose e) · (mean p of e).

    Choices are counted before any drop, and only the mean p has a gradient. "transformers" counts all top_k
    choices, so that perfect balance gives top_k. "deepspeed" gives 1 there: up to top_k = 2 it counts first
    choices alone (`top1gating`, `top2gating`), above that all of them, divided by top_k (`topkgating`).

    Switch Transformers (arXiv 2101.03961).

    Args:
        logits: [T, E] of the tokens that count; of several layers, concatenated, for transformers' joint
            loss.
        top_k: experts a token chooses, 1 to E.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 where there are no tokens.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, top_k outside 1 to E, an unknown form, or logits as in `token_choice`.
    """
    check_logits(logits)
    check_top_k(top_k, logits)
    if form not in ("deepspeed", "transformers"):
        raise ValueError(f'form={form!r} is unknown; expected "deepspeed" or "transformers"')
    num_tokens, num_experts = max(len(logits), 1), logits.shape[1]
    counted = 1 if form == "deepspeed" and top_k <= 2 else top_k
    prob = reference.router_probabilities(logits)
    # Not by bincount, which waits for the device.
    chosen = F.one_hot(reference.top_choices(prob, counted), num_experts).sum((0, 1))
    loss = num_experts * (prob.sum(0) * chosen).sum() / num_tokens**2
    return loss / counted if form == "deepspeed" else loss


def importance_loss(logits: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' importance, Σ_t p[t, e]: 0 where all weigh the same.

    Outrageously Large Neural Networks (arXiv 1701.06538), with the variance over E experts, not E − 1.

    Args:
        logits: [T, E].

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 where there are no tokens.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, or logits as in `token_choice`.
    """
    check_logits(logits)
    share = reference.router_probabilities(logits).sum(0) / max(len(logits), 1)
    return (share * logits.shape[1]).var(correction=0)


def load_loss(logits: Tensor, noisy_logits: Tensor, top_k: int, noise_std: float) -> Tensor:
    """Squared coefficient of variation of the experts' smooth load, under noisy token choice.

    The load of e is the mean over tokens of P(logits[t, e] + new noise ≥ the top_k-th largest of
    noisy_logits[t]): how many would choose e if its noise alone were drawn again. 0 where all have the same.

    Scaling Vision with Sparse Mixture of Experts (arXiv 2106.05974).

    Args:
        logits: [T, E].
        noisy_logits: [T, E], the logits plus normal noise of standard deviation `noise_std`.
        top_k: experts a token chooses, 1 to E.
        noise_std: above 0; V-MoE has 1 / E.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 where there are no tokens.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, top_k outside 1 to E, a noise_std that is not above 0, or logits as in
            `token_choice`.
    """
    check_logits(logits)
    check_logits(noisy_logits)
    check_top_k(top_k, logits)
    if noisy_logits.shape != logits.shape:
        raise ValueError(
            f"noisy_logits must be {list(logits.shape)} as the logits are, got {list(noisy_logits.shape)}"
        )
    if not noise_std > 0:
        raise ValueError(f"noise_std must be above 0, got {noise_std}")
    dtype = reference.accumulation_dtype(logits.dtype)
    needed = noisy_logits.to(dtype).topk(top_k).values[:, -1:]
    load = torch.special.ndtr((logits.to(dtype) - needed) / noise_std).sum(0) / max(len(logits), 1)
    return load.var(correction=0) / load.mean().square().clamp(min=torch.finfo(dtype).tiny)


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)²: keeps the router's logits small.

    ST-MoE (arXiv 2202.08906).

    Args:
        logits: [T, E].

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 where there are no tokens.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, or logits as in `token_choice`.
    """
    check_logits(logits)
    z = logits.to(reference.accumulation_dtype(logits.dtype)).logsumexp(-1)
    return z.square().sum() / max(len(logits), 1)


def balance_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The next `bias` of `token_choice`, in place of a loss: up for experts below the mean load, else down.

    bias_e + rate · sign(mean(counts) − counts_e). Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664).

    Args:
        bias: [E].
        counts: [E], the tokens that each expert got.
        rate: the step; the paper uses 0.001.

    Raises:
        ValueError: bias and counts are not both [E].
    """
    if bias.dim() != 1 or bias.shape != counts.shape:
        raise ValueError(
            f"bias and counts must both be [experts], got {list(bias.shape)} and {list(counts.shape)}"
        )
    counts = counts.to(bias.dtype)
    return bias + rate * (counts.mean() - counts).sign()

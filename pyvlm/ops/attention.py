"""Attention whose mask is a few integers a query: the public op, its schema's fake kernel and its gradient.

Shapes: B batch, H query heads, G key/value heads, I queries, J keys, D head dimension, R ranges a query
(1 or 2), S streams (R where the softmaxes are separate, else 1).
"""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyvlm import _native
from pyvlm._autocast import autocasts
from pyvlm.layout import AttentionSpans
from pyvlm.ops._backends import refuse_second_derivative, resolve, triton_function
from pyvlm.reference import attention as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query over the keys in its ranges that are of the ranges' classes.

    Where `spans.separate` is false, one softmax runs over the union of a query's ranges; where it is true,
    each range has its own softmax and the results are summed (multimodal causal attention,
    DeepSpeed-VisualChat, arXiv 2309.14327). A query that sees nothing gets 0 and an lse of −inf. Tiles that
    no query sees are skipped. Sums are in fp32 (fp64 for fp64 inputs). The gradient is bitwise deterministic.
    Inputs must be finite, keys that nobody sees included: 0 times NaN is NaN.

    Args:
        q: `[B, H, I, D]`, fp32, bf16, fp16 or fp64, any strides.
        k: `[B, G, J, D]` of q's dtype; H is a multiple of G, and query head h reads key head `h // (H // G)`.
        v: `[B, G, J, D]` of q's dtype.
        spans: who sees whom, from `TokenLayout.spans` or built by hand.
        scale: multiplies the scores; `D ** -0.5` where None.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2, arXiv 2408.00118); off where None.
        sinks: `[H]`, floating: one more score in every softmax of that head, with no value, so that the
            weights of a row need not add up to 1 (gpt-oss, arXiv 2508.10925; `s_aux` in transformers). It is
            neither scaled nor capped. A query that sees nothing gets 0 and the sink as its lse. None: no
            sinks.
        return_lse: also return the natural log of each softmax's denominator, with a gradient.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        out `[B, H, I, D]` of q's dtype and memory order; with `return_lse` also lse `[B, H, S, I]` in fp32
        (fp64 for fp64 inputs).

    Raises:
        TypeError: a dtype is not supported, or q, k and v differ in dtype.
        ValueError: shapes, devices or the spans do not fit together, or a number is out of range.
        RuntimeError: the named backend is not available.
    """
    _check_arguments(q, k, v, spans, scale, softcap, sinks)
    if autocasts(q.device) and q.dtype != torch.float64:  # as torch's own ops do
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    implementation = resolve("span_attention", backend, q.device, q.dtype)
    if implementation == "reference":
        out, lse = reference.span_attention(q, k, v, spans, scale, softcap, sinks)
    else:
        interpreted = implementation == "triton" and q.device.type == "cpu"
        op = _InterpretedTriton.apply if interpreted else torch.ops.pyvlm.span_attention
        out, _, lse = op(
            q,
            k,
            v,
            spans.bounds,
            spans.key_class,
            spans.range_classes,
            spans.separate,
            scale,
            softcap or 0.0,
            sinks,
        )
    return (out, lse) if return_lse else out


def _check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    if not isinstance(spans, AttentionSpans):
        raise TypeError(
            f"spans is a {type(spans).__name__}; expected AttentionSpans, as TokenLayout.spans(rule) gives"
        )
    if not all(isinstance(x, Tensor) for x in (q, k, v)):
        given = ", ".join(type(x).__name__ for x in (q, k, v))
        raise TypeError(f"q, k, v are {given}; expected tensors")
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(
            f"q, k, v have {q.dim()}, {k.dim()} and {v.dim()} dimensions; "
            "expected 4: [batch, heads, tokens, head_dim]"
        )
    if not (q.dtype == k.dtype == v.dtype or autocasts(q.device)):
        raise TypeError(
            f"q, k, v are {q.dtype}, {k.dtype} and {v.dtype}; expected one dtype: convert them first"
        )
    if not {q.dtype, k.dtype, v.dtype} <= set(DTYPES):
        raise TypeError(
            f"q, k, v are {q.dtype}, {k.dtype} and {v.dtype}; expected one of {', '.join(map(str, DTYPES))}"
        )
    devices = {t.device for t in (q, k, v, spans.bounds, spans.key_class)}
    if len(devices) > 1:
        raise ValueError(
            f"q, k, v, spans.bounds and spans.key_class lie on {q.device}, {k.device}, {v.device}, "
            f"{spans.bounds.device} and {spans.key_class.device}; expected one device: move them with .to()"
        )
    batch, heads, queries, head_dim = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; "
            f"expected k and v [{batch}, G, keys, {head_dim}]"
        )
    groups, keys = k.shape[1], k.shape[2]
    if groups == 0 or heads % groups != 0:
        raise ValueError(
            f"q has {heads} heads and k, v have {groups}; expected a multiple of the key/value heads"
        )
    if head_dim == 0:
        raise ValueError("head_dim is 0; expected at least 1")
    if spans.bounds.shape[:2] != (batch, queries):
        raise ValueError(
            f"spans are for {list(spans.bounds.shape[:2])} queries [batch, queries] and q has "
            f"{[batch, queries]}; make them with the query_start and num_queries of this call"
        )
    if spans.key_class.shape != (batch, keys):
        raise ValueError(
            f"spans are for {list(spans.key_class.shape)} keys [batch, keys] and k, v have {[batch, keys]}; "
            "make them from the layout of all keys, cached ones included"
        )
    if scale is not None and not abs(float(scale)) < float("inf"):
        raise ValueError(f"scale={scale}; expected a finite number, or None for head_dim ** -0.5")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap}; expected a positive number, or None for no cap")
    if sinks is not None:
        if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
            given = str(sinks.dtype) if isinstance(sinks, Tensor) else type(sinks).__name__
            raise TypeError(f"sinks is {given}; expected a floating tensor, one value a query head")
        if sinks.shape != (heads,):
            raise ValueError(f"sinks is {list(sinks.shape)}; expected [{heads}], one value a query head")
        if sinks.device != q.device:
            raise ValueError(f"sinks lies on {sinks.device} and q on {q.device}; move it with .to()")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    key_class: Tensor,
    range_classes: list[int],
    separate: bool,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    streams = len(range_classes) if separate else 1
    batch, heads, queries, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    stream_out = torch.empty_like(q) if streams == 2 else q.new_empty(0)
    return torch.empty_like(q), stream_out, q.new_empty((batch, heads, streams, queries), dtype=lse_dtype)


def _fake_backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = args[6]
    grad_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), grad_sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, bounds, key_class, ctx.range_classes, ctx.separate, ctx.scale, ctx.softcap, sinks = inputs
    # The first stream's own output is for the backward alone: it and the sum give each stream's dO·o_r.
    out, stream_out, lse = output
    ctx.mark_non_differentiable(stream_out)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bounds, key_class, sinks, out, stream_out, lse)


def _backward(
    ctx: Any, grad_out: Tensor | None, _: None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    return _gradients(torch.ops.pyvlm.span_attention_backward, ctx, grad_out, grad_lse)


def _gradients(
    op: Callable[..., tuple[Tensor, ...]], ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    q, k, v, bounds, key_class, sinks, out, stream_out, lse = ctx.saved_tensors
    *grads, grad_sinks = op(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        bounds,
        key_class,
        ctx.range_classes,
        ctx.separate,
        ctx.scale,
        ctx.softcap,
        sinks,
        out,
        stream_out,
        lse,
    )
    return (*grads, None, None, None, None, None, None, None if sinks is None else grad_sinks)


_triton = triton_function("attention", "span_attention")
_triton_backward = triton_function("attention", "span_attention_backward")


class _InterpretedTriton(torch.autograd.Function):
    """The Triton kernels on CPU tensors, in Triton's interpreter: torch's CPU kernels are the native ones."""

    forward = staticmethod(_triton)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, _: None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return _gradients(_triton_backward, ctx, grad_out, grad_lse)


if _native.C is not None:  # it defines the schemas
    torch.library.impl("pyvlm::span_attention", "CUDA", _triton)
    torch.library.impl("pyvlm::span_attention_backward", "CUDA", _triton_backward)
    torch.library.register_fake("pyvlm::span_attention", _fake)
    torch.library.register_fake("pyvlm::span_attention_backward", _fake_backward)
    torch.library.register_autograd("pyvlm::span_attention", _backward, setup_context=_setup_context)
    refuse_second_derivative("span_attention")

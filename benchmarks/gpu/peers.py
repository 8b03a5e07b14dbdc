"""What pyvlm is measured against on a GPU alone, beside the peers that every device has.

Shapes: Q queries, K keys, T tokens, S slots (token, expert), E experts, H hidden, I intermediate.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from attention.plain import plain_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import fusion, grids, moe, norm, placement, resample, routing
from benchmarks.harness.workload import Function, Operation, Provider, Unavailable, Workload

_MOST_SCORES = 8 * 2**30  # bytes of one dense matrix of scores that the compiled eager form may make


def with_peers(operation: Operation) -> Operation:
    """The op family with its peers on a GPU."""
    return replace(operation, providers=(*operation.providers, *_PEERS.get(operation.name, ())))


def _plain_causal(work: Workload) -> None:
    mask = work.payload
    documents = int(mask.spans.bounds[..., 0].max()) > 0
    queries, keys = work.inputs[0].shape[2], work.inputs[1].shape[2]
    if (
        not work.shape.endswith(" causal")
        or documents
        or queries != keys
        or mask.softcap
        or mask.sinks is not None
    ):
        raise Unavailable("it has no mask but the causal one of one document")


def _sdpa_backend(work: Workload, backend: SDPBackend) -> Function:
    if work.device.type != "cuda":
        raise Unavailable("it runs on CUDA tensors only")
    _plain_causal(work)
    scale = work.payload.scale

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )

    return run


def _flash(work: Workload) -> Function:
    return _sdpa_backend(work, SDPBackend.FLASH_ATTENTION)


def _cudnn(work: Workload) -> Function:
    return _sdpa_backend(work, SDPBackend.CUDNN_ATTENTION)


def _compiled_attention(work: Workload) -> Function:
    mask, (q, k, _) = work.payload, work.inputs
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
    if scores > _MOST_SCORES:
        raise Unavailable(f"its scores would be {scores / 2**30:.0f} GiB")
    torch.compiler.reset()
    options = (mask.spans, mask.scale, mask.softcap, mask.sinks)
    return torch.compile(lambda q, k, v: plain_attention(q, k, v, *options)[0])


def grouped_product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of each expert times its matrix [E, out, in]: torch's own grouped product."""
    product = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    return product(rows, weight.transpose(-2, -1), offs=offsets)


def _glue(work: Workload) -> Function:
    """Gather, two grouped products, and a sum over each token's slots: `torch._grouped_mm` with its glue."""
    routing = work.payload.routing
    token_S, offsets_E = routing.token.long(), routing.expert_offsets[1:].contiguous()

    def run(x_TH: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate_SI, up_SI = grouped_product(x_TH[token_S], gate_up, offsets_E).chunk(2, -1)
        out_SH = grouped_product(F.silu(gate_SI) * up_SI, down, offsets_E)
        weighted_SH = out_SH.float() * routing.weight[:, None]
        return torch.zeros_like(x_TH, dtype=torch.float32).index_add(0, token_S, weighted_SH).to(x_TH.dtype)

    return run


def _compiled_glue(work: Workload) -> Function:
    torch.compiler.reset()
    return torch.compile(_glue(work))


def _compiled(operation: Operation, name: str, called: str = "compile") -> Provider:
    """One of an op's peers, compiled."""
    (eager,) = (provider for provider in operation.providers if provider.name == name)

    def build(work: Workload) -> Function:
        torch.compiler.reset()
        return torch.compile(eager.build(work))

    return Provider(called, build)


def _of_liger(name: str, work: Workload) -> Any:
    """Liger's function of that name."""
    if work.device.type != "cuda":
        raise Unavailable("it runs on CUDA tensors only")
    try:
        from liger_kernel.transformers import functional
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not installed: {error}") from error
    return getattr(functional, name)


def _liger_loss(work: Workload) -> Function:
    loss, labels = _of_liger("liger_fused_linear_cross_entropy", work), work.payload
    return lambda hidden, weight: loss(hidden, weight, labels)


def _liger_norm(work: Workload) -> Function:
    if work.payload.unit_offset:
        raise Unavailable("with an offset it multiplies in float32; not written here")
    rms_norm = _of_liger("liger_rms_norm", work)
    # Not in place, which would overwrite the gradient that every round gives it.
    return lambda x, weight: rms_norm(x, weight, norm.EPS, in_place=False)


def _liger_gate(work: Workload) -> Function:
    if work.payload.activation != "silu" or not work.payload.gated:
        raise Unavailable("it is the gate of Llama alone")
    return _of_liger("liger_swiglu", work)


_PEERS: dict[str, tuple[Provider, ...]] = {
    "attention": (
        Provider("flash", _flash),
        Provider("cudnn", _cudnn),
        Provider("compile", _compiled_attention),
    ),
    "moe": (
        Provider("glue", _glue),
        Provider("compile", _compiled_glue),
        _compiled(moe.OPERATION, "grouped_mm", "compile grouped_mm"),
    ),
    "fusion": (_compiled(fusion.OPERATION, "collapse", "compile collapse"),),
    "placement": (_compiled(placement.OPERATION, "index_copy", "compile index_copy"),),
    "routing": (_compiled(routing.OPERATION, "eager"),),
    "grids": (_compiled(grids.OPERATION, "concatenated"),),
    "resample": (_compiled(resample.OPERATION, "eager"),),
    "loss": (Provider("liger", _liger_loss),),
    "norm": (_compiled(norm.OPERATION, "F.rms_norm", "compile F.rms_norm"), Provider("liger", _liger_norm)),
    "gating": (Provider("liger", _liger_gate),),
}

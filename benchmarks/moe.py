"""Experts beside transformers' grouped products and a loop over experts.

Shapes: T tokens, S slots (token, expert), E experts, K experts a token, H hidden, I intermediate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from moe.cases import CASES, ExpertCase
from torch import Tensor

from benchmarks.harness.workload import (
    FORWARD,
    TRAINING,
    Cost,
    Function,
    Operation,
    Provider,
    Unavailable,
    Workload,
    large_or_named,
)
from pyvlm.ops import Routing, expert_mlp


@dataclass(frozen=True)
class Layer:
    case: ExpertCase
    logits_TE: Tensor
    routing: Routing


def workload(case: ExpertCase, device: torch.device, dtype: torch.dtype) -> Workload:
    logits_TE = case.logits().to(device)
    routing = case.route(logits_TE)
    x_TH, gate_up, down = (tensor.to(device) for tensor in case.inputs(dtype))
    slots = len(routing.token)
    used = int((routing.expert_offsets.diff() > 0).sum())
    # Three products, gate, up and down, of one multiplication and one addition each.
    flops = 2 * 3 * slots * case.hidden * case.intermediate
    tokens_bytes, weights_bytes = x_TH.nbytes, (gate_up.nbytes + down.nbytes) * used // case.experts
    costs = {FORWARD: Cost(flops, 2 * tokens_bytes + weights_bytes)}
    if not case.decode:
        # Two products in the backward for one in the forward; it reads x, dy and the weights, writes dx and
        # all the weights' gradients.
        all_weights = gate_up.nbytes + down.nbytes
        costs[TRAINING] = Cost(3 * flops, 5 * tokens_bytes + 2 * weights_bytes + all_weights)
    sizes = f"T{case.tokens} H{case.hidden} I{case.intermediate} E{case.experts} K{case.top_k}"
    return Workload(
        case=case.name,
        reason=case.reason,
        shape=f"{sizes} {case.router}",
        dtype=dtype,
        inputs=(x_TH, gate_up, down),
        cotangent=torch.randn(x_TH.shape, generator=torch.Generator().manual_seed(3)).to(device, dtype),
        costs=costs,
        terms=(0.0, 0.0, 0.0, 0.0),
        payload=Layer(case, logits_TE, routing),
        cold=case.decode,
    )


def _experts(backend: str, work: Workload) -> Function:
    routing = work.payload.routing
    return lambda x, gate_up, down: expert_mlp(x, routing, gate_up, down, backend=backend)


def _pyvlm(work: Workload) -> Function:
    # The kernel is named: "auto" might fall back, and the time of a fallback would stand in the kernel's row.
    return _experts("native" if work.device.type == "cpu" else "triton", work)


def _routed(work: Workload) -> Function:
    """The router's choice and the experts: what it takes longer than pyvlm's row is the routing's share."""
    layer, experts = work.payload, "native" if work.device.type == "cpu" else "triton"

    def run(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return expert_mlp(x, layer.case.route(layer.logits_TE), gate_up, down, backend=experts)

    return run


def _transformers(work: Workload) -> Function:
    """transformers' own layer of experts (Mixtral's), on torch's grouped products."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    case, routing = work.payload.case, work.payload.routing
    if case.router != "token_choice":
        raise Unavailable("transformers' experts take the same number of experts for every token")
    config = MixtralConfig(
        hidden_size=case.hidden, intermediate_size=case.intermediate, num_local_experts=case.experts
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = MixtralExperts(config)
    slot_TK = routing.slot.view(case.tokens, case.top_k).long()
    expert_TK, weight_TK = routing.expert[slot_TK], routing.weight[slot_TK]

    def run(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        weights = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(experts, weights, (x, expert_TK, weight_TK))

    return run


_loop: Callable[[Workload], Function] = partial(_experts, "reference")

OPERATION = Operation(
    name="moe",
    workloads=large_or_named(workload, CASES),
    case_names=tuple(case.name for case in CASES),
    providers=(
        Provider("pyvlm", _pyvlm),
        Provider("routed", _routed),
        Provider("grouped_mm", _transformers),
        Provider("loop", _loop),
    ),
    reference=_loop,
    plain=_loop,
)

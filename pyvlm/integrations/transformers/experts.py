"""transformers' experts interface served by `pyvlm.ops.expert_mlp`, as experts_implementation="pyvlm".

A mixture-of-experts model of transformers keeps its experts as two stacked weights, in pyvlm's layout, and
dispatches their forward through `ALL_EXPERTS_FUNCTIONS`. Its router stays as it is: the choices that it hands
over become a `Routing`.
"""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, activations
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from pyvlm.integrations.transformers.changes import Change
from pyvlm.ops import expert_mlp, routing_from_choices
from pyvlm.ops._backends import resolve

NAME = "pyvlm"
KERNEL = "pyvlm.ops.expert_mlp"

# transformers' own formulas of the tanh GELU differ in how they round, not in what they are.
_ACTIVATIONS: dict[type[nn.Module] | Callable[..., Tensor], Any] = {
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
    F.silu: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    nn.ReLU: "relu",
    F.relu: "relu",
    activations.ReLUSquaredActivation: "relu2",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def register() -> None:
    """Makes experts_implementation="pyvlm" known to transformers."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of an experts module of transformers.

    Args:
        module: of a class under transformers' `use_experts_implementation`.
        hidden_states: [T, H].
        top_k_index: int [T, K], the experts of each token. Under expert parallelism those from the number of
            this device's experts on are left to the other devices.
        top_k_weights: [T, K], what the experts' outputs are multiplied by.

    Returns:
        [T, H] in the dtype of hidden_states. Sums over a token's experts are made in float32.

    Raises:
        ValueError: the module's experts are not what `expert_mlp` computes; the message says in what.
    """
    experts: Any = module
    reason = why_unsupported(experts)
    if reason is not None:
        raise ValueError(
            f'{type(experts).__name__} cannot run under experts_implementation="{NAME}": {reason}; '
            'use "grouped_mm", "batched_mm" or "eager"'
        )
    # Read once: under a parametrisation, as peft's, every read computes the weight anew.
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    up, down = getattr(experts, up_name), experts.down_proj
    up_bias, down_bias = None, None
    if experts.has_bias:
        up_bias, down_bias = getattr(experts, f"{up_name}_bias"), experts.down_proj_bias
    # Before transformers had the flag, with several processes any index could be another device's.
    drop = getattr(experts, "_is_expert_parallel", None)
    if drop is None:
        drop = torch.distributed.is_available() and torch.distributed.is_initialized()
    y = expert_mlp(
        hidden_states,
        routing_from_choices(top_k_index, top_k_weights, down.shape[0], drop_out_of_range=drop),
        up,
        down,
        activation=activation_name(experts.act_fn),
        gated=experts.has_gate,
        gate_up_bias=up_bias,
        down_bias=down_bias,
    )
    return y.to(hidden_states.dtype)  # which autocast may have left


def why_unsupported(experts: Any) -> str | None:
    """What an experts module computes that `expert_mlp` does not, or None where it computes the same."""
    if experts.has_gate and type(experts)._apply_gate is not _default_apply_gate:
        return "its gate is one of its own (_apply_gate) in place of act_fn(gate) * up"
    if getattr(experts, "has_post_expert_norm", False):
        return "it normalises each expert's output before the sum over experts"
    if experts.is_transposed:
        return (
            "its weights lie as [experts, in, out], and to have them as [experts, out, in] they would be "
            "copied at every step"
        )
    if experts.has_gate and not experts.is_concatenated:
        return "the rows of its gate and up projections take turns, and would be copied apart at every step"
    if activation_name(experts.act_fn) is None:
        known = ", ".join(dict.fromkeys(_ACTIVATIONS.values()))
        return f"its activation {_name_of(experts.act_fn)} is none of {known}"
    return None


def apply(model: nn.Module) -> list[Change]:
    """Sets experts_implementation="pyvlm" for the experts of a model that `expert_mlp` can run.

    transformers keeps the setting in the config of the (sub-)model that the experts belong to, so that all
    experts of one config change or none.

    Returns:
        One `Change` for each experts module. Undoing any of them puts all experts of its config back.
    """
    changes = []
    by_config: dict[int, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if _is_on_interface(module):
            by_config.setdefault(id(module.config), {})[name] = module
        elif _has_stacked_experts(module):
            reason = f"{type(module).__name__} does not dispatch through transformers' experts interface"
            changes.append(Change(name, "experts", None, reason, None))
    for experts in by_config.values():
        changes += _change(model, experts)
    return changes


def _change(model: nn.Module, experts: dict[str, Any]) -> list[Change]:
    """Sets the experts of one config, or says of each why not."""
    config = next(iter(experts.values())).config
    before = config._experts_implementation
    reasons = {name: why_unsupported(module) or _why_no_kernel(module) for name, module in experts.items()}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    if not refused:
        undo = None if before == NAME else _set(model, config)
        if config._experts_implementation == NAME:
            return [Change(name, "experts", KERNEL, "", undo) for name in experts]
        refused = dict.fromkeys(experts, f"no part of the model lets {type(config).__name__} be set")
    first, its_reason = next(iter(refused.items()))
    changes = []
    for name, module in experts.items():
        reason = refused.get(name, f"it has its setting in common with {first}: {its_reason}")
        reason = f"{type(module).__name__} stays on {before!r}: {reason}"
        changes.append(Change(name, "experts", None, reason, None))
    return changes


def _set(model: nn.Module, config: Any) -> Callable[[], None] | None:
    """Sets pyvlm for one config; what puts it back, or None where transformers does not let it be set."""
    models = (m for m in model.modules() if isinstance(m, PreTrainedModel))
    owner = next((m for m in models if m.config is config), None)
    if owner is None:
        return None
    before = config._experts_implementation
    owner.set_experts_implementation({"": NAME})
    if config._experts_implementation != NAME:
        return None

    held = ref(owner)

    def undo() -> None:
        if (changed := held()) is not None:
            changed.set_experts_implementation({"": before})

    return undo


def _is_on_interface(module: nn.Module) -> bool:
    """Whether `use_experts_implementation` decorates the module's class: it sets these attributes."""
    return {"config", "has_gate", "has_bias", "is_transposed", "is_concatenated"} <= vars(module).keys()


def _has_stacked_experts(module: nn.Module) -> bool:
    parameters = (p for p in module._parameters.values() if p is not None)
    return "Expert" in type(module).__name__ and any(p.dim() == 3 for p in parameters)


def _why_no_kernel(experts: Any) -> str | None:
    down = experts.down_proj
    if down.dtype not in _DTYPES:
        return f"its weights are {down.dtype}, and expert_mlp takes floating-point ones"
    if resolve("expert_mlp", "auto", down.device, down.dtype) == "reference":
        return f"there is no kernel for {down.dtype} on {down.device.type}"
    return None


def activation_name(function: Any) -> Any:
    """The name that pyvlm's ops have for an activation, or None."""
    if type(function) is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    key = type(function) if isinstance(function, nn.Module) else function
    return _ACTIVATIONS.get(key)


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)

"""What `pyvlm.ops.moe` refuses, and what it says then."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyvlm.ops._checks import check_activation

if TYPE_CHECKING:
    from pyvlm.ops.moe import Routing


def check_logits(logits: Tensor) -> None:
    check_kind_of_logits(logits)
    check_values_of_logits(logits)


def check_kind_of_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        given = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a floating-point tensor, got {given}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits must be [tokens, experts] with at least one expert, got {list(logits.shape)}"
        )


def check_values_of_logits(logits: Tensor) -> None:
    if logits.device.type == "cpu":
        # NaN and +inf come through the maximum, and so does a row of nothing but -inf.
        bad = ~logits.detach().amax(dim=1).isfinite()
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{int(bad.sum())} of {len(logits)} rows of the logits hold NaN, +inf or nothing but -inf, "
                f"row {row} first ({logits[row].tolist()}): the training has diverged or the router's input "
                "is broken"
            )


def check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_top_k(top_k: int, logits: Tensor) -> None:
    check_positive_int("top_k", top_k)
    if top_k > logits.shape[1]:
        raise ValueError(f"top_k={top_k} is more than the {logits.shape[1]} experts that the logits score")


def check_expert_vector(name: str, vector: Tensor, logits: Tensor) -> None:
    if not vector.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {vector.dtype}")
    if vector.shape != logits.shape[1:] or vector.device != logits.device:
        raise ValueError(
            f"{name} must be [{logits.shape[1]}], one an expert, on {logits.device}, "
            f"got {list(vector.shape)} on {vector.device}"
        )


def check_values_of_expert_vector(name: str, vector: Tensor) -> None:
    if vector.device.type == "cpu" and vector.isnan().any():
        raise ValueError(f"{name} holds NaN for expert {int(vector.isnan().nonzero()[0])}")


def check_group_offsets(group_offsets: Tensor, logits: Tensor) -> None:
    check_integer("group_offsets", group_offsets)
    if group_offsets.dim() != 1 or len(group_offsets) == 0 or group_offsets.device != logits.device:
        raise ValueError(
            f"group_offsets must be [groups + 1] on {logits.device}, "
            f"got {list(group_offsets.shape)} on {group_offsets.device}"
        )


def check_capacities(capacity: Tensor, groups: int, logits: Tensor) -> None:
    check_integer("capacity", capacity)
    if capacity.shape != (groups,) or capacity.device != logits.device:
        raise ValueError(
            f"capacity must be an int or one a group, [{groups}] on {logits.device}, "
            f"got {list(capacity.shape)} on {capacity.device}"
        )


def check_values_of_groups(capacity: Tensor, group_offsets: Tensor, logits: Tensor) -> None:
    if logits.device.type != "cpu":
        return
    check_offset_values("group_offsets", group_offsets, len(logits), "rows of the logits")
    if (capacity < 1).any():
        raise ValueError(f"capacity must be at least 1 in every group, got {int(capacity.min())}")


def check_integer(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")


def check_offset_values(name: str, offsets: Tensor, end: int, what: str) -> None:
    if offsets[0] != 0 or offsets[-1] != end or (offsets.diff() < 0).any():
        raise ValueError(
            f"{name} must rise from 0 to {end}, the number of {what}, got {offsets[:8].tolist()}"
            f"{' …' if len(offsets) > 8 else ''} ending in {int(offsets[-1])}"
        )


def check_routing_values(routing: "Routing") -> None:
    if routing.token.device.type != "cpu":
        return
    slots = len(routing.token)
    check_offset_values("Routing.expert_offsets", routing.expert_offsets, slots, "slots")
    check_offset_values("Routing.token_offsets", routing.token_offsets, slots, "slots")
    for name, index, end in (("token", routing.token, routing.num_tokens), ("slot", routing.slot, slots)):
        if slots and not 0 <= int(index.min()) <= int(index.max()) < end:
            raise ValueError(
                f"Routing.{name} holds indices from {int(index.min())} to {int(index.max())}, "
                f"outside 0 to {end - 1}"
            )


def check_rows(rows: Tensor, routing: "Routing") -> None:
    check_integer("rows", rows)
    if rows.shape != (routing.num_tokens,):
        raise ValueError(
            f"rows must hold one row a token of its routing, [{routing.num_tokens}], got {list(rows.shape)}"
        )


def check_values_of_rows(rows: Tensor, num_tokens: int) -> None:
    if rows.device.type == "cpu" and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_tokens:
        raise ValueError(
            f"rows lie from {int(rows.min())} to {int(rows.max())}, outside the {num_tokens} of the whole"
        )


def check_choices(index: Tensor, weight: Tensor, num_experts: int) -> None:
    check_integer("index", index)
    check_positive_int("num_experts", num_experts)
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating-point, got {weight.dtype}")
    if index.dim() != 2 or index.shape[1] == 0:
        raise ValueError(f"index must be [tokens, choices] with a choice or more, got {list(index.shape)}")
    if weight.shape != index.shape or weight.device != index.device:
        raise ValueError(
            f"weight must be {list(index.shape)} on {index.device}, one a choice in index, "
            f"got {list(weight.shape)} on {weight.device}"
        )


def check_values_of_choices(index: Tensor, num_experts: int, drop_out_of_range: bool) -> None:
    if index.device.type != "cpu" or not len(index):
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or (high >= num_experts and not drop_out_of_range):
        raise ValueError(f"index holds experts from {low} to {high}, outside 0 to {num_experts - 1}")


def check_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    check_activation(activation)
    hidden = x.shape[-1]
    rows = "2 * intermediate" if gated else "intermediate"
    if (
        gate_up.dim() != 3
        or not len(gate_up)
        or gate_up.shape[2] != hidden
        or (gated and gate_up.shape[1] % 2)
    ):
        raise ValueError(f"gate_up must be [experts, {rows}, hidden {hidden}], got {list(gate_up.shape)}")
    experts, up_rows, _ = gate_up.shape
    expected = {
        "down": (down, (experts, hidden, up_rows // 2 if gated else up_rows)),
        "gate_up_bias": (gate_up_bias, (experts, up_rows)),
        "down_bias": (down_bias, (experts, hidden)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} beside gate_up {list(gate_up.shape)} "
                f"({rows} rows) and x {list(x.shape)}, got {list(tensor.shape)}"
            )
    for name, tensor in {
        "gate_up": gate_up,
        **{name: tensor for name, (tensor, _) in expected.items()},
    }.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
        if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{name} is {tensor.dtype} and x is {x.dtype}: convert one, or run under autocast"
            )

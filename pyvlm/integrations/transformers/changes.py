"""What an integration did to a part of a model, or why it did nothing."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One module of a model, and what it runs on now."""

    module: str  # dotted name in the model, "" for the model itself
    part: str  # "attention" | "experts" | "loss" | "linear" | "connector"
    kernel: str | None  # what it runs on now, as "pyvlm.ops.expert_mlp"; None: it stays as it was
    reason: str  # why it stays, or what the kernel changes ("" where there is nothing to say)
    undo: Callable[[], None] | None  # puts back exactly what was there

"""What was changed in a model, and what was not: the one record all features report with."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One module that runs on a kernel now, or the reason why it does not.

    Args:
        module: its dotted name in the model, "" for the model itself.
        part: "attention", "experts", "loss", "linear" or "connector".
        kernel: what it runs on now, as "pyvlm.ops.expert_mlp"; None where it stays as it was.
        reason: why it stays, or what the kernel changes; "" where there is nothing to say.
        undo: puts back exactly what was there; None where nothing was changed.
    """

    module: str
    part: str
    kernel: str | None
    reason: str
    undo: Callable[[], None] | None

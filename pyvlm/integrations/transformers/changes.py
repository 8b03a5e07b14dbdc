"""What `accelerate` did to a model, module by module, and how to take it back."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One module that pyvlm looked at: what it runs on now, or why it stays as it was.

    Attributes:
        module: its dotted name in the model, "" for the model itself.
        part: "attention", "experts", "mlp", "norm", "loss", "linear" or "connector".
        kernel: what it runs on now, as "pyvlm.ops.span_attention"; None: it stays as it was.
        reason: why it stays, or what there is to say about the kernel.
        undo: puts back exactly what was there. It holds its module weakly: what is noted of a model must not
            keep it alive.
    """

    module: str
    part: str
    kernel: str | None
    reason: str = ""
    undo: Callable[[], None] | None = None


class Report:
    """What `pyvlm.accelerate` did: `changes`, and as text a line for all layers that are alike."""

    def __init__(self, name: str, changes: Sequence[Change]) -> None:
        self.name = name
        self.changes = tuple(changes)

    def __str__(self) -> str:
        rows = [("module", "part", "runs on", "")]
        for change in self.changes:
            module = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", change.module) or "(model)"
            row = (module, change.part, change.kernel or "as before", change.reason)
            if row not in rows:
                rows.append(row)
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)) for row in rows]
        return "\n".join([self.name, *(line.rstrip() for line in lines)])

    __repr__ = __str__

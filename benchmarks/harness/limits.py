"""What the machine can do at most, measured in the same rounds as the ops: GEMM rate and copy bandwidth."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

GEMM, COPY = "gemm", "copy"


@dataclass(frozen=True)
class Limit:
    name: str
    call: Callable[[], object]
    amount: int  # FLOPs or bytes of one call
    what: str


def limits(device: torch.device, dtype: torch.dtype, quick: bool = False) -> tuple[Limit, Limit]:
    """`torch.mm` of square matrices of `dtype`, and a copy between two buffers that no cache holds.

    The matrices are random, as the inputs of the ops are: with zeros a Xeon with AMX is 15 % faster.

    A copy of n bytes counts 2n: n read and n written.
    """
    size, buffer_bytes = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    if quick:
        size, buffer_bytes = 256, 2**20
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    source = torch.ones(buffer_bytes // 4, device=device)
    target = torch.zeros_like(source)
    return (
        Limit(GEMM, lambda: torch.mm(a, b, out=c), 2 * size**3, f"torch.mm, {size} x {size}"),
        Limit(COPY, lambda: target.copy_(source), 2 * buffer_bytes, f"copy of {buffer_bytes >> 20} MiB"),
    )

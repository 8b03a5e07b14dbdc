"""How many operations a second a machine does at most: what utilisation is measured against.

Model-FLOP utilisation (PaLM, arXiv 2204.02311, appendix B) is the FLOPs that a model takes a second
(`pyvlm.training.flops`), divided by this. Only useful work counts: pairs of query and key that the mask
allows, rows that have a label, gradients that are needed; not what is computed again to save memory.
"""

import statistics
import time
from functools import cache

import torch


@cache
def measured_limit(device: torch.device, precision: str) -> float:
    """FLOPs a second of `torch.mm` of square matrices in a recipe's precision: the median of three runs."""
    size = 4096 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Random: zeros are multiplied faster. Of a generator of their own, so that no other draw changes.
    generator = torch.Generator(device).manual_seed(0)
    a, b, out = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(3))
    seconds = []
    for _ in range(4):  # the first one wakes everything up
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])

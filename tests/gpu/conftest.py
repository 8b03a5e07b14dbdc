"""Where a test of this folder runs: every body on the CPU, at small sizes, and on a GPU where there is one.

The GPU's alone: `pytest tests/gpu -k on-cuda`, which `python -m benchmarks.gpu` does.
"""

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from gpu.devices import on


@pytest.fixture(params=[on("cpu"), on("cuda")])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return request.param


@pytest.fixture(params=[on("cuda")])
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, for what a CPU does not have."""
    return request.param


@pytest.fixture(autouse=True)
def convolutions_in_float32() -> Iterator[None]:
    """Else cuDNN rounds the factors to 11 bits, in the patches of every encoder."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def fault_ends_the_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where a kernel has read or written outside, the GPU runs nothing more for this process.

    The test is to blame in which that happened, and the next ones need another worker, which xdist starts.
    """
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{request.node.nodeid}: {error}", file=sys.__stderr__, flush=True)
        os._exit(1)

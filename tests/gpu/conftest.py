"""Where a test of this folder runs: every body on the CPU, at small sizes, and on a GPU where there is one.

The GPU's alone: `pytest tests/gpu -k on-cuda`, which `python -m benchmarks.gpu` does.
"""

import pytest
import torch

NO_GPU = "there is no CUDA device here (torch.cuda.is_available() is False)"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)


@pytest.fixture(
    params=[
        pytest.param("cpu", id="on-cpu"),
        pytest.param("cuda", id="on-cuda", marks=needs_gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(params=[pytest.param("cuda", id="on-cuda", marks=needs_gpu)])
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, for what a CPU does not have."""
    return torch.device(request.param)

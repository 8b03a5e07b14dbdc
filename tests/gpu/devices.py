"""The CPU, and a GPU where there is one, as parameters of tests."""

from typing import Any

import pytest
import torch

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device here (torch.cuda.is_available() is False)"
)


def on(device: str, *values: Any, name: str = "") -> Any:
    """A parameter of a test on a device ("cpu" or "cuda"), whose id says so."""
    marks = needs_gpu if device == "cuda" else ()
    return pytest.param(torch.device(device), *values, id=f"on-{device}{name}", marks=marks)

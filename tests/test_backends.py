"""Which implementation "auto" takes: decided from device and dtype alone, so that no GPU need be there."""

import pytest
import torch

from pyvlm.ops._backends import resolve

KERNELS = ["span_attention", "expert_mlp", "merge_levels", "local_cross_attention", "linear_cross_entropy"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("op", KERNELS)
def test_auto_takes_the_kernel_of_the_device(op: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert resolve(op, "auto", CPU, torch.bfloat16) == "native"
    assert resolve(op, "auto", CUDA, torch.bfloat16) == "triton"


@pytest.mark.parametrize("op", KERNELS)
def test_auto_passes_by_kernels_that_lack_the_dtype(op: str) -> None:
    assert resolve(op, "auto", CPU, torch.float64) == "native"
    assert resolve(op, "auto", CUDA, torch.float64) == "reference"


def test_a_named_backend_is_that_or_an_error() -> None:
    with pytest.raises(RuntimeError, match="runs on cpu tensors only"):
        resolve("span_attention", "native", CUDA)
    with pytest.raises(ValueError, match="'fast' is unknown"):
        resolve("span_attention", "fast", CPU)

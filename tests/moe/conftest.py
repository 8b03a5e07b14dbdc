"""Fixtures of the MoE tests."""

import ctypes

import pytest
from emulated_cuda import compile_for_host


@pytest.fixture(params=["reference", "native"], scope="session")  # so that hypothesis may use it
def backend(request: pytest.FixtureRequest) -> str:
    """Every implementation that runs here. A native extension that is missing fails the tests, by design."""
    return request.param


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels of routings, for `emulated_cuda`."""
    return compile_for_host(tmp_path_factory.mktemp("cuda_host") / "routing_on_host.so")

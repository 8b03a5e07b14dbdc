"""Fixtures of the MoE tests."""

import pytest


@pytest.fixture(params=["reference", "native"], scope="session")  # so that hypothesis may use it
def backend(request: pytest.FixtureRequest) -> str:
    """Every implementation that runs here. A native extension that is missing fails the tests, by design."""
    return request.param

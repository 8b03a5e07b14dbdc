"""Fixtures of the attention tests."""

import pytest


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every implementation that runs here. A native extension that is missing fails the tests, by design."""
    return request.param

"""Fixtures of the whole suite: fixed seeds, poisoned memory for the kernels, the conformance folder."""

import os

# Several workers share the cores: threads that wait must not spin. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import conformance
import numpy as np
import pytest
import torch

if find_spec("hypothesis") is not None:  # tests/gpu runs without it
    from hypothesis import register_random, settings

    # No deadline: a first call compiles or warms up. Derandomised: a failure must come back on the next run.
    settings.register_profile("pyvlm", derandomize=True, deadline=None, print_blob=True)
    settings.load_profile("pyvlm")

    class TorchRandom:
        """torch's generator, which hypothesis seeds before an example, and where st.random_module() is drawn.

        Left alone, its numbers would depend on the examples before: what failed could not be drawn again.
        """

        seed = staticmethod(torch.manual_seed)
        getstate = staticmethod(torch.get_rng_state)
        setstate = staticmethod(torch.set_rng_state)

    TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference
    register_random(TORCH_RANDOM)

# torch's fp64 exp and log are off by 1e-9 in about one process of forty where their first call runs on
# several threads at once (MKL's vector functions start up then): the first call is made here, on one.
torch.zeros(8, dtype=torch.float64).exp().log()

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    import memory_checks
    import quick_interpreter

    quick_interpreter.install()
    memory_checks.install()

KERNEL_TESTS = ("attention", "moe", "fusion", "gpu")
# Of files that take the longest: they run other tests in a process of their own, or compile much.
LONGEST_TESTS = (
    "test_in_the_interpreter",
    "test_every_block_runs",
    "test_kernels_are_right_with_every_instruction_set",
    "test_machine_code",
    "test_compiled_models_agree",
    "test_a_kill_at_a_chosen_moment",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest begin first: at the end one worker would wait up to a minute for the other."""
    items.sort(key=lambda item: getattr(item, "originalname", item.name) not in LONGEST_TESTS)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python, NumPy and torch before every test."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the tests of kernels, memory that nobody wrote holds NaN (integers: the largest), in C++ too.

    It is a by-product of torch's deterministic mode, and elsewhere that mode could hide an op which is not.
    """
    if request.path.parent.name not in KERNEL_TESTS:
        yield
        return
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms imports torch's compiler: 3 s
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile has compiled nothing yet, and keeps nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def conformance_folder() -> Path:
    """The folder of stored outputs of the original authors' code; skips the test where it is missing."""
    reason = conformance.missing()
    if reason is not None:
        pytest.skip(reason)
    return conformance.FOLDER

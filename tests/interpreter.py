"""Runs tests of Triton kernels in Triton's interpreter: in a process of their own, since Triton settles at
its import whether it interprets."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def in_new_process(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with some arguments and environment variables, from the root of the repository."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def run_interpreted(tests: Path) -> None:
    """Fails unless all tests of a file pass in the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if version("triton").startswith("3.6.") and not version("numpy").startswith(
        ("1.", "2.0", "2.1", "2.2", "2.3")
    ):
        pytest.skip("the interpreter of Triton 3.6 makes numbers of arrays as numpy 2.4 no longer allows")
    run = in_new_process(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)], TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout + run.stderr

"""The Triton kernels of `linear_cross_entropy` in Triton's interpreter: runs
interpreted_linear_cross_entropy.py."""

from pathlib import Path

from interpreter import run_interpreted


def test_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_linear_cross_entropy.py"))

"""The Triton kernels of gated activations in Triton's interpreter: runs interpreted_gating.py."""

from pathlib import Path

from interpreter import run_interpreted


def test_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_gating.py"))

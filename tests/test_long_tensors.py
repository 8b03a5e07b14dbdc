"""Triton kernels on tensors of more than 2³¹ elements: runs interpreted_long_tensors.py."""

from pathlib import Path

from interpreter import run_interpreted


def test_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_long_tensors.py"))

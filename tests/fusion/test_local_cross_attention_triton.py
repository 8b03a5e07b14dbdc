"""Runs interpreted_local_cross_attention.py in the interpreter of Triton."""

from pathlib import Path

from interpreter import run_interpreted


def test_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_local_cross_attention.py"))

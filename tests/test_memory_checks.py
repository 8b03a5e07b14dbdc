"""The checks of memory in Triton's interpreter see planted faults: runs interpreted_memory_checks.py."""

from pathlib import Path

from interpreter import run_interpreted


def test_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_memory_checks.py"))

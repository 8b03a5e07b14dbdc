"""The Triton kernels in Triton's interpreter: runs interpreted_triton.py in a process of its own."""

from pathlib import Path

from interpreter import in_new_process, run_interpreted


def test_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_triton.py"))


CALL = """
import torch, pyvlm
x = torch.randn(1, 1, 3, 8, requires_grad=True)
spans = pyvlm.TokenLayout(torch.ones(1, 3, dtype=torch.uint8)).spans("causal")
pyvlm.ops.span_attention(x, x, x, spans{backend}).sum().backward()
"""


def test_on_cpu_the_op_does_not_import_triton() -> None:
    code = f"""
import sys, torch
before = "triton" in sys.modules
{CALL.format(backend="")}
assert ("triton" in sys.modules) == before and "pyvlm.triton_kernels.attention" not in sys.modules
"""
    run = in_new_process(["-c", code], TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr


def test_without_triton_everything_else_works() -> None:
    code = f"""
import sys
sys.modules["triton"] = None  # as if it were not installed
{CALL.format(backend="")}
print(pyvlm.build_info()["backends"])
{CALL.format(backend=', backend="triton"')}
"""
    run = in_new_process(["-c", code], TRITON_INTERPRET="1")
    assert "triton is not installed" in run.stdout
    assert 'backend="triton" cannot run on cpu: triton is not installed' in run.stderr


def test_without_the_interpreter_cpu_tensors_are_refused_with_the_reason() -> None:
    run = in_new_process(["-c", CALL.format(backend=', backend="triton"')], TRITON_INTERPRET="0")
    assert run.returncode != 0
    assert "on CPU only in Triton's interpreter: set TRITON_INTERPRET=1" in run.stderr

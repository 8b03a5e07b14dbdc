"""The native kernels of the other instruction sets that the extension holds, each in a process of its own."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

# The values of the op: every shared case, random spans, head sizes, tiles, sinks.
CHILD = """
import sys
import pytest
import pyvlm
isa = pyvlm.build_info()["native"]["isa"]
assert isa == sys.argv[1], f"the kernels run with {isa}"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/attention/test_span_attention.py",
                      "-k", "native or random_spans"]))
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="the extension has other instruction sets on x86 only",
)
@pytest.mark.parametrize(("forced", "isa"), [("avx2", "avx2"), ("default", "baseline")])
def test_the_op_is_right_with_every_instruction_set(forced: str, isa: str) -> None:
    if forced == "avx2" and not torch.cpu._is_avx2_supported():
        pytest.skip("this CPU has no AVX2")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": forced, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, isa], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-4000:]

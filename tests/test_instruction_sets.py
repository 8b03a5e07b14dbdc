"""The native kernels of the other instruction sets that the extension holds, each set in its own process."""

import os
import platform
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

from pyvlm import build_info
from pyvlm.ops import merge_levels

ROOT = Path(__file__).parents[1]

# The tests of the values, and which of them run native kernels.
TESTS = (
    ("tests/attention/test_span_attention.py", "native or random_spans"),
    ("tests/moe/test_moe_routing.py", "native"),
    ("tests/moe/test_moe_routing_native.py", "many or equal"),
    ("tests/moe/test_expert_mlp_native.py", "sizes or kinds or depth"),
    ("tests/fusion/test_merge_levels_native.py", "sizes or any_layout or means"),
    ("tests/fusion/test_local_cross_attention_native.py", "sizes or any_windows or caches"),
    ("tests/fusion/test_placement_native.py", "cases or any_mask or often"),
    ("tests/fusion/test_gated_activation.py", "activation or views or any_sizes"),
    ("tests/fusion/test_linear_native.py", "few or views"),
    ("tests/fusion/test_rms_norm.py", "dtypes or views or any_sizes"),
    ("tests/fusion/test_linear_cross_entropy_native.py", "sizes or options"),
)

CHILD = """
import sys
import pytest
import pyvlm
isa, *tests = sys.argv[1:]
facts = pyvlm.build_info()["native"]
assert facts["isa"] == isa, f"the kernels run with {facts}"
assert not facts["amx"], "a forced instruction set leaves the matrix unit aside"
failed = [
    f"{path} -k '{which}'"
    for path, which in zip(tests[::2], tests[1::2], strict=True)
    if pytest.main(["-q", "-p", "no:cacheprovider", path, "-k", which])
]
sys.exit(f"failed: {failed}" if failed else 0)
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="the extension has other instruction sets on x86 only",
)
@pytest.mark.parametrize(("forced", "isa"), [("avx512", "avx512"), ("avx2", "avx2"), ("default", "baseline")])
def test_kernels_are_right_with_every_instruction_set(forced: str, isa: str) -> None:
    supported = {"avx512": torch.cpu._is_avx512_supported, "avx2": torch.cpu._is_avx2_supported}
    if forced in supported and not supported[forced]():
        pytest.skip(f"this CPU has no {forced}")
    here = build_info()["native"]
    if here["isa"] == isa and not here["amx"]:
        pytest.skip(f"{isa} is what all other tests run with here")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": forced, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, isa, *chain.from_iterable(TESTS)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-4000:]


def test_bf16_kernels_run_with_onednn_switched_off() -> None:
    levels = [torch.randn(2, 70, 96, dtype=torch.bfloat16) for _ in range(3)]
    alpha, weight = torch.rand(3, dtype=torch.bfloat16), torch.randn(80, 96, dtype=torch.bfloat16)
    expected = merge_levels(levels, alpha, weight, backend="native")
    with torch.backends.mkldnn.flags(enabled=False):
        got = merge_levels(levels, alpha, weight, backend="native")
    torch.testing.assert_close(got, expected, atol=0.1, rtol=2**-7)

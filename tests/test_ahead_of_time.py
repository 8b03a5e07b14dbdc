"""Every Triton kernel is compiled ahead of time for every generation of GPUs, with every table of tiles."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import ahead_of_time
from ahead_of_time import ARCHITECTURES
from attention.triton_aot import CALLS as ATTENTION_CALLS
from moe.moe_triton_aot import CALLS as MOE_CALLS
from pyvlm.triton_kernels import attention, moe
from triton.runtime.jit import JITFunction

pytestmark = ahead_of_time.compiles_ahead_of_time

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "triton_kernels"
TABLES = {  # by the beginning of the modules' names
    "attention": "attention/triton_aot.json",
    "cross_attention": "fusion/cross_attention_triton_aot.json",
    "fusion": "fusion/fusion_triton_aot.json",
    "gating": "fusion/gating_triton_aot.json",
    "loss": "fusion/loss_triton_aot.json",
    "moe": "moe/moe_triton_aot.json",
    "norm": "fusion/norm_triton_aot.json",
    "placement": "fusion/placement_triton_aot.json",
}


LISTING = """
.text.kernel:
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
.L_x_0:
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR9+0x18000], R88 ;
        /*0030*/              @!P4 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   LDL.64 R2, [R1+0x8] ;
        /*0060*/                   LDG.E.U16 R3, desc[UR6][R4.64] ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   STL [R1], R0 ;
        /*0090*/               @P1 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR9+0x18000], R88 ;
        /*00c0*/              @!P4 BRA `(.L_x_3) ;
        /*00d0*/                   BRA `(.L_x_2) ;
"""


def test_exponentials_beside_wgmma_are_those_before_it_is_waited_for() -> None:
    exponential, wait = "MUFU.EX2 R5, R6", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    first, second = "HGMMA.64x64x16.F32.BF16 R24", "HGMMA.64x64x16.F32.BF16 R56"
    loop = [exponential, first, exponential, "MUFU.RCP R7, R8", wait, exponential, exponential, second]
    assert ahead_of_time.exponentials_beside_wgmma(loop) == [2, 4]  # the second one runs on in the next round
    assert ahead_of_time.exponentials_beside_wgmma([*loop, wait]) == [1, 4]
    assert ahead_of_time.exponentials_beside_wgmma([exponential]) == [0, 1]


def test_a_main_loop_is_an_innermost_one_with_matrix_instructions() -> None:
    (loop,) = ahead_of_time.main_loops(LISTING)  # neither the outer loop, nor the wait beyond the end
    assert [line.split()[0] for line in loop] == [
        *("SYNCS.PHASECHK.TRANS64.TRYWAIT", "@!P4", "HGMMA.64x64x16.F32.BF16"),
        *("LDL.64", "LDG.E.U16", "@P0"),
    ]
    assert [bool(ahead_of_time.SPILL.search(line)) for line in loop] == [False] * 3 + [True, False, False]
    assert [bool(ahead_of_time.NARROW_LOAD.search(line)) for line in loop] == [False] * 4 + [True, False]


def kernels() -> list[tuple[str, str]]:
    """Family and name of all that is launched; other functions of Triton's are inlined."""
    found = []
    for path in sorted(KERNELS.glob("*.py")):
        if path.stem in ("__init__", "common"):
            continue
        module = importlib.import_module(f"pyvlm.triton_kernels.{path.stem}")
        family = max((stem for stem in TABLES if path.stem.startswith(stem)), key=len)
        found += [
            (family, name)
            for name, value in vars(module).items()
            if isinstance(value, JITFunction)
            and value.do_not_specialize
            and value.__module__ == module.__name__
        ]
    return found


def test_every_kernel_has_a_row_for_every_architecture() -> None:
    assert len(kernels()) > 25
    missing = []
    for family, kernel in kernels():
        rows = [name.split() for name in json.loads((TESTS / TABLES[family]).read_text())["kernels"]]
        missing += [
            f"{kernel} on sm_{architecture}"
            for architecture in ARCHITECTURES
            if not any(row[0] == kernel and f"sm_{architecture}" in row for row in rows)
        ]
    assert missing == []


def test_every_table_of_attentions_tiles_is_compiled() -> None:
    compiled = {
        id(attention.default_config(call.head_dim, call.dtype, divmod(call.architecture, 10)))
        for call in ATTENTION_CALLS
        if "forward_kernel" in call.kernels
    }
    for table in (attention._BLACKWELL, attention._HOPPER, attention._OTHER, attention._FLOAT32):
        for head_dim, config in table.items():
            assert id(config) in compiled, (head_dim, config)


def test_every_table_of_the_experts_tiles_is_compiled() -> None:
    few = {False: set(), True: set()}
    for call in MOE_CALLS:
        few[call.tokens < 1024].add(id(moe.default_config(call.dtype, divmod(call.architecture, 10), False)))
    for capability in ((8, 0), (9, 0), (10, 0)):
        for dtype in (torch.bfloat16, torch.float32):
            config = moe.default_config(dtype, capability, False)
            assert all(id(config) in compiled for compiled in few.values())

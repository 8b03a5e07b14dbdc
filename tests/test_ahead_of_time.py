"""Every Triton kernel is compiled ahead of time for every generation of GPUs, with every table of tiles."""

import importlib
import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import ahead_of_time
from ahead_of_time import ARCHITECTURES
from attention import triton_aot as attention_aot
from fusion import cross_attention_triton_aot as cross_attention_aot
from fusion import fusion_triton_aot as fusion_aot
from fusion import gating_triton_aot as gating_aot
from fusion import loss_triton_aot as loss_aot
from fusion import norm_triton_aot as norm_aot
from fusion import placement_triton_aot as placement_aot
from moe import moe_triton_aot as moe_aot
from pyvlm.triton_kernels import attention, moe
from triton.runtime.jit import JITFunction
from without_gpu import META, launches_as_on_a_gpu

import benchmarks.attention
import benchmarks.cross_attention
import benchmarks.fusion
import benchmarks.gating
import benchmarks.loss
import benchmarks.moe
import benchmarks.norm
import benchmarks.placement
from benchmarks.gpu import cases
from benchmarks.harness.run import run_pass
from pyvlm.ops import linear_cross_entropy

pytestmark = ahead_of_time.compiles_ahead_of_time

KERNELS = Path(__file__).parent.parent / "triton_kernels"
COMPILED = {  # by the beginning of the modules' names
    "attention": attention_aot,
    "cross_attention": cross_attention_aot,
    "fusion": fusion_aot,
    "gating": gating_aot,
    "loss": loss_aot,
    "moe": moe_aot,
    "norm": norm_aot,
    "placement": placement_aot,
}
BENCHMARKS = (
    (benchmarks.attention, cases.ATTENTION),
    (benchmarks.moe, cases.EXPERTS),
    (benchmarks.fusion, cases.FUSION),
    (benchmarks.cross_attention, cases.WINDOWS),
    (benchmarks.loss, cases.LOSS),
    (benchmarks.placement, cases.PLACEMENT),
    (benchmarks.gating, cases.GATING),
    (benchmarks.norm, cases.NORM),
)


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
        family = max((stem for stem in COMPILED if path.stem.startswith(stem)), key=len)
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
        rows = [name.split() for name in json.loads(COMPILED[family].TABLE.read_text())["kernels"]]
        missing += [
            f"{kernel} on sm_{architecture}"
            for architecture in ARCHITECTURES
            if not any(row[0] == kernel and f"sm_{architecture}" in row for row in rows)
        ]
    assert missing == []


def test_every_table_of_attentions_tiles_is_compiled() -> None:
    compiled = {
        id(attention.default_config(call.head_dim, call.dtype, divmod(call.architecture, 10)))
        for call in attention_aot.CALLS
        if "forward_kernel" in call.kernels
    }
    for table in (attention._BLACKWELL, attention._HOPPER, attention._OTHER, attention._FLOAT32):
        for head_dim, config in table.items():
            assert id(config) in compiled, (head_dim, config)


def test_every_table_of_the_experts_tiles_is_compiled() -> None:
    few = {False: set(), True: set()}
    for call in moe_aot.CALLS:
        few[call.tokens < 1024].add(id(moe.default_config(call.dtype, divmod(call.architecture, 10), False)))
    for capability in ((8, 0), (9, 0), (10, 0)):
        for dtype in (torch.bfloat16, torch.float32):
            config = moe.default_config(dtype, capability, False)
            assert all(id(config) in compiled for compiled in few.values())


@cache
def compiled(family: str, architecture: int) -> set[tuple[str, str, Any]]:
    """The specialisations of a family's kernels that are compiled ahead of time."""
    calls = [call for call in COMPILED[family].CALLS if call.architecture == architecture]
    launches = [launch for call in calls for launch in ahead_of_time.compiled_launches(call).values()]
    return set(ahead_of_time.specialisations(launches, architecture))


def not_compiled(launches: dict[str, list[ahead_of_time.Launch]], architecture: int = 90) -> list[str]:
    """Kernels that are launched and were never compiled so: what Triton would look them up by."""
    launched = {family: ahead_of_time.specialisations(of, architecture) for family, of in launches.items()}
    return [
        f"{family}'s {name}: {tiles}, {key}"
        for family, of_family in launched.items()
        for name, key, tiles in dict.fromkeys(of_family)
        if (name, key, tiles) not in compiled(family, architecture)
    ]


def launches_of_benchmark(family: Any, case: Any) -> dict[str, list[ahead_of_time.Launch]]:
    """What pyvlm's row of a case launches on Hopper."""
    with launches_as_on_a_gpu(90) as launches:
        work = family.workload(case, META, torch.bfloat16)
        ours = family.OPERATION.providers[0].build(work)
        for each_pass in work.costs:
            run_pass(ours, work, each_pass)()
    return launches


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family, of_family in BENCHMARKS for case in of_family],
    ids=lambda value: getattr(value, "name", None) or value.OPERATION.name,
)
def test_what_a_benchmark_of_an_op_launches_is_compiled(family: Any, case: Any) -> None:
    launches = launches_of_benchmark(family, case)
    assert launches[family.OPERATION.name]
    assert not_compiled(launches) == []


def test_what_is_compiled_nowhere_is_found() -> None:
    case = replace(cases.NORM[0], channels=4104)
    missing = not_compiled(launches_of_benchmark(benchmarks.norm, case))
    assert [line.split(":")[0] for line in missing] == [
        "norm's rms_norm_kernel",
        "norm's rms_norm_backward_kernel",
    ]


@pytest.mark.parametrize("kind", ["llava-mmca", "moe-llava"])
def test_what_a_benchmark_of_a_training_step_launches_is_compiled(kind: str) -> None:
    pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
    from benchmarks.gpu.parts import Context
    from benchmarks.gpu.step import Step

    with launches_as_on_a_gpu(90) as launches:
        step = Step(kind, Context(META, dry_run=False, deadline=time.monotonic() + 60))
        step.loss(step.model_of("pyvlm")).backward()
        # A head without memory is not served: its loss is called here.
        head = step.model.lm_head.weight
        hidden = torch.empty(step.labels.numel(), head.shape[1], dtype=head.dtype, requires_grad=True)
        linear_cross_entropy(hidden, head, step.labels.flatten(), reduction="sum").backward()
    served = ["attention", "gating", "loss", *(["moe"] if kind == "moe-llava" else []), "norm"]
    assert [family for family, of_family in launches.items() if of_family] == served
    assert not_compiled(launches) == []

"""The Triton kernels of span attention, compiled for GPUs that are not here; and what compiles them anew."""

import json
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from attention import triton_aot  # noqa: E402 (it imports Triton)
from attention.triton_aot import CALLS, MAIN_KERNELS, Call, compile_call, launches, signature  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

TABLE = json.loads(triton_aot.TABLE.read_text())
# Another version of Triton gives registers away otherwise: as much as this may then lie in local memory.
SPILLS_OF_OTHER_VERSIONS = 128

pytestmark = [
    pytest.mark.skipif(
        not (triton_aot.TOOLS / "ptxas").exists(), reason="this Triton has no compiler for NVIDIA GPUs"
    ),
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: kernels are not compiled"),
]


def test_the_table_is_of_these_kernels() -> None:
    assert list(TABLE["kernels"]) == [call.name(kernel) for call in CALLS for kernel in call.kernels]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.name(call.kernels[0])}")
def test_machine_code(call: Call, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No spills, the GPU's own matrix instructions, shared memory that it has; and as in the table."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what was compiled before proves nothing
    same_version = TABLE["triton"] == triton.__version__
    for name, row in compile_call(call).items():
        kernel = name.split()[0]
        assert row["local_bytes"] <= (0 if same_version else SPILLS_OF_OTHER_VERSIONS), (name, row)
        assert row["shared_bytes"] <= triton_aot.SHARED_MEMORY[call.architecture], (name, row)
        if kernel in MAIN_KERNELS and call.dtype != torch.float32:
            instruction = triton_aot.MATRIX_INSTRUCTIONS[call.architecture]
            assert row["matrix_instructions"].get(instruction, 0) >= 2 * 2, (name, row)
        if same_version:
            assert row == TABLE["kernels"][name], (
                f"{name}: where this is meant, run python tests/attention/triton_aot.py and commit the table"
            )


def specialisations(call: Call, **changed: Any) -> list[tuple[str, Any]]:
    """What Triton would look a kernel up by: types, and the values and alignments that it compiles in."""
    backend = make_backend(GPUTarget("cuda", call.architecture, 32))
    keys = []
    for launch in launches(call, **changed):
        kernel = launch.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        # Host memory in place of the meta device's, whose address is 0: what counts is that it is aligned.
        arguments = {name: aligned(value) for name, value in launch.arguments.items()}
        keys.append((kernel.__name__, str(bind(**arguments)[1]), launch.tiles))
    return keys


def aligned(value: Any) -> Any:
    return torch.zeros(16, dtype=value.dtype) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("streams", ["one range", "joint", "separate"])
def test_new_spans_and_sizes_compile_nothing_new(streams: str, architecture: int) -> None:
    call = Call(architecture, 128, streams)
    expected = specialisations(call)
    assert [name for name, *_ in expected] == [
        *("summarise_keys", "forward_kernel", "row_statistics"),
        *("summarise_keys", "grad_q_kernel", "summarise_keys", "summarise_queries", "grad_kv_kernel"),
    ]
    assert specialisations(call, masks=(254, 16)) == expected
    assert specialisations(call, masks=(1, 1)) == expected
    assert specialisations(call, keys=777, batch=1, scale=1.0) == expected
    assert specialisations(call, padding=8) == expected
    assert specialisations(Call(architecture, 128, streams, queries=1023), batch=3) == expected
    # That the comparison can fail: another head dimension is another kernel.
    assert specialisations(Call(architecture, 120, streams)) != expected


@pytest.mark.parametrize("streams", ["one range", "joint", "separate"])
def test_a_growing_cache_compiles_nothing_new(streams: str) -> None:
    call = Call(90, 128, streams, queries=1)
    decoding = [
        [key for key in specialisations(call, keys=keys) if key[0] in ("decode_kernel", "combine_kernel")]
        for keys in (1, 2, 64, 4095, 4096, 100_001)
    ]
    assert len(decoding[0]) == 2
    assert all(keys == decoding[0] for keys in decoding)


def test_no_number_is_specialised() -> None:
    for launch in launches(CALLS[0]):
        types, constants, alignments = signature(launch)  # it asserts that numbers are left alone
        for index, parameter in enumerate(launch.kernel.params):
            is_pointer = types[parameter.name].startswith("*")
            assert ((index,) in alignments) == is_pointer
            assert is_pointer or parameter.name in constants or parameter.do_not_specialize

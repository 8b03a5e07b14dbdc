"""The Triton kernels of the experts' MLP, compiled for GPUs that are not here; what compiles them anew."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import ahead_of_time
from moe.moe_triton_aot import CALLS, TABLE, Call

pytestmark = ahead_of_time.compiles_ahead_of_time


def test_the_table_is_of_these_kernels() -> None:
    names = [call.name(kernel) for call in CALLS for kernel in call.kernels]
    assert list(json.loads(TABLE.read_text())["kernels"]) == names


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.name(call.kernels[0])}")
def test_machine_code(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ahead_of_time.check_machine_code(call, TABLE, monkeypatch, tmp_path)


def specialisations(call: Call, **changed: Any) -> list[tuple[str, str, Any]]:
    return ahead_of_time.specialisations(call.launches(**changed), call.architecture)


@pytest.mark.parametrize("architecture", [80, 90])
def test_new_routings_compile_nothing_new(architecture: int) -> None:
    call = Call(architecture)
    expected = specialisations(call)
    assert [name for name, *_ in expected] == [
        *("schedule_kernel", "up_kernel", "down_kernel", "sum_slots_kernel"),
        *("schedule_kernel", "grad_hidden_kernel", "grad_rows_kernel", "sum_slots_kernel"),
        *("schedule_kernel", "grad_weight_kernel"),  # its row tiles are smaller
        *("grad_matrix_kernel", "grad_matrix_kernel", "grad_bias_kernel", "grad_bias_kernel"),
    ]
    assert specialisations(call, tokens=777, slots=1553) == expected
    assert specialisations(call, tokens=100_000, slots=100_001) == expected
    assert specialisations(call, experts=1) == expected
    # That the comparison can fail: other matrices are another kernel, and so is a tile of few rows.
    assert specialisations(Call(architecture, intermediate=704)) != expected
    assert specialisations(call, tokens=8) != expected


def test_decoding_compiles_nothing_new() -> None:
    expected = specialisations(Call(90, tokens=1))
    for tokens in (2, 3, 16, 63):
        assert specialisations(Call(90, tokens=tokens)) == expected


def test_no_number_is_specialised() -> None:
    ahead_of_time.check_no_number_is_specialised(CALLS[0].launches())

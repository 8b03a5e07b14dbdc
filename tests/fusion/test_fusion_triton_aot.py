"""The Triton kernels of `merge_levels`, compiled for GPUs that are not here; what compiles them anew."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import ahead_of_time
from fusion.fusion_triton_aot import CALLS, TABLE, Call

pytestmark = ahead_of_time.compiles_ahead_of_time
BACKWARD = "merge_backward_kernel"


def test_the_table_is_of_these_kernels() -> None:
    names = [call.name(kernel) for call in CALLS for kernel in call.kernels]
    assert list(json.loads(TABLE.read_text())["kernels"]) == names


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.name(call.kernels[0])}")
def test_machine_code(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ahead_of_time.check_machine_code(call, TABLE, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "call", [call for call in CALLS if BACKWARD in call.kernels], ids=lambda call: call.name(BACKWARD)
)
def test_programs_that_share_the_rows_run_at_once(call: Call) -> None:
    ahead_of_time.check_that_all_programs_run_at_once(call, BACKWARD, TABLE, images=64)


def specialisations(call: Call, **changed: Any) -> list[tuple[str, str, Any]]:
    return ahead_of_time.specialisations(call.launches(**changed), call.architecture)


@pytest.mark.parametrize("per_level", ["", "g", "wg"])
def test_other_maps_and_levels_compile_nothing_new(per_level: str) -> None:
    call = Call(90, per_level=per_level)
    expected = specialisations(call)
    chunks = 3 if "w" in per_level else 1  # of 8 levels
    assert [name for name, *_ in expected] == [
        *("table_kernel", *["merge_kernel"] * chunks),
        *("table_kernel", *["merge_backward_kernel"] * chunks),
    ]
    assert specialisations(call, images=1, tokens=1) == expected
    assert specialisations(call, images=7, tokens=729) == expected
    other = {key for key in specialisations(call, levels=5) if key[0] != "table_kernel"}
    assert other < set(expected)
    # That the comparison can fail: other channels are another kernel.
    assert specialisations(Call(90, channels=1152, per_level=per_level)) != expected


def test_no_number_is_specialised() -> None:
    ahead_of_time.check_no_number_is_specialised(CALLS[0].launches())

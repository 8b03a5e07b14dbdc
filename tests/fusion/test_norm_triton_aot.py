"""The Triton kernels of RMSNorm, compiled for GPUs that are not here; what compiles them anew."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import ahead_of_time
from fusion.norm_triton_aot import CALLS, TABLE, Call

pytestmark = ahead_of_time.compiles_ahead_of_time


def test_the_table_is_of_these_kernels() -> None:
    names = [call.name(kernel) for call in CALLS for kernel in call.kernels]
    assert list(json.loads(TABLE.read_text())["kernels"]) == names


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name("all"))
def test_machine_code(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ahead_of_time.check_machine_code(call, TABLE, monkeypatch, tmp_path)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name("all"))
def test_programs_that_share_the_rows_run_at_once(call: Call) -> None:
    ahead_of_time.check_that_all_programs_run_at_once(call, "rms_norm_backward_kernel", TABLE, tokens=2**20)


def specialisations(call: Call, **changed: Any) -> list[tuple[str, str, Any]]:
    return ahead_of_time.specialisations(call.launches(**changed), call.architecture)


def test_other_numbers_of_tokens_compile_nothing_new() -> None:
    expected = specialisations(Call(90))
    assert [name for name, *_ in expected] == ["rms_norm_kernel", "rms_norm_backward_kernel"]
    for tokens in (1, 777, 100_000):
        assert specialisations(Call(90), tokens=tokens) == expected
    # That the comparison can fail: other widths are another kernel.
    assert specialisations(Call(90, channels=2048)) != expected


def test_no_number_is_specialised() -> None:
    ahead_of_time.check_no_number_is_specialised(CALLS[0].launches())

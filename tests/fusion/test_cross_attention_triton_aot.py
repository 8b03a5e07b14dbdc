"""The Triton kernels of attention to windows, compiled for GPUs that are not here; when they compile anew."""

import json
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import ahead_of_time
from fusion.cross_attention_triton_aot import CALLS, TABLE, Call

pytestmark = ahead_of_time.compiles_ahead_of_time


def test_the_table_is_of_these_kernels() -> None:
    names = [call.name(kernel) for call in CALLS for kernel in call.kernels]
    assert list(json.loads(TABLE.read_text())["kernels"]) == names


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.name(call.kernels[0])}")
def test_machine_code(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    ahead_of_time.check_machine_code(call, TABLE, monkeypatch, tmp_path)


def specialisations(call: Call, **changed: Any) -> list[tuple[str, str, Any]]:
    return ahead_of_time.specialisations(call.launches(**changed), call.architecture)


def test_new_batches_and_grids_compile_nothing_new() -> None:
    call = Call(90)
    expected = specialisations(call)
    assert [name for name, *_ in expected] == ["forward_kernel", "backward_kernel"]
    for images, grid in ((1, (24, 24)), (3, (7, 5)), (2, (1, 1))):
        assert specialisations(call, images=images, grid=grid) == expected
    assert specialisations(call, heads=1) == expected
    # That the comparison can fail: other windows are another kernel.
    assert specialisations(Call(90, sides=(1, 1, 1, 3))) != expected

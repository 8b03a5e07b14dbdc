"""The Triton kernels of the head's loss, compiled for GPUs that are not here; what compiles them anew."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import ahead_of_time
from fusion.loss_triton_aot import CALLS, TABLE, Call

pytestmark = ahead_of_time.compiles_ahead_of_time


def test_the_table_is_of_these_kernels() -> None:
    names = [call.name(kernel) for call in CALLS for kernel in call.kernels]
    assert list(json.loads(TABLE.read_text())["kernels"]) == names


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.name(call.kernels[0])}")
def test_machine_code(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ahead_of_time.check_machine_code(call, TABLE, monkeypatch, tmp_path)


def specialisations(call: Call, **changed: Any) -> set[tuple[str, str, Any]]:
    return set(ahead_of_time.specialisations(call.launches(**changed), call.architecture))


@pytest.mark.parametrize("architecture", [80, 90])
def test_new_batches_compile_nothing_new(architecture: int) -> None:
    call = Call(architecture)
    expected = specialisations(call)
    assert {name for name, *_ in expected} == {
        *("statistics_kernel", "combine_kernel", "grad_logits_kernel"),
        *("grad_hidden_kernel", "grad_weight_kernel", "grad_bias_kernel"),
    }
    for tokens in (1, 16, 777, 100_000):
        assert specialisations(call, tokens=tokens) == expected
    # That the comparison can fail: another vocabulary is another kernel.
    assert specialisations(call, words=32_000) != expected


def test_no_number_is_specialised() -> None:
    ahead_of_time.check_no_number_is_specialised(CALLS[0].launches())

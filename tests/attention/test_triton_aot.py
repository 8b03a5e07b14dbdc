"""The Triton kernels of span attention, compiled for GPUs that are not here; and what compiles them anew."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import ahead_of_time
from attention.triton_aot import CALLS, MAIN_KERNELS, STREAMS, TABLE, Call

pytestmark = ahead_of_time.compiles_ahead_of_time


def test_the_table_is_of_these_kernels() -> None:
    names = [call.name(kernel) for call in CALLS for kernel in call.kernels]
    assert list(json.loads(TABLE.read_text())["kernels"]) == names


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.name(call.kernels[0])}")
def test_machine_code(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ahead_of_time.check_machine_code(call, TABLE, monkeypatch, tmp_path, call.spills)


@pytest.mark.parametrize("kernel", MAIN_KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_exponentials_are_made_while_wgmma_works(head_dim: int, kernel: str) -> None:
    """In the loop over full tiles, which is the first; that the table tells the truth is tested above."""
    rows = json.loads(TABLE.read_text())["kernels"]
    for streams in STREAMS:
        row = rows[Call(90, head_dim, streams).name(kernel)]
        beside, total = row["loop_exponentials_beside_wgmma"][0]
        assert beside >= 0.8 * total > 0, (streams, row)


def specialisations(call: Call, **changed: Any) -> list[tuple[str, str, Any]]:
    return ahead_of_time.specialisations(call.launches(**changed), call.architecture)


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
    ahead_of_time.check_no_number_is_specialised(CALLS[0].launches())

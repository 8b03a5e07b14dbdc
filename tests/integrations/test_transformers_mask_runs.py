"""The runs of a dense mask's rows: the native op against plain PyTorch, and that against its definition."""

from itertools import groupby

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")
from pyvlm import _native
from pyvlm.integrations.transformers import masks
from pyvlm.integrations.transformers.masks import mask_runs_torch, spans_mask


@st.composite
def rows(draw: st.DrawFn, keys: int) -> list[bool]:
    """One row of runs, so that empty and full rows and rows of a few long runs come up often."""
    cuts = sorted(draw(st.lists(st.integers(0, keys), max_size=6)))
    return [sum(cut <= key for cut in cuts) % 2 == 1 for key in range(keys)]


@st.composite
def dense_masks(draw: st.DrawFn) -> Tensor:
    batch, queries = draw(st.integers(0, 2)), draw(st.integers(0, 4))
    keys = draw(st.sampled_from([0, 1, 2, 7, 33]))  # none, one, and odd numbers beside what vectors hold
    flat = [draw(rows(keys)) for _ in range(batch * queries)]
    return torch.tensor(flat, dtype=torch.bool).view(batch, queries, keys)


LAYOUTS = {
    "contiguous": lambda seen: seen,
    "a part of more keys": lambda seen: torch.nn.functional.pad(seen, (1, 2), value=True)[..., 1:-2],
    "batch and queries swapped": lambda seen: seen.transpose(0, 1),
    "one row for all": lambda seen: seen[:, :1].expand(-1, seen.shape[1], -1),
    "keys apart": lambda seen: seen.mT.contiguous().mT,
    "one key for all": lambda seen: seen[..., :1].expand(seen.shape),
}


def runs_by_definition(seen: Tensor) -> tuple[Tensor, ...]:
    batch, queries, keys = seen.shape
    first, rest = (torch.zeros(batch, queries, 2, dtype=torch.int32) for _ in range(2))
    count, beyond = torch.zeros(batch, queries, dtype=torch.int32), torch.zeros(batch, keys, dtype=torch.bool)
    for b in range(batch):
        for q in range(queries):
            row = [key for key in range(keys) if seen[b, q, key]]
            runs = [
                [key for _, key in group]
                for _, group in groupby(enumerate(row), lambda placed: placed[1] - placed[0])
            ]
            if runs:
                first[b, q] = torch.tensor([runs[0][0], runs[0][-1] + 1])
            if len(runs) > 1:
                rest[b, q] = torch.tensor([runs[1][0], runs[-1][-1] + 1])
            count[b, q] = sum(map(len, runs[1:]))
            beyond[b, [key for run in runs[1:] for key in run]] = True
    return first, rest, count, beyond


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, a, e in zip(("first", "rest", "count", "beyond"), actual, expected, strict=True):
        assert a.dtype == e.dtype, name
        assert torch.equal(a, e), name


@given(dense_masks())
def test_plain_pytorch_finds_the_runs(seen: Tensor) -> None:
    assert_equal(mask_runs_torch(seen), runs_by_definition(seen))


@pytest.mark.usefixtures("fresh_compiler")
def test_plain_pytorch_compiles() -> None:
    """With Inductor, which has no maximum of bool."""
    compiled = torch.compile(mask_runs_torch, fullgraph=True)
    seen = torch.rand(2, 5, 33) < 0.3
    assert_equal(compiled(seen), mask_runs_torch(seen))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(seen=dense_masks())
@example(seen=torch.ones(2, 3, 7, dtype=torch.bool))
@example(seen=torch.zeros(2, 3, 7, dtype=torch.bool))
def test_the_op_finds_what_plain_pytorch_finds(layout: str, seen: Tensor) -> None:
    seen = LAYOUTS[layout](seen)
    assert_equal(torch.ops.pyvlm.mask_runs(seen), mask_runs_torch(seen))


@pytest.mark.parametrize("shape", [(1, 3000, 1024), (3, 999, 1025)], ids=["one sample", "parts of samples"])
def test_threads_share_large_masks(shape: tuple[int, int, int]) -> None:
    """Masks that are worth two threads: each row lands in its place, the marks of both are put together."""
    seen = torch.rand(shape) < 0.0005
    seen[0, 0] = seen[-1, -1] = False
    seen[0, 0, [3, 1000]] = seen[-1, -1, [4, 1001]] = True
    assert_equal(torch.ops.pyvlm.mask_runs(seen), mask_runs_torch(seen))


def test_opcheck() -> None:
    for layout in LAYOUTS.values():
        torch.library.opcheck(torch.ops.pyvlm.mask_runs.default, (layout(torch.rand(2, 3, 9) < 0.5),))


def test_bad_input_is_refused() -> None:
    for seen in (torch.ones(2, 3, 4), torch.ones(3, 4, dtype=torch.bool)):
        with pytest.raises(
            RuntimeError, match=r"mask_runs: seen is .*; expected bool \[batch, queries, keys"
        ):
            torch.ops.pyvlm.mask_runs(seen)


@pytest.mark.parametrize("extension", [True, False])
def test_each_row_is_looked_at_once(extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where several pieces are needed; with the extension and without, the result is the same."""
    calls = []

    def function(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        calls.append(query.numel())
        return (key <= query) | ((key >= 6) & (query >= 2))

    monkeypatch.setattr(masks, "PIECE", 40)
    if not extension:
        monkeypatch.setattr(_native, "C", None)
    bounds = spans_mask(1, 10, 9, mask_function=function)[0, :, :10]
    assert sum(calls) == 10
    assert bounds[0].tolist() == [[0, min(q + 1, 9) if q < 5 else 9] for q in range(10)]
    assert bounds[1].tolist() == [[6, 9] if 2 <= q < 5 else [0, 0] for q in range(10)]

"""RMSNorm: sizes, layouts, dtypes of weights, what is kept for backward, and as a torch op."""

import pytest
import torch
from fusion.norm_cases import CASES, NormCase
from fusion.norm_checks import DTYPES, assert_right, results
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from pyvlm.ops import rms_norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit_offset", [False, True], ids=["weight", "one more"])
def test_dtypes(unit_offset: bool, dtype: torch.dtype) -> None:
    # Large rows too, small ones, where eps counts, and one of zeros.
    sizes = torch.tensor([1.0, 100.0, 1e-3, 0.0]).repeat_interleave(5)[:, None]
    assert_right((torch.randn(20, 83) * sizes).to(dtype), torch.randn(83).to(dtype), unit_offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_weight", [None, *DTYPES], ids=str)
def test_weights_of_any_dtype(of_weight: torch.dtype | None, dtype: torch.dtype) -> None:
    if of_weight == torch.float64 and dtype != torch.float64:
        weight = torch.randn(40).to(of_weight)
        y = rms_norm(torch.randn(3, 40).to(dtype), weight, backend="native")
        assert y.dtype == dtype
        return
    weight = None if of_weight is None else torch.randn(40).to(of_weight)
    assert_right(torch.randn(9, 40).to(dtype), weight)


@settings(max_examples=60)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    data.draw(st.random_module())
    shape = [*data.draw(st.lists(st.integers(0, 9), max_size=3)), data.draw(st.integers(0, 130))]
    dtype = data.draw(st.sampled_from(DTYPES))
    order = data.draw(st.permutations(range(len(shape))))
    x = torch.randn([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))]).to(dtype)
    assert_right(x, torch.randn(shape[-1]).to(dtype), eps=data.draw(st.sampled_from([1e-6, 0.1])))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: NormCase) -> None:
    x, weight = (case.reduced() if case.large else case).inputs(torch.float32)
    assert_right(x, weight, case.unit_offset)


def test_more_rows_than_a_chunk_and_elements_than_a_thread_takes() -> None:
    assert_right(torch.randn(1301, 97), torch.randn(97))


VIEWS = {
    "heads before tokens": lambda x: x.view(3, 8, 5, 24).transpose(1, 2),
    "a third of a joint projection": lambda x: x.chunk(3, dim=-1)[1],
    "tokens cut off": lambda x: x[:, 1:-1],
    "every second channel": lambda x: x[..., ::2],
    "channels first": lambda x: x.transpose(1, 2),
    "one row for all": lambda x: x[:1, :1].expand(3, 8, -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, dtype: torch.dtype) -> None:
    x = VIEWS[view](torch.randn(3, 8, 120).to(dtype))
    weight, grad_y = torch.randn(x.shape[-1]).to(dtype), torch.randn(x.shape).to(dtype)
    expected = results(x.contiguous(), weight, grad_y, "native")
    actual = results(x, weight, grad_y, "native")
    assert actual["y"].equal(expected["y"])
    assert actual["x"].equal(expected["x"])
    # Its rows are added in the order that they lie in.
    torch.testing.assert_close(actual["weight"], expected["weight"])


def test_the_result_lies_as_x_does() -> None:
    x = torch.randn(2, 7, 3, 16).transpose(1, 2)
    assert rms_norm(x, backend="native").stride() == x.stride()
    assert rms_norm(x.transpose(2, 3), backend="native").is_contiguous()


@pytest.mark.parametrize("dimensions", [(3, 4), (4,), (3,)], ids=["both", "x", "rstd"])
def test_hooks_that_lay_saved_tensors_otherwise(dimensions: tuple[int, ...]) -> None:
    x, weight = torch.randn(2, 7, 3, 16).transpose(1, 2), torch.randn(16)
    grad_y = torch.randn(x.shape)
    expected = results(x, weight, grad_y, "native")

    def pack(t: Tensor) -> Tensor:
        return t.contiguous() if t.dim() in dimensions else t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        actual = results(x, weight, grad_y, "native")
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize(("of_x", "of_weight"), [(True, False), (False, True)])
def test_gradients_that_nobody_wants(of_x: bool, of_weight: bool) -> None:
    x, weight, grad_y = torch.randn(40, 24), torch.randn(24), torch.randn(40, 24)
    expected = results(x, weight, grad_y, "native")
    x.requires_grad_(of_x), weight.requires_grad_(of_weight)
    rms_norm(x, weight, backend="native").backward(grad_y)
    assert x.grad.equal(expected["x"]) if of_x else x.grad is None
    assert weight.grad.equal(expected["weight"]) if of_weight else weight.grad is None


@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(weighted: bool) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    leaves = (x, weight) if weighted else (x,)
    assert gradcheck(lambda *leaves: rms_norm(*leaves, unit_offset=True, backend="native"), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", ["heads before tokens", "channels first", "tokens cut off"])
def test_opcheck(view: str, dtype: torch.dtype) -> None:
    x = VIEWS[view](torch.randn(3, 8, 120).to(dtype))
    weight = torch.randn(x.shape[-1])
    y, rstd = torch.ops.pyvlm.rms_norm(x, weight, 1e-6, False)
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight)]
    torch.library.opcheck(torch.ops.pyvlm.rms_norm, (*leaves, 1e-6, True))
    torch.library.opcheck(torch.ops.pyvlm.rms_norm, (x, None, 1e-6, False))
    for wanted in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(
            torch.ops.pyvlm.rms_norm_backward,
            (y, x, weight, rstd, False, *wanted),
            test_utils=("test_schema", "test_faketensor"),  # it has no second derivative
        )


def test_compiles_in_one_graph(fresh_compiler: None) -> None:
    x, weight = torch.randn(3, 5, 70, requires_grad=True), torch.randn(70)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    assert compiled(x, weight).equal(rms_norm(x, weight))
    (ours,) = torch.autograd.grad(compiled(x, weight).sum(), x)
    (expected,) = torch.autograd.grad(rms_norm(x, weight).sum(), x)
    assert ours.equal(expected)


def test_the_same_bits_for_any_number_of_threads() -> None:
    x, weight, grad_y = torch.randn(900, 200), torch.randn(200), torch.randn(900, 200)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            runs.append(results(x, weight, grad_y, "native"))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(run[name].equal(runs[0][name]) for name in run)


def test_x_and_a_number_a_row_are_all_that_is_kept() -> None:
    x, weight = torch.randn(8, 16).bfloat16().requires_grad_(), torch.ones(16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, backend="native")
    assert {t.data_ptr() for t in kept} >= {x.data_ptr(), weight.data_ptr()}
    assert sum(t.numel() for t in kept) == x.numel() + weight.numel() + 8


def test_second_derivatives_are_the_references_alone() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(x, backend="native").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(3)}, ValueError, r"weight has shape \[3\], expected \[C\] with C = 4"),
        ({"weight": torch.zeros(1, 4)}, ValueError, r"weight has shape \[1, 4\], expected \[C\]"),
        ({"weight": torch.zeros(4).int()}, TypeError, "weight is torch.int32"),
        ({"x": torch.zeros(3, 4).long()}, TypeError, "int64"),
        ({"x": torch.zeros(())}, ValueError, "x has no dimensions"),
        ({"x": [1.0]}, TypeError, "x is a list"),
        ({"eps": -1.0}, ValueError, "eps=-1.0, expected a number of at least 0"),
        ({"eps": float("nan")}, ValueError, "eps=nan"),
    ],
)
def test_bad_input(backend: str, change: dict, error: type, message: str) -> None:
    arguments = {"x": torch.zeros(3, 4), "weight": torch.zeros(4), "backend": backend} | change
    with pytest.raises(error, match=message):
        rms_norm(**arguments)

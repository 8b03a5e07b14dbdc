"""Gated activations: sizes, layouts, every activation and dtype, in place, and as a torch op."""

import pytest
import torch
from fusion.gating_cases import CASES, GatingCase
from fusion.gating_checks import DTYPES, assert_right, results
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor
from torch.autograd import gradcheck

from pyvlm.ops import gated_activation
from pyvlm.reference.gating import ACTIVATIONS


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype, gated: bool) -> None:
    # Large ones too, where exponentials leave the range of the dtype.
    gate = torch.cat([torch.randn(7, 83), 40 * torch.randn(6, 83), torch.zeros(1, 83)]).to(dtype)
    assert_right(gate, torch.randn(14, 83).to(dtype) if gated else None, activation)


@settings(max_examples=60)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    data.draw(st.random_module())
    shape = [*data.draw(st.lists(st.integers(0, 9), max_size=3)), data.draw(st.integers(0, 130))]
    dtype = data.draw(st.sampled_from(DTYPES))
    activation = data.draw(st.sampled_from(list(ACTIVATIONS)))
    up = torch.randn(shape).to(dtype) if data.draw(st.booleans()) else None
    assert_right(torch.randn(shape).to(dtype), up, activation)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: GatingCase) -> None:
    gate, *up = (case.reduced() if case.large else case).inputs(torch.float32)
    assert_right(gate, up[0] if up else None, case.activation)


def test_more_elements_than_a_thread_takes() -> None:
    assert_right(torch.randn(97, 1031), torch.randn(97, 1031), "silu")


VIEWS = {
    "halves of a joint projection": lambda x: x.chunk(2, dim=-1),
    "tokens cut off": lambda x: (x[:, 1:, :60], x[:, :-1, 60:]),
    "every second channel": lambda x: (x[..., ::2], x[..., 1::2]),
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2).chunk(2, dim=1),
    "one row for all": lambda x: (x[:1, :1].expand(3, 8, -1), x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, dtype: torch.dtype) -> None:
    gate, up = VIEWS[view](torch.randn(3, 8, 120).to(dtype))
    grad_y = torch.randn(gate.shape).to(dtype)
    expected = results(gate.contiguous(), up.contiguous(), grad_y, "silu", "native")
    for name, tensor in results(gate, up, grad_y, "silu", "native").items():
        assert tensor.equal(expected[name]), name
    if view != "one row for all":  # whose elements lie in one place
        joint = gate.clone() if gate.is_contiguous() else gate
        with torch.no_grad():
            assert gated_activation(joint, up.clone(), inplace=True, backend="native").equal(expected["y"])


@pytest.mark.parametrize("view", VIEWS)
def test_views_without_a_gate(view: str) -> None:
    x, _ = VIEWS[view](torch.randn(3, 8, 120))
    grad_y = torch.randn(x.shape)
    expected = results(x.contiguous(), None, grad_y, "quick_gelu", "native")
    for name, tensor in results(x, None, grad_y, "quick_gelu", "native").items():
        assert tensor.equal(expected[name]), name
    if view != "one row for all":
        with torch.no_grad():
            assert gated_activation(x, None, "quick_gelu", inplace=True, backend="native").equal(
                expected["y"]
            )


def test_a_gradient_that_is_one_number_everywhere() -> None:
    gate, up = (torch.randn(5, 40, requires_grad=True) for _ in range(2))
    gated_activation(gate, up, backend="native").sum().backward()
    expected = results(gate, up, torch.ones(5, 40), "silu", "native")
    assert gate.grad.equal(expected["gate"])
    assert up.grad.equal(expected["up"])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu2"])
def test_gradcheck(activation: str) -> None:
    leaves = [torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(lambda gate, up: gated_activation(gate, up, activation, backend="native"), leaves)
    assert gradcheck(lambda x: gated_activation(x, None, activation, backend="native"), leaves[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    gate, up, grad_y = (torch.randn(4, 40).to(dtype) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    torch.library.opcheck(torch.ops.pyvlm.gated_activation, (*leaves, "silu"))
    torch.library.opcheck(torch.ops.pyvlm.gated_activation, (leaves[0], None, "silu"))
    # It has no second derivative.
    utilities = ("test_schema", "test_faketensor")
    for other in (up, None):
        torch.library.opcheck(torch.ops.pyvlm.gated_activation_, (gate, other, "silu"))
        torch.library.opcheck(
            torch.ops.pyvlm.gated_activation_backward, (grad_y, gate, other, "silu"), test_utils=utilities
        )


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_compiles_in_one_graph(gated: bool, fresh_compiler: None) -> None:
    def run(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gated_activation(gate, up if gated else None, "gelu_tanh")

    x = torch.randn(3, 70, requires_grad=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), run(x.double()), run(x))
    (ours,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(run(x).sum(), x)
    assert ours.equal(expected)


def test_the_same_bits_for_any_number_of_threads() -> None:
    gate, up, grad_y = (torch.randn(300, 700) for _ in range(3))
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            runs.append(results(gate, up, grad_y, "gelu", "native"))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(run[name].equal(runs[0][name]) for name in run)


def test_gradients_of_one_alone() -> None:
    gate, up, grad_y = (torch.randn(5, 40) for _ in range(3))
    expected = results(gate, up, grad_y, "silu", "native")
    for name in ("gate", "up"):
        leaves = {"gate": gate.clone(), "up": up.clone()}
        leaf = leaves[name].requires_grad_()
        (grad,) = torch.autograd.grad(gated_activation(**leaves, backend="native"), leaf, grad_y)
        assert grad.equal(expected[name])


def test_only_gate_and_up_are_kept() -> None:
    gate, up = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        gated_activation(gate, up, backend="native")
    assert set(kept) == {gate.data_ptr(), up.data_ptr()}


def test_second_derivatives_are_the_references_alone() -> None:
    gate, up = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (grad,) = torch.autograd.grad(gated_activation(gate, up, backend="native").sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_dtypes_meet_under_autocast() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_activation(gate, up)
    assert y.equal(gated_activation(gate, up.float()))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "activation='swish' is unknown; expected one of 'silu'"),
        ({"up": torch.zeros(3, 5)}, ValueError, r"up has shape \[3, 5\], expected \[gate.shape\[0\], I\]"),
        ({"up": torch.zeros(4)}, ValueError, r"up has shape \[4\], expected \[gate.shape\[0\], I\]"),
        ({"up": torch.zeros(3, 4).double()}, TypeError, "float64"),
        ({"gate": torch.zeros(3, 4).long()}, TypeError, "int64"),
        ({"gate": torch.zeros(())}, ValueError, "gate has no dimensions"),
        ({"gate": [1.0]}, TypeError, "gate is a list"),
        ({"gate": torch.zeros(3, 4, requires_grad=True), "inplace": True}, ValueError, "inplace=True"),
    ],
)
def test_bad_input(backend: str, change: dict, error: type, message: str) -> None:
    arguments = {"gate": torch.zeros(3, 4), "up": torch.zeros(3, 4), "backend": backend} | change
    with pytest.raises(error, match=message):
        gated_activation(**arguments)

"""The native linear layer: sizes that cross its tiles, views, bit by bit, and as a torch op."""

from collections.abc import Callable

import pytest
import torch
from fusion.linear_cases import SMALL_CASES, LinearCase
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor, nn
from torch.autograd import gradcheck

from pyvlm.nn import Linear
from pyvlm.ops import linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def results(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_y: Tensor,
    backend: str = "native",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The output and every gradient; `dtype` where it is not that of x."""
    given = {"x": x, "weight": weight, "bias": bias}
    leaves = {
        name: t.detach().to(dtype or x.dtype).requires_grad_() for name, t in given.items() if t is not None
    }
    y = linear(**leaves, backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def assert_right(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    grad_y = torch.randn(*x.shape[:-1], len(weight)).to(x.dtype)
    actual = results(x, weight, bias, grad_y)
    plain = results(x, weight, bias, grad_y, "reference")
    expected = results(x, weight, bias, grad_y, "reference", torch.float64)
    for name, tensor in actual.items():
        assert tensor.is_contiguous()
        assert_close(tensor, expected[name], plain=plain[name], name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_sizes(case: LinearCase, dtype: torch.dtype) -> None:
    assert_right(*case.inputs(dtype))


def test_more_rows_than_are_packed_at_once() -> None:
    # 32 MB of a packed operand are made at a time: 4 chunks of 512 rows here.
    assert_right(torch.randn(2100, 4100), torch.randn(8, 4100) / 64, None)


@settings(max_examples=60)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    data.draw(st.random_module())
    leading = data.draw(st.lists(st.integers(0, 12), max_size=3))
    k, n = data.draw(st.integers(0, 400)), data.draw(st.integers(0, 400))
    dtype = data.draw(st.sampled_from(DTYPES))
    bias = torch.randn(n).to(dtype) if data.draw(st.booleans()) else None
    assert_right(torch.randn(*leading, k).to(dtype), (torch.randn(n, k) / 20).to(dtype), bias)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "CLS cut off each image": lambda x: x[:, 1:],
    "a slice of the features": lambda x: x[..., 3:100],
    "every second token": lambda x: x[:, ::2],
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "images and tokens swapped": lambda x: x.transpose(0, 1),
    "the same for every image": lambda x: x[:1].expand(3, -1, -1),
    "four dimensions, none beside the next": lambda x: x.view(3, 2, 35, 120)[:, :, :34].transpose(0, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, dtype: torch.dtype) -> None:
    x = VIEWS[view](torch.randn(3, 70, 120).to(dtype))
    weight = (torch.randn(120, 90) / 10).to(dtype).t()[:, : x.shape[-1]]
    grad_y = torch.randn(90, *x.shape[:-1]).to(dtype).movedim(0, -1)
    expected = results(x.contiguous(), weight.contiguous(), None, grad_y.contiguous())
    for name, tensor in results(x, weight, None, grad_y).items():
        assert tensor.equal(expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 31, 32, 257, 5001])
@pytest.mark.parametrize("tokens", range(1, 10))  # up to eight the weight is read once
def test_few_tokens(tokens: int, features: int, dtype: torch.dtype) -> None:
    assert_right(*LinearCase("", "", tokens, features, 70).inputs(dtype))


def test_few_tokens_are_rounded_once() -> None:
    x, weight, bias = LinearCase("", "", 3, 300, 500).inputs(torch.bfloat16)
    wide = linear(x.float(), weight.float(), bias.float(), "native")
    assert linear(x, weight, bias, "native").equal(wide.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_tokens_of_views(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 2, 70).to(dtype)[..., 3:40], torch.randn(90, 120).to(dtype)[::2, 5:42]
    expected = linear(x.contiguous(), weight.contiguous(), backend="native")
    assert linear(x, weight, backend="native").equal(expected)
    turned = weight.t().contiguous().t()  # torch's product
    assert_close(linear(x, turned, backend="native"), x.double() @ weight.double().mT, expected)


def test_of_few_tokens_each_has_the_bits_it_has_alone() -> None:
    x, weight, bias = LinearCase("", "", 8, 300, 500).inputs(torch.float32)
    together = linear(x, weight, bias, "native")
    for token, alone in zip(x, together, strict=True):
        assert linear(token, weight, bias, "native").equal(alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modules_of_few_tokens(dtype: torch.dtype) -> None:
    x, weight, bias = LinearCase("", "", 2, 40, 30).inputs(dtype)
    layer = Linear(40, 30, dtype=dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    plain = nn.functional.linear(x, weight, bias)
    with torch.no_grad():
        y = layer(x)
    assert_close(y, x.double() @ weight.double().T + bias.double(), plain)
    assert y.equal(linear(x, weight, bias, "native"))
    assert torch.func.grad(lambda x: layer(x).sum())(x).equal(
        nn.functional.linear(torch.ones_like(y), weight.T)
    )


def test_a_gradient_that_is_one_number_everywhere() -> None:
    x, weight = torch.randn(128, 128, requires_grad=True), torch.randn(128, 128, requires_grad=True)
    linear(x, weight, backend="native").sum().backward()
    ones = torch.ones(128, 128, dtype=torch.float64)
    assert_close(x.grad, ones @ weight.detach().double(), torch.ones(128, 128) @ weight.detach())
    assert_close(weight.grad, ones @ x.detach().double(), torch.ones(128, 128) @ x.detach())


def test_gradcheck() -> None:
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (4,))
    ]
    assert gradcheck(lambda x, weight, bias: linear(x, weight, bias, "native"), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    inputs = LinearCase("", "", 1100, 260, 330).inputs(dtype)
    grad_y = torch.randn(1100, 330).to(dtype)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            runs.append(results(*inputs, grad_y))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(run[name].equal(runs[0][name]) for name in run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_token_breaks_no_other(dtype: torch.dtype) -> None:
    x, weight, bias = LinearCase("", "", 170, 90, 100).inputs(dtype)
    y = linear(x, weight, bias, "native")
    x[3] = torch.nan
    broken = linear(x, weight, bias, "native")
    others = torch.arange(len(x)) != 3
    assert broken[3].isnan().all()
    assert broken[others].equal(y[others])


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_changes_no_other_gradient(frozen: str) -> None:
    names = ("x", "weight", "bias")
    leaves = dict(zip(names, LinearCase("", "", 128, 128, 128).inputs(torch.float32), strict=True))
    grad_y = torch.randn(128, 128)
    expected = results(*leaves.values(), grad_y)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    linear(**leaves, backend="native").backward(grad_y)
    assert leaves[frozen].grad is None
    assert all(leaf.grad.equal(expected[name]) for name, leaf in leaves.items() if name != frozen)


def test_under_autocast() -> None:
    x, weight, bias = LinearCase("", "", 128, 128, 128).inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias, "native")
    assert y.equal(linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), "native"))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", [3, 140], ids=["few tokens", "many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, tokens: int, bias: bool) -> None:
    x, weight, b = LinearCase("", "", tokens, 96, 100).inputs(dtype)
    grad_y = torch.randn(tokens, 100).to(dtype)
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(torch.ops.pyvlm.linear_backward.default, (grad_y, x, weight, needs))
    for tensor in (x, weight, b):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.pyvlm.linear.default, (x, weight, b if bias else None))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_in_one_graph() -> None:
    _, weight, bias = LinearCase("", "", 1, 96, 136).inputs(torch.float32)

    def layer(x: Tensor) -> Tensor:
        return linear(x, weight, bias, "native") * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (100, 130):
        x = torch.randn(2, tokens, 96, requires_grad=True)
        y = compiled(x)
        assert y.equal(layer(x))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.equal(torch.autograd.grad(layer(x).sum(), x)[0])


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(
        linear(x, torch.randn(2, 3), backend="native").square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r'no second derivative .* use backend="reference"'):
        grad.sum().backward()


BAD = {
    "other features": (
        lambda: linear(torch.zeros(2, 3), torch.zeros(5, 4)),
        ValueError,
        r"weight has shape \[5, 4\], expected \[N, K\] with .*K = 3 \(from x\)",
    ),
    "no dimensions": (
        lambda: linear(torch.tensor(1.0), torch.zeros(5, 4)),
        ValueError,
        "x has no dimensions",
    ),
    "other dtype": (
        lambda: linear(torch.zeros(2, 3), torch.zeros(5, 3).half()),
        TypeError,
        "weight is torch.float16 but x is torch.float32",
    ),
    "integers": (lambda: linear(torch.zeros(2, 3).int(), torch.zeros(5, 3)), TypeError, "floating-point"),
    "bias of another length": (
        lambda: linear(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(4)),
        ValueError,
        r"bias has shape \[4\], expected \[N\] with N = 5",
    ),
    "the op itself": (
        lambda: torch.ops.pyvlm.linear(torch.zeros(2, 3), torch.zeros(5, 4), None),
        RuntimeError,
        r"linear: x is \[2, 3\] and weight \[5, 4\]; expected \[\.\., K\] and \[N, K\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()

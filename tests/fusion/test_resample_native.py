"""The native resampler: values, gradients, what torch asks of an op, and the module around it."""

import pytest
import torch
from fusion.resample_cases import SMALL_CASES, ResampleCase
from tolerance import assert_close
from torch import Tensor
from torch.autograd import gradcheck

from pyvlm.ops import resample

NAMES = ("features", "query", "query_position", "key_position", "in_proj_weight", "out_proj_weight")
BIASES = ("in_proj_bias", "out_proj_bias")


def arguments(
    images: int, tokens: int, queries: int, dim: int, dtype: torch.dtype, biases: bool = True
) -> dict[str, Tensor]:
    shapes = [
        (images, tokens, dim),
        (queries, dim),
        (queries, dim),
        (tokens, dim),
        (3 * dim, dim),
        (dim, dim),
    ]
    given = {name: torch.randn(shape) for name, shape in zip(NAMES, shapes, strict=True)}
    if biases:
        given |= {"in_proj_bias": torch.randn(3 * dim), "out_proj_bias": torch.randn(dim)}
    return {name: ((t * dim**-0.5) if name.endswith("weight") else t).to(dtype) for name, t in given.items()}


def results(
    given: dict[str, Tensor], heads: int, grad_y: Tensor, backend: str, dtype: torch.dtype
) -> list[Tensor]:
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in given.items()}
    y = resample(**leaves, num_heads=heads, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad_y.to(dtype))]


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("images", "tokens", "queries", "dim", "heads"),
    [(2, 49, 16, 64, 4), (3, 17, 5, 22, 2), (1, 1, 1, 8, 8), (0, 4, 2, 8, 2), (4, 70, 33, 130, 1)],
)
def test_values_and_gradients(
    images: int, tokens: int, queries: int, dim: int, heads: int, dtype: torch.dtype, biases: bool
) -> None:
    given = arguments(images, tokens, queries, dim, dtype, biases)
    grad_y = torch.randn(images, queries, dim).to(dtype)
    actual = results(given, heads, grad_y, "native", dtype)
    plain = results(given, heads, grad_y, "reference", dtype)
    expected = results(given, heads, grad_y, "reference", torch.float64)
    for name, a, e, p in zip(("y", *given), actual, expected, plain, strict=True):
        # Of a single key the softmax is 1: the scores' gradients, of terms of about 1, are zero.
        assert_close(a, e, plain=p, name=name, terms=1.0 if tokens == 1 else 0.0)


def test_gradcheck() -> None:
    leaves = [t.requires_grad_() for t in arguments(2, 3, 2, 4, torch.float64).values()]

    def run(*tensors: Tensor) -> Tensor:
        return resample(*tensors[:6], 2, *tensors[6:], "native")

    assert gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    given = [t.requires_grad_() for t in arguments(2, 9, 4, 16, dtype).values()]
    torch.library.opcheck(torch.ops.pyvlm.resample.default, (*given[:6], 2, *given[6:]))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_in_one_graph() -> None:
    parameters = {name: t for name, t in arguments(1, 9, 4, 16, torch.float32).items() if name != "features"}

    def run(features: Tensor) -> Tensor:
        return resample(features, **parameters, num_heads=2, backend="native")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for images in (2, 5):
        x = torch.randn(images, 9, 16, requires_grad=True)
        y = compiled(x)
        assert y.equal(run(x))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.equal(torch.autograd.grad(run(x).sum(), x)[0])


def test_the_same_bits_for_any_number_of_threads() -> None:
    given, grad_y = arguments(3, 150, 64, 128, torch.float32), torch.randn(3, 64, 128)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            runs.append(results(given, 2, grad_y, "native", torch.float32))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(a.equal(b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_module(case: ResampleCase) -> None:
    module = case.module()
    expected = case.module().double()
    expected.backend = "reference"
    plain = case.module()
    plain.backend = "reference"
    x = case.features()
    assert_close(module(x), expected(x.double()).detach(), plain(x).detach())


def test_module_under_autocast() -> None:
    case = SMALL_CASES[1]
    module, plain = case.module(), case.module()
    plain.backend = "reference"
    x = case.features()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = module(x), plain(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, case.module().double()(x.double()).detach(), expected)

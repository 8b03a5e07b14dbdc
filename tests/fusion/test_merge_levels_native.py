"""The native merge of levels: sizes that cross its tiles, bit by bit, and as a torch op."""

from collections.abc import Sequence

import pytest
import torch
from fusion.fusion_cases import SMALL_CASES, MergeCase
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor

from pyvlm.ops.fusion import merge_levels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARED = MergeCase("shared", "", 3, 2, 37, 40, 24)
PER_LEVEL = MergeCase("per level", "", 3, 2, 37, 40, 24, "wbgn")
BOTH = pytest.mark.parametrize("case", [SHARED, PER_LEVEL], ids=lambda case: case.name)

Parameters = dict[str, Tensor]


def results(
    levels: Sequence[Tensor], parameters: Parameters, grad_out: Tensor, backend: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output and every gradient."""
    # Not detach().to(dtype): a copy would lose the strides.
    maps = [level.to(dtype).detach().requires_grad_() for level in levels]
    leaves = {name: p.to(dtype).detach().requires_grad_() for name, p in parameters.items()}
    out = merge_levels(maps, **leaves, backend=backend)
    named = {f"level {i}": level for i, level in enumerate(maps)} | leaves
    grads = torch.autograd.grad(out, list(named.values()), grad_out.to(dtype))
    return {"out": out.detach()} | dict(zip(named, grads, strict=True))


def assert_right(levels: Sequence[Tensor], parameters: Parameters) -> None:
    dtype, features = levels[0].dtype, parameters["weight"].shape[-2]
    grad_out = torch.randn(*levels[0].shape[:2], features).to(dtype)
    actual = results(levels, parameters, grad_out, "native", dtype)
    plain = results(levels, parameters, grad_out, "reference", dtype)
    expected = results(levels, parameters, grad_out, "reference", torch.float64)
    # The norm of one channel is 0, and a level's gradient is what is left of two equal terms of this size.
    one_channel = 1e-5**-0.5 if levels[0].shape[-1] == 1 else 0.0
    for name, tensor in actual.items():
        terms = one_channel if name.startswith("level") else 0.0
        assert_close(tensor, expected[name], plain[name], name, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_sizes(case: MergeCase, dtype: torch.dtype) -> None:
    assert_right(*case.inputs(dtype))


@settings(max_examples=60)
@given(data=st.data())
def test_any_layout(data: st.DataObject) -> None:
    """Any strides: tokens cut off, images apart, tokens or channels far from each other, one map expanded."""
    images, tokens, channels = (data.draw(st.integers(1, most)) for most in (3, 40, 70))
    letters = "".join(letter for letter in "wbgn" if data.draw(st.booleans()))
    case = MergeCase("any", "", data.draw(st.integers(1, 4)), images, tokens, channels, 1 + tokens, letters)
    levels, parameters = case.inputs(data.draw(st.sampled_from(DTYPES)))
    for name in ("bias", "ln_weight", "ln_bias"):
        if data.draw(st.booleans()):
            del parameters[name]
    layouts = {
        "as made": lambda x: x,
        "CLS cut off": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
        "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every other token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "channels of a wider map": lambda x: torch.cat([x, x], 2)[..., channels:],
        "one image": lambda x: x[:1].expand(images, -1, -1),
    }
    levels = [layouts[data.draw(st.sampled_from(sorted(layouts)))](level) for level in levels]
    assert_right(levels, parameters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH
def test_the_same_bits_for_any_number_of_threads(case: MergeCase, dtype: torch.dtype) -> None:
    levels, parameters = MergeCase("", "", 3, 2, 400, 200, 136, case.per_level).inputs(dtype)
    grad_out = torch.randn(2, 400, 136)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            runs.append(results(levels, parameters, grad_out, "native", dtype))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(run[name].equal(runs[0][name]) for name in run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_means_cancel_nothing(dtype: torch.dtype) -> None:
    levels, parameters = SHARED.inputs(dtype)
    assert_right([level + 100 for level in levels], parameters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH
def test_a_broken_token_breaks_no_other(case: MergeCase, dtype: torch.dtype) -> None:
    levels, parameters = case.inputs(dtype)
    out = merge_levels(levels, **parameters, backend="native")
    levels[1][1, 5] = torch.nan
    broken = merge_levels(levels, **parameters, backend="native")
    assert broken[1, 5].isnan().all()
    broken[1, 5] = out[1, 5]
    assert broken.equal(out)


@pytest.mark.parametrize("trained", ["levels", "alpha", "weight", "bias", "ln_weight", "ln_bias"])
@BOTH
def test_what_is_frozen_changes_no_other_gradient(case: MergeCase, trained: str) -> None:
    levels, parameters = case.inputs(torch.float32)
    grad_out = torch.randn(2, 37, 24)
    expected = results(levels, parameters, grad_out, "native", torch.float32)
    leaves = {"level 1": levels[1]} if trained == "levels" else {trained: parameters[trained]}
    for leaf in leaves.values():
        leaf.requires_grad_()
    merge_levels(levels, **parameters, backend="native").backward(grad_out)
    assert all(leaf.grad.equal(expected[name]) for name, leaf in leaves.items())
    assert all(level.grad is None for level in levels if not level.requires_grad)


@BOTH
def test_only_inputs_and_statistics_are_saved(case: MergeCase) -> None:
    levels, parameters = case.inputs(torch.bfloat16)
    tensors = [*levels, *parameters.values()]
    for tensor in tensors:
        tensor.requires_grad_()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        merge_levels(levels, **parameters, backend="native")
    statistics = 2 * 4 * case.levels * case.images * case.tokens
    assert sum(saved.values()) == sum(t.nbytes for t in tensors) + statistics


def test_nothing_is_kept_without_a_gradient() -> None:
    levels, parameters = SHARED.inputs(torch.bfloat16)
    op = torch.ops.pyvlm.merge_levels
    assert [t.shape for t in op(levels, *parameters.values(), 1e-5, False)[1:]] == [(0,), (0,)]
    out, mean, rstd = op(levels, *parameters.values(), 1e-5, True)
    assert mean.dtype == rstd.dtype == torch.float32
    stacked = torch.stack(levels).double().flatten(1, 2)
    torch.testing.assert_close(mean.double(), stacked.mean(-1), atol=1e-5, rtol=1e-5)
    expected = (stacked.var(-1, correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, atol=1e-5, rtol=1e-5)
    assert out.equal(op(levels, *parameters.values(), 1e-5, False)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("optional", [False, True], ids=["", "bias and norm"])
@BOTH
def test_opcheck(case: MergeCase, optional: bool, dtype: torch.dtype) -> None:
    levels, parameters = MergeCase("", "", 2, 2, 9, 8, 6, case.per_level).inputs(dtype)
    arguments = [*parameters.values()] if optional else [*list(parameters.values())[:2], None, None, None]
    _, *statistics = torch.ops.pyvlm.merge_levels(levels, *arguments, 1e-5, True)
    grad_out = torch.randn(2, 9, 6).to(dtype)
    for needs in ([True] * 6, [False, True, False, True, False, True], [True] + [False] * 5):
        needs = [need and (optional or i < 3) for i, need in enumerate(needs)]
        torch.library.opcheck(
            torch.ops.pyvlm.merge_levels_backward.default, (grad_out, levels, *arguments, *statistics, needs)
        )
    for tensor in (*levels, *parameters.values()):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.pyvlm.merge_levels.default, (levels, *arguments, 1e-5, True))


@BOTH
def test_gradcheck(case: MergeCase) -> None:
    levels, parameters = MergeCase("", "", 2, 1, 5, 7, 4, case.per_level).inputs(torch.float64)
    leaves = [*levels, *parameters.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *given: merge_levels(given[:2], *given[2:], backend="native"), leaves
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@BOTH
def test_compiles_in_one_graph(case: MergeCase, compiler: str) -> None:
    def merge(levels: list[Tensor], parameters: Parameters) -> Tensor:
        return merge_levels(levels, **parameters, backend="native") * 2

    compiled = torch.compile(merge, fullgraph=True, dynamic=True, backend=compiler)
    for tokens in (9, 12):
        levels, parameters = MergeCase("", "", 3, 2, tokens, 16, 8, case.per_level).inputs(torch.float32)
        leaves = [*levels, *parameters.values()]
        for leaf in leaves:
            leaf.requires_grad_()
        grads = []
        for function in (compiled, merge):
            out = function(levels, parameters)
            grads.append([out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        assert all(actual.equal(expected) for actual, expected in zip(*grads, strict=True))


@BOTH
def test_autocast_takes_levels_and_projections_to_its_type(case: MergeCase) -> None:
    levels, parameters = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = merge_levels(levels, **parameters, backend="native")
    halves = {name: p.bfloat16() if name in ("weight", "bias") else p for name, p in parameters.items()}
    assert out.dtype == torch.bfloat16
    expected = torch.ops.pyvlm.merge_levels([x.bfloat16() for x in levels], *halves.values(), 1e-5, False)
    assert out.equal(expected[0])


def test_gradients_have_the_types_of_parameters_under_autocast() -> None:
    levels, parameters = PER_LEVEL.inputs(torch.float32)
    for tensor in (*levels, *parameters.values()):
        tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = merge_levels(levels, **parameters, backend="native")
    out.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in (*levels, *parameters.values()))


def test_a_second_derivative_is_refused() -> None:
    levels, parameters = SHARED.inputs(torch.float64)
    levels[0].requires_grad_()
    out = merge_levels(levels, **parameters, backend="native")
    (grad,) = torch.autograd.grad(out.sum(), levels[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative .* use backend="reference"'):
        grad.sum().backward()


BAD_ARGUMENTS = {
    "no level": ({"levels": []}, "levels is empty"),
    "a level of another shape": (
        {"levels": [torch.ones(2, 5, 4), torch.ones(2, 4, 4)]},
        r"levels\[1\] has shape",
    ),
    "a level of another type": (
        {"levels": [torch.ones(2, 5, 4), torch.ones(2, 5, 4).double()]},
        r"levels\[1\] is Double and levels\[0\] is Float",
    ),
    "integers": ({"levels": [torch.ones(2, 5, 4, dtype=torch.int32)] * 2}, "expected float32, bfloat16"),
    "alpha": ({"alpha": torch.ones(3)}, r"alpha has shape \[3\], expected \[2\]"),
    "weight": ({"weight": torch.ones(3, 5)}, r"weight has shape \[3, 5\], expected \[H, 4\]"),
    "type of the weight": ({"weight": torch.ones(3, 4).half()}, "weight is Half and the levels are Float"),
    "bias": ({"bias": torch.ones(4)}, r"bias has shape \[4\], expected \[3\] or \[2, 3\]"),
    "ln_weight": ({"ln_weight": torch.ones(3, 4)}, r"ln_weight has shape \[3, 4\], expected \[4\]"),
}


@pytest.mark.parametrize(("given_", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_the_op_checks_what_its_kernels_rely_on(given_: dict[str, object], message: str) -> None:
    arguments = {
        "levels": [torch.ones(2, 5, 4)] * 2,
        "alpha": torch.ones(2),
        "weight": torch.ones(3, 4),
        "bias": None,
        "ln_weight": None,
        "ln_bias": None,
        "eps": 1e-5,
        "keep_statistics": False,
    } | given_
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.pyvlm.merge_levels(**arguments)

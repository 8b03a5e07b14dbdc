"""The native attention to windows: sizes that cross its vectors and tasks, bit by bit, and as torch ops."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fusion.cross_attention_cases import LARGE_CASES, SMALL_CASES, LocalCase
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor
from torch.autograd import gradcheck

from pyvlm.ops import local_cross_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BY_NAME = {case.name: case for case in SMALL_CASES}
PRIME, MASKED = BY_NAME["prime"], BY_NAME["masked"]

Attend = Callable[..., Tensor]


def of_case(case: LocalCase, backend: str, scale: float | None = None, masks: Any = None) -> Attend:
    """The op as a function of the query, the keys and the values."""
    maps = len(case.sides)
    masks = case.masks() if masks is None else masks

    def attend(query: Tensor, *tensors: Tensor) -> Tensor:
        return local_cross_attention(query, tensors[:maps], tensors[maps:], case.grid, masks, scale, backend)

    return attend


def results(attend: Attend, inputs: list[Tensor], grad_out: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output and every gradient."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))]


def flat(case: LocalCase, dtype: torch.dtype) -> list[Tensor]:
    query, keys, values = case.inputs(dtype)
    return [query, *keys, *values]


def assert_right(
    case: LocalCase, inputs: list[Tensor], scale: float | None = None, masks: Any = None
) -> None:
    dtype, grad_out = inputs[0].dtype, torch.randn(inputs[0].shape).to(inputs[0].dtype)
    actual = results(of_case(case, "native", scale, masks), inputs, grad_out, dtype)
    plain = results(of_case(case, "reference", scale, masks), inputs, grad_out, dtype)
    expected = results(of_case(case, "reference", scale, masks), inputs, grad_out, torch.float64)
    # Gradients of scores are differences from the mean, which is all there is where a query sees one key.
    factor = inputs[0].shape[-1] ** -0.5 if scale is None else abs(scale)
    mean = factor * largest((grad_out * expected[0]).sum(-1))
    maps = len(case.sides)
    terms = [0.0, mean * max(map(largest, inputs[1 : 1 + maps])), *[mean * largest(inputs[0])] * maps]
    terms += [0.0] * maps
    for i, tensor in enumerate(actual):
        name = "out" if i == 0 else f"gradient of input {i - 1}"
        assert tensor.dtype == dtype
        assert_close(tensor, expected[i], plain[i], name, terms[i])


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SMALL_CASES, LARGE_CASES[1].reduced()], ids=lambda case: case.name)
def test_sizes(case: LocalCase, dtype: torch.dtype) -> None:
    assert_right(case, flat(case, dtype))


@settings(max_examples=80)
@given(data=st.data())
def test_any_windows(data: st.DataObject) -> None:
    data.draw(st.random_module())
    case = LocalCase(
        *("any", "hypothesis"),
        images=data.draw(st.integers(0, 3)),
        heads=data.draw(st.integers(1, 20)),
        dim=data.draw(st.integers(1, 70)),
        grid=(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))),
        sides=tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))),
    )
    share = data.draw(st.sampled_from([None, 0.0, 0.5, 0.9]))
    sizes = [(case.images, case.queries * side**2) for side in case.sides]
    masks = None if share is None else [torch.rand(size) < share for size in sizes]
    dtype = data.draw(st.sampled_from(DTYPES))
    assert_right(case, flat(case, dtype), data.draw(st.sampled_from([None, 0.3, -0.2, 0.0])), masks)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in other places."""
    images, heads, tokens, dim = x.shape
    wide = torch.full((images, tokens, heads, 2 * dim + 3), torch.nan, dtype=x.dtype)
    wide[..., 2 : 2 + dim] = x.transpose(1, 2)
    return {
        "heads first": x.contiguous(),
        "rows apart": wide[..., 2 : 2 + dim].transpose(1, 2),
        "features apart": x.transpose(2, 3).contiguous().transpose(2, 3),
        "images last": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }


@pytest.mark.parametrize("layout", ["heads first", "rows apart", "features apart", "images last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_give_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    inputs, attend = flat(PRIME, dtype), of_case(PRIME, "native")
    grad_out = torch.randn(inputs[0].shape).to(dtype)

    def run(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    expected = run(inputs, grad_out)
    moved = run([layouts(x)[layout] for x in inputs], layouts(grad_out)[layout])
    assert all(a.equal(b) for a, b in zip(moved, expected, strict=True))


def test_joining_the_heads_copies_nothing() -> None:
    inputs = flat(PRIME, torch.float32)
    out, *grads = results(of_case(PRIME, "native"), inputs, torch.ones(inputs[0].shape), torch.float32)
    for tensor in (out, *grads):
        assert tensor.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    case = LocalCase("threads", "several tasks", 2, 16, 64, (8, 8), (1, 4), masked=True)
    inputs = flat(case, dtype)
    grad_out = torch.randn(inputs[0].shape)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            runs.append(results(of_case(case, "native"), inputs, grad_out, dtype))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(a.equal(b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 24), (torch.float32, 12)], ids=str)
def test_gradients_that_go_past_the_caches_have_the_same_bits(dtype: torch.dtype, rows: int) -> None:
    # From 32 MB on: both images together, but not one.
    case = LocalCase("two", "images", 2, 16, 64, (rows, 12), (1, 1, 1, 4))
    one = replace(case, images=1)
    inputs = flat(case, dtype)
    grad_out = torch.randn(inputs[0].shape)
    both = results(of_case(case, "native"), inputs, grad_out, dtype)
    assert sum(x.nbytes for x in both[2:]) > 32 << 20 > sum(x[:1].nbytes for x in both[2:])
    for image in (slice(0, 1), slice(1, 2)):
        alone = results(of_case(one, "native"), [x[image] for x in inputs], grad_out[image], dtype)
        assert all(a[image].equal(b) for a, b in zip(both, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_and_values_are_not_read(dtype: torch.dtype) -> None:
    inputs, attend, masks = flat(MASKED, dtype), of_case(MASKED, "native"), MASKED.masks()
    grad_out = torch.randn(inputs[0].shape)
    clean = results(attend, inputs, grad_out, dtype)
    for tensor, mask in zip(inputs[1:], masks * 2, strict=True):
        tensor.masked_fill_(~mask[:, None, :, None], torch.nan)
    broken = results(attend, inputs, grad_out, dtype)
    assert all(a.equal(b) for a, b in zip(broken, clean, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_broken_query_breaks_no_other(dtype: torch.dtype) -> None:
    inputs, attend = flat(PRIME, dtype), of_case(PRIME, "native")
    clean = attend(*inputs)
    inputs[0][1, 2, 3] = torch.nan
    broken = attend(*inputs)
    others = torch.ones(clean.shape[:3], dtype=torch.bool)
    others[1, 2, 3] = False
    assert broken[1, 2, 3].isnan().all()
    assert broken[others].equal(clean[others])


@pytest.mark.parametrize("size", [1e3, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_any_size(dtype: torch.dtype, size: float) -> None:
    query, *maps = flat(PRIME, dtype)
    out = of_case(PRIME, "native")(query * size, *maps)
    expected = of_case(PRIME, "reference")((query * size).double(), *(x.double() for x in maps))
    assert_close(out, expected, of_case(PRIME, "reference")(query * size, *maps))


def test_lse_is_of_all_visible_keys() -> None:
    query, keys, values = MASKED.inputs(torch.float64)
    masks, rows = MASKED.masks(), MASKED.grid
    _, lse = torch.ops.pyvlm.local_cross_attention(query, keys, values, *rows, masks, 0.3)
    # The same softmax as a query's share: a value of ones at one map's keys sums up its weights.
    masks[0].fill_(False)
    _, without_first = torch.ops.pyvlm.local_cross_attention(query, keys, values, *rows, masks, 0.3)
    ones = [torch.full_like(v, float(i == 0)) for i, v in enumerate(values)]
    share = local_cross_attention(query, keys, ones, MASKED.grid, MASKED.masks(), 0.3)[..., 0]
    seen = without_first.isfinite()
    assert 0 < seen.sum() < seen.numel()
    expected = torch.where(seen, -torch.expm1(without_first - lse), share)
    assert_close(share[seen], expected[seen], share[seen])
    assert lse[0].isfinite().all()
    assert lse.isneginf().any()


def test_gradcheck() -> None:
    case = LocalCase("gradcheck", "small", 1, 2, 3, (2, 1), (1, 2), masked=True)
    masks = [torch.rand(1, case.queries * side**2) < 0.7 for side in case.sides]
    leaves = [x.contiguous().requires_grad_() for x in flat(case, torch.float64)]
    assert gradcheck(of_case(case, "native", 0.7, masks), leaves)


def test_only_inputs_and_results_are_saved() -> None:
    inputs = [x.requires_grad_() for x in flat(MASKED, torch.bfloat16)]
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = of_case(MASKED, "native")(*inputs)
    masks = sum(mask.nbytes for mask in MASKED.masks())
    lse = 4 * out.numel() // MASKED.dim
    assert sum(saved.values()) == sum(t.nbytes for t in (out, *inputs)) + masks + lse


@pytest.mark.parametrize("frozen", range(5))
def test_what_is_frozen_changes_no_other_gradient(frozen: int) -> None:
    case = BY_NAME["one-head"]
    inputs, attend = flat(case, torch.float32), of_case(case, "native")
    grad_out = torch.randn(inputs[0].shape)
    expected = results(attend, inputs, grad_out, torch.float32)[1:]
    leaves = [x.requires_grad_(i != frozen) for i, x in enumerate(inputs)]
    attend(*leaves).backward(grad_out)
    assert leaves[frozen].grad is None
    assert all(leaf.grad.equal(expected[i]) for i, leaf in enumerate(leaves) if i != frozen)


@pytest.mark.parametrize("case", [PRIME, MASKED], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(case: LocalCase, dtype: torch.dtype) -> None:
    query, keys, values = case.inputs(dtype)
    arguments = (query, keys, values, *case.grid, case.masks() or [], 0.5)
    out, lse = torch.ops.pyvlm.local_cross_attention(*arguments)
    grad_out = torch.randn(out.shape).to(dtype)
    torch.library.opcheck(
        torch.ops.pyvlm.local_cross_attention_backward.default, (grad_out, *arguments, out, lse)
    )
    for tensor in (query, *keys, *values):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.pyvlm.local_cross_attention.default, arguments)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", [PRIME, MASKED], ids=lambda case: case.name)
def test_compiles_in_one_graph(case: LocalCase, compiler: str) -> None:
    inputs, attend = flat(case, torch.float32), of_case(case, "native")
    grad_out = torch.randn(inputs[0].shape)
    compiled = torch.compile(lambda *args: attend(*args) * 2, fullgraph=True, backend=compiler)
    actual = results(compiled, inputs, grad_out, torch.float32)
    expected = results(lambda *args: attend(*args) * 2, inputs, grad_out, torch.float32)
    for a, b in zip(actual, expected, strict=True):
        assert a.equal(b)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_batches_of_any_size() -> None:
    attend = of_case(PRIME, "native")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for images in (2, 3, 5):
        inputs = [torch.randn(images, *x.shape[1:]) for x in flat(PRIME, torch.float32)]
        with torch._dynamo.config.patch(error_on_recompile=images > 2):
            assert compiled(*inputs).equal(attend(*inputs))


def test_autocast_runs_in_its_dtype() -> None:
    query, *maps = flat(PRIME, torch.float32)
    halves = [x.bfloat16() for x in (query, *maps)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = of_case(PRIME, "native")(query, *halves[1:])
    assert mixed.equal(of_case(PRIME, "native")(*halves))


def test_a_second_derivative_is_refused() -> None:
    leaves = [x.requires_grad_() for x in flat(PRIME, torch.float64)]
    out = of_case(PRIME, "native")(*leaves)
    (grad,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative .* use backend="reference"'):
        grad.sum().backward()


# ---- what the op itself refuses

QUERY, FINE = torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 16, 3)
BAD = {
    "a grid of other queries": ((QUERY, [QUERY], [QUERY], 2, 3, [], 1.0), ValueError, "on a grid of 2 x 3"),
    "no maps": ((QUERY, [], [], 2, 2, [], 1.0), ValueError, "0 keys, 0 values, 0 masks"),
    "a value less": ((QUERY, [QUERY, FINE], [QUERY], 2, 2, [], 1.0), ValueError, "2 keys, 1 values"),
    "a window that is no square": (
        (QUERY, [FINE[:, :, :8]], [FINE[:, :, :8]], 2, 2, [], 1.0),
        ValueError,
        r"keys\[0\] is \[1, 2, 8, 3\]",
    ),
    "values of another map": ((QUERY, [FINE], [QUERY], 2, 2, [], 1.0), ValueError, r"values\[0\]"),
    "another dtype": ((QUERY, [FINE.double()], [FINE], 2, 2, [], 1.0), TypeError, "expected one dtype"),
    "integers": ((QUERY.int(), [QUERY.int()], [QUERY.int()], 2, 2, [], 1.0), TypeError, "query is Int"),
    "a mask of another map": (
        (QUERY, [FINE], [FINE], 2, 2, [torch.ones(1, 4, dtype=torch.bool)], 1.0),
        ValueError,
        r"masks\[0\] is Bool \[1, 4\]; expected bool \[1, 16\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        torch.ops.pyvlm.local_cross_attention(*arguments)


def test_the_backward_refuses_results_of_another_forward() -> None:
    arguments = (QUERY, [FINE], [FINE], 2, 2, [], 1.0)
    out, lse = torch.ops.pyvlm.local_cross_attention(*arguments)
    with pytest.raises(ValueError, match=r"lse Float \[1, 2, 3\]"):
        torch.ops.pyvlm.local_cross_attention_backward(out, *arguments, out, lse[..., :3])

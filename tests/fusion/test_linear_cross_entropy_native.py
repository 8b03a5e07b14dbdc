"""The native head and loss: sizes that cross its tiles, bit by bit, in memory, and as torch ops."""

import sys
from typing import Any

import pytest
import torch
from fusion.loss_cases import SMALL_CASES, LossCase
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor
from torch.autograd import gradcheck

from benchmarks.harness.measure import peak_memory
from pyvlm.ops import linear_cross_entropy
from pyvlm.ops._backends import resolve

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BY_NAME = {case.name: case for case in SMALL_CASES}
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "softcap": {"softcap": 1.5},
    "smoothing": {"label_smoothing": 0.2},
    "z loss": {"z_loss": 0.3},
    "all": {"softcap": 2.0, "label_smoothing": 0.1, "z_loss": 0.05, "reduction": "sum"},
}
NAMES = ("loss", "hidden", "weight", "bias")
Leaves = tuple[Tensor, Tensor, Tensor | None]


def results(
    leaves: Leaves, labels: Tensor, backend: str, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """The loss and every gradient, times 3."""
    hidden, weight, bias = (
        None if leaf is None else leaf.to(dtype).detach().requires_grad_() for leaf in leaves
    )
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend, **options)
    present = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    grads = torch.autograd.grad(3 * loss, present)
    return dict(zip(NAMES, (loss.detach(), *grads), strict=False))


def assert_right(leaves: Leaves, labels: Tensor, **options: Any) -> None:
    dtype = leaves[0].dtype
    actual = results(leaves, labels, "native", dtype, **options)
    plain = results(leaves, labels, "reference", dtype, **options)
    expected = results(leaves, labels, "reference", torch.float64, **options)
    for name, tensor in actual.items():
        assert tensor.dtype == plain[name].dtype
        assert_close(tensor, expected[name], plain=plain[name], name=name)


def test_it_is_what_auto_takes_on_the_cpu() -> None:
    assert resolve("linear_cross_entropy", "auto", torch.device("cpu")) == "native"


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_sizes(case: LossCase, dtype: torch.dtype, bias: bool) -> None:
    leaves = case.inputs(dtype)
    assert_right(leaves if bias else (*leaves[:2], None), case.labels())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", ["more-than-a-tile", "several-chunks"])
def test_options(case: str, name: str, dtype: torch.dtype) -> None:
    assert_right(BY_NAME[case].inputs(dtype), BY_NAME[case].labels(), **OPTIONS[name])


@settings(max_examples=60)
@given(data=st.data())
def test_any_rows(data: st.DataObject) -> None:
    tokens, words = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 400))
    labeled = data.draw(st.integers(0, tokens))
    case = LossCase("any", "", tokens, labeled, data.draw(st.integers(0, 100)), words)
    leaves = case.inputs(data.draw(st.sampled_from(DTYPES)))
    options = OPTIONS[data.draw(st.sampled_from(list(OPTIONS)))]
    assert_right(leaves if data.draw(st.booleans()) else (*leaves[:2], None), case.labels(), **options)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_any_size(dtype: torch.dtype, scale: float) -> None:
    case = BY_NAME["more-than-a-tile"]
    hidden, weight, bias = case.inputs(dtype)
    assert_right((hidden * scale, weight, bias), case.labels())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_words_that_a_bias_rules_out(dtype: torch.dtype) -> None:
    case = BY_NAME["more-than-a-tile"]
    hidden, weight, bias = case.inputs(dtype)
    labels = case.labels()
    labels[labels >= 0] %= 20
    bias[20:] = -torch.inf  # a whole tile's and more
    given = results((hidden, weight, bias), labels, "native", dtype)
    few = results((hidden, weight[:20], bias[:20]), labels, "native", dtype)
    assert given["weight"][20:].eq(0).all()
    for name, tensor in few.items():
        assert torch.allclose(given[name][:20] if name in ("weight", "bias") else given[name], tensor)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name: str) -> None:
    case = LossCase("gradients", "", 6, 4, 5, 7)
    leaves = [leaf.requires_grad_() for leaf in case.inputs(torch.float64)]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, case.labels(), bias=bias, backend="native", **OPTIONS[name]
        )

    assert gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["odd-rows", "several-chunks", "several-blocks"])
def test_the_same_bits_for_any_number_of_threads(case: str, dtype: torch.dtype) -> None:
    leaves, labels = BY_NAME[case].inputs(dtype), BY_NAME[case].labels()
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            runs.append(results(leaves, labels, "native", dtype, **OPTIONS["all"]))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(run[name].equal(runs[0][name]) for name in run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_label_are_never_looked_at(dtype: torch.dtype) -> None:
    case = BY_NAME["more-than-a-tile"]
    (hidden, weight, bias), labels = case.inputs(dtype), case.labels()
    expected = results((hidden, weight, bias), labels, "native", dtype)
    hidden[labels == -100] = torch.nan
    actual = results((hidden, weight, bias), labels, "native", dtype)
    assert all(actual[name].equal(expected[name]) for name in expected)
    assert actual["hidden"][labels == -100].eq(0).all()


def test_a_broken_row_breaks_no_other() -> None:
    case = LossCase("broken", "", 40, 40, 24, 100)
    (hidden, weight, _), labels = case.inputs(torch.float32), case.labels()
    clean = results((hidden, weight, None), labels, "native", torch.float32)["hidden"]
    hidden[3] = torch.nan
    broken = results((hidden, weight, None), labels, "native", torch.float32)
    assert broken["loss"].isnan()
    others = torch.arange(40) != 3
    assert broken["hidden"][3].isnan().all()
    assert broken["hidden"][others].equal(clean[others])


@pytest.mark.parametrize("frozen", range(3))
def test_what_is_frozen_changes_no_other_gradient(frozen: int) -> None:
    case = BY_NAME["odd-rows"]
    leaves, labels = case.inputs(torch.bfloat16), case.labels()
    expected = results(leaves, labels, "native", torch.bfloat16)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i != frozen)
    (3 * linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], backend="native")).backward()
    for i, (leaf, name) in enumerate(zip(leaves, NAMES[1:], strict=True)):
        assert leaf.grad is None if i == frozen else leaf.grad.equal(expected[name])


def test_any_strides() -> None:
    case = BY_NAME["odd-rows"]
    leaves, labels = case.inputs(torch.float32), case.labels()
    expected = results(leaves, labels, "native", torch.float32)
    strided = tuple(torch.stack([leaf, leaf], -1)[..., 0] for leaf in leaves)
    assert not any(leaf.is_contiguous() for leaf in strided)
    actual = results(strided, torch.stack([labels, labels], -1)[:, 0], "native", torch.float32)
    assert all(actual[name].equal(expected[name]) for name in expected)


def test_only_inputs_and_log_z_are_saved() -> None:
    case = BY_NAME["more-than-a-tile"]
    hidden, weight, bias = (leaf.requires_grad_() for leaf in case.inputs(torch.bfloat16))
    labels, saved = case.labels(), {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, labels, bias=bias, backend="native")
    given = sum(tensor.nbytes for tensor in (hidden, weight, bias, labels))
    assert sum(saved.values()) == given + 4 * case.tokens


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc")
def test_logits_are_never_whole() -> None:
    case = LossCase("memory", "", 1000, 1000, 16, 65_536)
    hidden, weight, _ = (leaf.requires_grad_() for leaf in case.inputs(torch.bfloat16))
    labels = case.labels()

    def train() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, backend="native"), (hidden, weight))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread has a scratch of its own
    try:
        peak = peak_memory(train, torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    # The logits are 250 MiB in fp32. Measured: 21 to 27 MiB, most of it gradients of a block's logits.
    assert peak < 48 * 2**20


def arguments(case: LossCase, dtype: torch.dtype, bias: bool) -> tuple[Any, ...]:
    hidden, weight, of_words = case.inputs(dtype)
    return hidden, weight, case.labels(), -100, of_words if bias else None, 2.0, 0.1, 0.05, True


@pytest.mark.parametrize("case", ["odd-rows", "no-label"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, bias: bool, case: str) -> None:
    given = arguments(BY_NAME[case], dtype, bias)
    loss, lse = torch.ops.pyvlm.linear_cross_entropy(*given)
    for needs in ([True, True, bias], [False, True, False]):
        torch.library.opcheck(
            torch.ops.pyvlm.linear_cross_entropy_backward.default, (loss, *given, lse, needs)
        )
    for i in (0, 1, 4):
        if given[i] is not None:
            given[i].requires_grad_()
    torch.library.opcheck(torch.ops.pyvlm.linear_cross_entropy.default, given)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(compiler: str) -> None:
    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, softcap=5.0, backend="native") * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=compiler)
    for name in ("more-than-a-tile", "odd-rows"):
        case, found = BY_NAME[name], []
        for function in (compiled, run):
            hidden, weight, _ = (leaf.requires_grad_() for leaf in case.inputs(torch.float32))
            loss = function(hidden, weight, case.labels())
            found.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
        assert all(actual.equal(expected) for actual, expected in zip(*found, strict=True))


def test_autocast_brings_dtypes_together() -> None:
    case = BY_NAME["more-than-a-tile"]
    (hidden, weight, bias), labels = case.inputs(torch.float32), case.labels()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = results((hidden, weight, bias), labels, "native", torch.float32)
    half = results((hidden, weight, bias), labels, "native", torch.bfloat16)
    assert mixed["loss"].equal(half["loss"])
    for name in NAMES[1:]:
        assert mixed[name].dtype == torch.float32
        assert mixed[name].bfloat16().equal(half[name])


def test_a_second_derivative_is_refused() -> None:
    case = BY_NAME["less-than-a-tile"]
    hidden, weight, _ = (leaf.requires_grad_() for leaf in case.inputs(torch.float64))
    loss = linear_cross_entropy(hidden, weight, case.labels(), backend="native")
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative .* use backend="reference"'):
        grad.sum().backward()


HIDDEN, WEIGHT, LABELS = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, -100, 4])
BAD = {
    "rank": ((HIDDEN[None], WEIGHT, LABELS), r"hidden is \[1, 3, 4\] and weight \[5, 4\]; expected \[T, H\]"),
    "width": ((HIDDEN, WEIGHT[:, :3], LABELS), r"weight \[5, 3\]; expected \[T, H\] and \[V, H\]"),
    "number of labels": ((HIDDEN, WEIGHT, LABELS[:2]), r"labels are Long \[2\]; expected int64 \[3\]"),
    "type of labels": ((HIDDEN, WEIGHT, LABELS.int()), r"labels are Int \[3\]; expected int64"),
    "type of weight": ((HIDDEN, WEIGHT.half(), LABELS), "weight is Half and hidden is Float"),
    "type": ((HIDDEN.to(torch.complex64), WEIGHT, LABELS), "expected float32, bfloat16, float16 or float64"),
    "word beyond": (
        (HIDDEN, WEIGHT, torch.tensor([0, 5, 9])),
        r"labels\[1\] is 5, expected ignore_index -100 or a word in \[0, 5\)",
    ),
    "negative word": ((HIDDEN, WEIGHT, torch.tensor([0, 1, -1])), r"labels\[2\] is -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_op_says_what_is_wrong(name: str) -> None:
    given, message = BAD[name]
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.pyvlm.linear_cross_entropy(*given, -100, None, 0.0, 0.0, 0.0, True)


def test_the_op_says_what_is_wrong_with_a_bias_and_with_log_z() -> None:
    options = (0.0, 0.0, 0.0, True)
    with pytest.raises(RuntimeError, match=r"bias is Float \[4\]; expected Float \[5\]"):
        torch.ops.pyvlm.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, -100, torch.zeros(4), *options)
    with pytest.raises(RuntimeError, match=r"lse Float \[2\]; expected a scalar and Float \[3\]"):
        torch.ops.pyvlm.linear_cross_entropy_backward(
            torch.ones(()), HIDDEN, WEIGHT, LABELS, -100, None, *options, torch.zeros(2), [True] * 3
        )

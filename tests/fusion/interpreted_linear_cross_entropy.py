"""The Triton kernels of `linear_cross_entropy` on CPU tensors. test_linear_cross_entropy_triton.py runs this
file in a process of its own, since Triton settles at its import whether it interprets. By hand:

    TRITON_INTERPRET=1 pytest tests/fusion/interpreted_linear_cross_entropy.py

The interpreter is slow, so the tiles are small: few rows and words still have several.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fusion.loss_cases import LARGE_CASES, SMALL_CASES, LossCase
from pyvlm.triton_kernels import loss
from pyvlm.triton_kernels.common import INTERPRETED
from pyvlm.triton_kernels.loss import Config, Tiles
from tolerance import assert_close, assert_conforms
from torch import Tensor

from pyvlm.ops import linear_cross_entropy
from pyvlm.reference import loss as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = Tiles(16, 32, 16, 4, 1)
CONFIG = Config(SMALL, SMALL, SMALL, SMALL, room=1024, block=64, least=32, unit=32, group=2)
NO_OPTIONS = {"softcap": 0.0, "label_smoothing": 0.0, "z_loss": 0.0, "mean": True}
OPTIONS = {
    "plain": {},
    "sum": {"mean": False},
    "softcap": {"softcap": 1.5},
    "smoothing": {"label_smoothing": 0.2},
    "z loss": {"z_loss": 0.3},
    "all": {"softcap": 2.0, "label_smoothing": 0.1, "z_loss": 0.05, "mean": False},
}
NAMES = ("loss", "hidden", "weight", "bias")
SHARED_CASES = [*SMALL_CASES, *(case.reduced() for case in LARGE_CASES)]
# Thousands of rows or words take the interpreter too long: fewer still make several tiles and blocks, of the
# default 64 rows and 128 to 512 words as of the small 16 and 32 to 64.
CASES = [
    replace(case, tokens=min(case.tokens, 80), labeled=min(case.labeled, 70), words=min(case.words, 600))
    for case in SHARED_CASES
]
SMALLER = [
    replace(
        case,
        tokens=min(case.tokens, 50),
        labeled=min(case.labeled, 40),
        hidden=min(case.hidden, 70),
        words=min(case.words, 200),
    )
    for case in SHARED_CASES
]
BY_NAME = {case.name: case for case in SMALLER}


def by_kernels(
    leaves: list[Tensor | None],
    labels: Tensor,
    options: dict[str, Any],
    config: Config | None,
    needs: tuple[bool, ...] = (True, True, True),
    ignore_index: int = -100,
) -> list[Tensor]:
    """The loss and the gradients, times 3."""
    hidden, weight, bias = leaves
    arguments = (hidden, weight, labels, ignore_index, bias, *(NO_OPTIONS | options).values())
    out, lse = loss.linear_cross_entropy(*arguments, config)
    assert lse.shape == labels.shape
    assert (lse[labels == ignore_index] == 0).all()
    grads = loss.linear_cross_entropy_backward(torch.tensor(3.0), *arguments, lse, needs, config)
    return [out, *grads]


def by_reference(
    leaves: list[Tensor | None],
    labels: Tensor,
    options: dict[str, Any],
    convert: Callable[[Tensor], Tensor],
    ignore_index: int = -100,
) -> list[Tensor]:
    hidden, weight, bias = (
        leaf if leaf is None else convert(leaf).detach().requires_grad_() for leaf in leaves
    )
    given = NO_OPTIONS | options
    out = reference.linear_cross_entropy(
        hidden, weight, labels, ignore_index, bias, given["softcap"] or None, given["label_smoothing"],
        given["z_loss"], "mean" if given["mean"] else "sum",
    )  # fmt: skip
    present = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    return [out.detach(), *torch.autograd.grad(3 * out, present)]


def assert_right(
    leaves: list[Tensor | None], labels: Tensor, options: dict[str, Any], config: Config | None = CONFIG
) -> None:
    actual = by_kernels(leaves, labels, options, config)
    expected = by_reference(leaves, labels, options, lambda leaf: leaf.double())
    plain = by_reference(leaves, labels, options, lambda leaf: leaf.clone())
    for name, value, want, usual in zip(NAMES, actual, expected, plain, strict=False):
        assert value.dtype == usual.dtype, name
        assert_close(value, want, usual, name)


def test_the_kernels_are_interpreted() -> None:
    assert INTERPRETED.value


def test_the_public_op_runs_them() -> None:
    case = BY_NAME["odd-rows"]

    def by(backend: str) -> list[Tensor]:
        hidden, weight, bias = (leaf.requires_grad_() for leaf in case.inputs(torch.float32))
        out = linear_cross_entropy(
            hidden, weight, case.labels(), bias=bias, softcap=3.0, label_smoothing=0.1, backend=backend
        )
        return [out.detach(), *torch.autograd.grad(out, (hidden, weight, bias))]

    for actual, expected in zip(by("triton"), by("reference"), strict=True):
        assert_conforms(actual, expected, gradient=True)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option(dtype: torch.dtype, name: str, bias: bool) -> None:
    case = LossCase("options", "", 40, 21, 24, 150)
    leaves = [*case.inputs(dtype)]
    assert_right(leaves if bias else [*leaves[:2], None], case.labels(), OPTIONS[name])


@pytest.mark.parametrize(
    ("case", "config"),
    [(case, CONFIG) for case in SMALLER] + [(case, None) for case in CASES],
    ids=[f"{case.name}, {tiles} tiles" for tiles in ("small", "default") for case in CASES],
)
def test_every_size(case: LossCase, config: Config | None) -> None:
    if case.hidden > 0:
        assert_right([*case.inputs(torch.float32)], case.labels(), {}, config)


@pytest.mark.parametrize("labeled", [0, 1, 18, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_that_lie_where_words_wait_for_them(
    dtype: torch.dtype, labeled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of grad_weight; how many blocks of words wait depends on how many rows have a label."""
    case = LossCase("waiting", "an odd number of weights", 40, labeled, 25, 331)
    leaves, labels = [*case.inputs(dtype)], case.labels()
    calls: list[dict[str, Any]] = []
    launch = loss.launch

    def watch(kernel: Any, grid: Any, tiles: Any, arguments: dict[str, Any]) -> None:
        calls.append({"kernel": kernel.__name__} | arguments)
        launch(kernel, grid, tiles, arguments)

    monkeypatch.setattr(loss, "launch", watch)
    actual = by_kernels(leaves, labels, {}, CONFIG)
    of_hidden = [call for call in calls if call["kernel"] == "grad_hidden_kernel"]
    places = {call["sums"].untyped_storage().data_ptr() for call in of_hidden}
    assert places == {actual[2].untyped_storage().data_ptr()}
    assert any(call.get("again") for call in calls)
    monkeypatch.setattr(loss, "_MOST_THAT_WAIT", 0)
    calls.clear()
    apart = by_kernels(leaves, labels, {}, CONFIG)
    assert not any(call.get("again") for call in calls)
    for value, other in zip(actual, apart, strict=True):
        assert value.equal(other)
    if labeled > 0:
        assert_right(leaves, labels, {})


def test_tiles_that_would_read_what_nobody_wrote_are_refused() -> None:
    for wrong in (
        {"unit": 48},  # between two tiles
        {"block": 80},
        {"least": 0},
        {"grad_hidden": replace(SMALL, depth=64), "unit": 64, "least": 64},  # deeper than G is written
    ):
        with pytest.raises(ValueError, match="expected units to be multiples of tiles"):
            replace(CONFIG, **wrong)


def test_rows_without_a_label_are_never_looked_at() -> None:
    case = BY_NAME["more-than-a-tile"]
    leaves, labels = [*case.inputs(torch.float32)], case.labels()
    expected = by_kernels(leaves, labels, {}, CONFIG)
    leaves[0][labels == -100] = torch.nan
    for actual, want in zip(by_kernels(leaves, labels, {}, CONFIG), expected, strict=True):
        assert actual.equal(want)
    assert (expected[1][labels == -100] == 0).all()


def test_any_index_can_be_the_ignored_one() -> None:
    hidden, weight, bias = BY_NAME["less-than-a-tile"].inputs(torch.float32)
    labels = torch.tensor([3, 0, 3, 7, 3, 3, 1, 10, 3])
    actual = by_kernels([hidden, weight, bias], labels, {}, CONFIG, ignore_index=3)
    expected = by_reference([hidden, weight, bias], labels, {}, Tensor.clone, ignore_index=3)
    for got, want in zip(actual, expected, strict=True):
        assert_conforms(got, want, gradient=True)


def test_a_word_outside_the_vocabulary_is_an_error() -> None:
    hidden, weight, bias = BY_NAME["less-than-a-tile"].inputs(torch.float32)
    for word in (11, -1):
        labels = torch.full((9,), -100).index_fill(0, torch.tensor([4]), word)
        with pytest.raises(RuntimeError, match="neither ignore_index nor a word"):
            by_kernels([hidden, weight, bias], labels, {}, CONFIG)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran."""
    names: list[str] = []
    launch = loss.launch

    def record(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *arguments)

    monkeypatch.setattr(loss, "launch", record)
    return names


def test_what_is_not_needed_is_empty_and_costs_nothing(launched: list[str]) -> None:
    case = BY_NAME["less-than-a-tile"]
    leaves, labels = [*case.inputs(torch.float32)], case.labels()
    everything = by_kernels(leaves, labels, {}, CONFIG)
    kernels = ("grad_hidden_kernel", "grad_weight_kernel", "grad_bias_kernel")
    for needs in ((False, False, False), (True, False, False), (False, True, False), (False, False, True)):
        launched.clear()
        results = by_kernels(leaves, labels, {}, CONFIG, needs)
        wanted = [kernel for kernel, needed in zip(kernels, needs, strict=True) if needed]
        first = ["grad_logits_kernel"] if wanted else []
        assert launched == ["statistics_kernel", "combine_kernel", *first, *wanted]
        for needed, grad, full in zip(needs, results[1:], everything[1:], strict=True):
            assert grad.equal(full) if needed else grad.numel() == 0


def test_the_same_bits_in_every_run_and_in_any_order_of_tiles() -> None:
    case = BY_NAME["more-than-a-tile"]
    leaves, labels = [*case.inputs(torch.bfloat16)], case.labels()
    first = by_kernels(leaves, labels, OPTIONS["all"], CONFIG)
    for config in (CONFIG, replace(CONFIG, group=8)):
        for actual, expected in zip(by_kernels(leaves, labels, OPTIONS["all"], config), first, strict=True):
            assert actual.equal(expected)


def test_any_strides() -> None:
    case = BY_NAME["odd-rows"]
    leaves, labels = [*case.inputs(torch.float32)], case.labels()
    strided = [torch.stack([leaf, leaf], -1)[..., 0] for leaf in leaves]
    assert not any(leaf.is_contiguous() for leaf in strided)
    for actual, expected in zip(
        by_kernels(strided, torch.stack([labels, labels], -1)[:, 0], {}, CONFIG),
        by_kernels(leaves, labels, {}, CONFIG),
        strict=True,
    ):
        assert actual.equal(expected)


def test_what_the_kernels_do_not_take() -> None:
    leaves = [*BY_NAME["less-than-a-tile"].inputs(torch.float64)]
    with pytest.raises(TypeError, match=r'hidden is torch.float64: use backend="reference"'):
        by_kernels(leaves, torch.zeros(9, dtype=torch.int64), {}, CONFIG)

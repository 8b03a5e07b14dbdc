"""The fused head and loss against logits and `F.cross_entropy`, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close, assert_conforms
from torch import Tensor
from torch.autograd import gradcheck

from pyvlm.ops.loss import linear_cross_entropy

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "softcap": {"softcap": 1.5},
    "smoothing": {"label_smoothing": 0.2},
    "z loss": {"z_loss": 0.3},
    "all": {"softcap": 2.0, "label_smoothing": 0.1, "z_loss": 0.05, "reduction": "sum"},
}


def plain_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Every row's logits, and the ignored ones thrown away afterwards."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    labeled = labels != ignore_index
    loss = F.cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
    z = (logits.logsumexp(-1) ** 2)[labeled].sum()
    return loss + z_loss * (z / labeled.sum() if reduction == "mean" else z)


def arguments(tokens: int, labeled: list[int], bias: bool = True) -> dict[str, Tensor | None]:
    labels = torch.full((tokens,), -100)
    labels[labeled] = torch.randint(0, 11, (len(labeled),))
    return {
        "hidden": torch.randn(tokens, 7),
        "weight": torch.randn(11, 7),
        "labels": labels,
        "bias": torch.randn(11) if bias else None,
    }


def with_gradients(op: object, given: dict, dtype: torch.dtype, options: dict) -> list[Tensor]:
    """The loss, and the gradients of every floating-point argument."""
    given = {
        name: x.to(dtype, copy=True).requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in given.items()
    }
    loss = op(**given, **options)
    leaves = [x for x in given.values() if x is not None and x.requires_grad]
    return [loss, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_is_cross_entropy_of_the_logits(name: str, bias: bool, dtype: torch.dtype) -> None:
    given = arguments(13, [1, 4, 5, 12], bias)
    rounded = {n: x.to(dtype) if x is not None and x.is_floating_point() else x for n, x in given.items()}
    actual = with_gradients(linear_cross_entropy, rounded, dtype, OPTIONS[name])
    expected = with_gradients(plain_loss, rounded, torch.float64, OPTIONS[name])
    plain = with_gradients(plain_loss, rounded, dtype, OPTIONS[name])
    assert actual[0].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    for got, want, usual in zip(actual, expected, plain, strict=True):
        assert_close(got, want, usual, name)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name: str) -> None:
    given = arguments(5, [0, 3])
    leaves = [given[n].double().requires_grad_() for n in ("hidden", "weight", "bias")]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, given["labels"], bias=bias, **OPTIONS[name])

    assert gradcheck(loss, leaves)


@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("name", OPTIONS)
def test_without_a_label_the_loss_and_its_gradients_are_zero(name: str, tokens: int) -> None:
    for result in with_gradients(linear_cross_entropy, arguments(tokens, []), torch.float32, OPTIONS[name]):
        assert torch.equal(result, torch.zeros_like(result))


def test_ignored_rows_are_never_looked_at() -> None:
    given = arguments(6, [1, 4])
    expected = with_gradients(linear_cross_entropy, given, torch.float32, {})
    given["hidden"][[0, 2, 3, 5]] = torch.nan
    for got, want in zip(
        with_gradients(linear_cross_entropy, given, torch.float32, {}), expected, strict=True
    ):
        assert torch.equal(got, want)


def test_any_index_can_be_the_ignored_one() -> None:
    """Also one that is a word: its rows carry no loss, but the word still takes part in the softmax."""
    given = arguments(4, [0, 1, 2, 3])
    given["labels"] = torch.tensor([3, 0, 3, 7])
    options = {"ignore_index": 3}
    actual = with_gradients(linear_cross_entropy, given, torch.float64, options)
    for got, want in zip(actual, with_gradients(plain_loss, given, torch.float64, options), strict=True):
        assert_conforms(got, want)


def test_views() -> None:
    given = arguments(6, [1, 4])
    strided = {n: x.T.contiguous().T if x is not None and x.dim() == 2 else x for n, x in given.items()}
    assert_conforms(linear_cross_entropy(**strided), linear_cross_entropy(**given))


def test_float32_weights_meet_half_states_under_autocast() -> None:
    given = arguments(6, [1, 4])
    given["hidden"] = given["hidden"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(**given)
    assert loss.dtype == torch.float32
    wide = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    half = {n: x.bfloat16() if x.is_floating_point() else x for n, x in given.items()}
    assert_close(loss, plain_loss(**wide), plain_loss(**half))


HIDDEN, WEIGHT, LABELS = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, -100, 4])
BAD = {
    "width": (
        (HIDDEN, WEIGHT[:, :3], LABELS),
        {},
        ValueError,
        r"weight has shape \[5, 3\], expected \[V, H\] with H = 4",
    ),
    "number of labels": (
        (HIDDEN, WEIGHT, LABELS[:2]),
        {},
        ValueError,
        r"labels has shape \[2\], expected \[T\] with T = 3",
    ),
    "labels of a batch": (
        (HIDDEN, WEIGHT, LABELS[None]),
        {},
        ValueError,
        r"labels has shape \[1, 3\], expected \[T\]",
    ),
    "type of labels": (
        (HIDDEN, WEIGHT, LABELS.int()),
        {},
        TypeError,
        "labels is torch.int32, expected torch.int64",
    ),
    "type of weight": (
        (HIDDEN, WEIGHT.half(), LABELS),
        {},
        TypeError,
        "weight is torch.float16 but hidden is",
    ),
    "bias": (
        (HIDDEN, WEIGHT, LABELS),
        {"bias": torch.zeros(4)},
        ValueError,
        r"bias has shape \[4\], expected \[V\]",
    ),
    "word beyond": (
        (HIDDEN, WEIGHT, torch.tensor([0, 5, 9])),
        {},
        ValueError,
        r"labels\[1\] is 5, expected ignore_index -100 or a word in \[0, 5\)",
    ),
    "negative word": ((HIDDEN, WEIGHT, torch.tensor([0, 1, -1])), {}, ValueError, r"labels\[2\] is -1"),
    "reduction": ((HIDDEN, WEIGHT, LABELS), {"reduction": "none"}, ValueError, "reduction='none' is unknown"),
    "smoothing": ((HIDDEN, WEIGHT, LABELS), {"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
    "softcap": ((HIDDEN, WEIGHT, LABELS), {"softcap": 0.0}, ValueError, "softcap is 0.0"),
    "z loss": ((HIDDEN, WEIGHT, LABELS), {"z_loss": float("nan")}, ValueError, "z_loss is nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    given, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        linear_cross_entropy(*given, **options)

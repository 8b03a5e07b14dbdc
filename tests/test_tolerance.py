"""The tolerance policy can fail: each kind of wrong result is refused, and honest rounding is not."""

import pytest
import torch
from tolerance import assert_close, assert_close_overall, assert_conforms, mismatch


@pytest.fixture
def product() -> tuple[torch.Tensor, torch.Tensor]:
    """A product in float64, and the same by plain PyTorch in bfloat16."""
    a, b = torch.randn(2, 31, 31, dtype=torch.bfloat16).unbind()
    return a.double() @ b.double(), a @ b


def test_honest_rounding_passes(product: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected, plain = product
    assert_close(expected.bfloat16(), expected, plain)
    assert_close(plain, expected, plain)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 0.9, -1.0], ids=str)
def test_one_wrong_value_fails(product: tuple[torch.Tensor, torch.Tensor], wrong: float) -> None:
    expected, plain = product
    actual = plain.clone()
    worst = tuple(int(i) for i in torch.unravel_index(expected.abs().argmax(), expected.shape))
    actual[worst] *= wrong
    with pytest.raises(AssertionError, match=rf"product: 1 of 961 values.*{worst[0]}, {worst[1]}\]"):
        assert_close(actual, expected, plain, "product")


def test_overall_one_value_may_be_further_off_but_not_all(
    product: tuple[torch.Tensor, torch.Tensor],
) -> None:
    expected, plain = product

    def off_by(error: float, at: slice) -> torch.Tensor:
        actual = expected.clone()
        actual[at, at] += error
        return actual.bfloat16()

    one, everywhere = slice(1), slice(None)
    with pytest.raises(AssertionError, match="1 of 961"):
        assert_close(off_by(1.0, one), expected, plain)
    assert_close_overall(off_by(1.0, one), expected, plain)
    for wrong in (3.0, torch.nan):
        with pytest.raises(AssertionError, match="product: 1 of 961"):
            assert_close_overall(off_by(wrong, one), expected, plain, "product")
    assert_close(off_by(0.2, everywhere), expected, plain)
    with pytest.raises(AssertionError, match=r"product: root mean square error 0\.2"):
        assert_close_overall(off_by(0.2, everywhere), expected, plain, "product")


def test_infinities_must_agree() -> None:
    expected = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    plain = expected.float()
    assert mismatch(plain, expected, plain) is None
    assert mismatch(torch.tensor([-1e30, 1.0]), expected, plain) is not None
    assert mismatch(torch.tensor([-torch.inf, -torch.inf]), expected, plain) is not None


def test_zeros_must_be_zeros() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="1 of 3"):
        assert_close(torch.tensor([0.0, 1e-30, 0.0]), zeros, zeros.float())


def test_a_shape_is_compared_and_not_broadcast() -> None:
    expected = torch.zeros(3, 1, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"shape \[3\], expected \[3, 1\]"):
        assert_close(torch.zeros(3), expected, expected.float())


def test_nan_in_the_truth_is_refused() -> None:
    nan = torch.full((2,), torch.nan, dtype=torch.float64)
    with pytest.raises(AssertionError, match="expected values hold NaN"):
        assert_close(nan.float(), nan, nan.float())


def test_conformance_tolerances() -> None:
    stored = torch.tensor([1.0, -100.0])
    assert_conforms(stored * (1 + 1e-5), stored)
    assert_conforms(stored * (1 + 8e-5), stored, gradient=True)
    with pytest.raises(AssertionError, match="out: 2 of 2"):
        assert_conforms(stored * (1 + 8e-5), stored, "out")
    with pytest.raises(AssertionError, match=r"float64, expected torch\.float32"):
        assert_conforms(stored.double(), stored)
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_conforms(torch.tensor([3, 4]), torch.tensor([3, 5]))

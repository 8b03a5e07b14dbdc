"""The one tolerance policy: how far a result may be from the truth.

A kernel is compared with a reference in float64 on the same, exactly widened inputs. Its largest error may be
at most twice that of plain PyTorch in the kernel's own dtype, plus a rounding floor (after flash-attention's
tests). Nothing is tuned to a kernel; NaN is never right, and infinities must agree. A float64 kernel has no
better reference than its like, and gets a fixed tolerance.

    assert_close(out, expected=out64, plain=plain_out)     # the policy
    assert_close_overall(g, expected=g64, plain=plain_g)   # gradients of whole models
    assert_conforms(out, expected=stored)                  # against stored outputs of another implementation
"""

import torch
from torch import Tensor

# How often the error of plain PyTorch, and how many machine epsilons of the largest expected value on top:
# plain PyTorch may be exact by luck. Luck decides more in float32, where few steps round: the errors of two
# plain versions of attention that only add in another order were seen to differ by a factor of 3.4.
FACTOR = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 8}
FLOOR = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 16}

# Against stored outputs of other implementations in the same dtype; gradients of peaked softmaxes lose more.
CONFORMANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
CONFORMANCE_GRADIENT = {torch.float32: 1e-4, torch.float64: 1e-10}


def mismatch(
    actual: Tensor,
    expected: Tensor,
    plain: Tensor,
    name: str = "result",
    terms: float = 0.0,
    luck: float = 1.0,
) -> str | None:
    """What is wrong with `actual`, or None where it is within the policy.

    Args:
        actual: the result to judge; its dtype sets the floor.
        expected: the same in float64.
        plain: the same by plain PyTorch in the dtype of `actual`.
        name: what the result is called in the message.
        terms: the size of the terms that the result is a sum of, where they cancel and so are larger than it.
        luck: how many times the policy's error one value may have.
    """
    problem = _unlike(actual, expected, name)
    if problem is not None or actual.numel() == 0:
        return problem
    if actual.dtype == torch.float64:
        return _too_far(actual, expected, CONFORMANCE[torch.float64] * (1 + expected.abs()), name)
    # Where a value is infinite (an lse of −inf) all must agree exactly, and there is no error to measure.
    finite = expected.isfinite()
    scale = max(terms, _largest(expected[finite].abs()))
    plain_error = _largest((plain.to(expected.dtype) - expected)[finite].abs())
    allowed = luck * _allowed(actual.dtype, plain_error, scale)
    return _too_far(actual, expected, torch.full_like(expected, allowed), name)


def assert_close(
    actual: Tensor, expected: Tensor, plain: Tensor, name: str = "result", terms: float = 0.0
) -> None:
    """Fails unless `actual` is within the policy; the arguments are those of `mismatch`."""
    problem = mismatch(actual, expected, plain, name, terms)
    if problem is not None:
        raise AssertionError(problem)


def assert_close_overall(actual: Tensor, expected: Tensor, plain: Tensor, name: str = "result") -> None:
    """Fails unless the root mean square of the errors is within the policy, the largest within four times.

    For the gradients of whole models in half precision, whose largest error is a matter of luck: of twelve
    models, three batches and two instruction sets it was 0.3 to 4.2 times that of plain PyTorch, the root
    mean square 0.5 to 1.8 times. The arguments are those of `mismatch`.
    """
    problem = mismatch(actual, expected, plain, name, luck=4)
    if problem is None and actual.numel() > 0:
        error, plain_error, scale = (
            x.square().mean().sqrt().item()
            for x in (actual.to(expected.dtype) - expected, plain.to(expected.dtype) - expected, expected)
        )
        allowed = _allowed(actual.dtype, plain_error, scale)
        if error > allowed:
            problem = f"{name}: root mean square error {error:.3g}, allowed {allowed:.3g}"
    if problem is not None:
        raise AssertionError(problem)


def assert_conforms(actual: Tensor, expected: Tensor, name: str = "result", gradient: bool = False) -> None:
    """Fails unless `actual` agrees with the stored result of another implementation in the same dtype.

    Floats within the fixed tolerance of the dtype, relative and absolute; integers and booleans exactly.
    """
    problem = _unlike(actual, expected, name)
    if problem is None and actual.dtype != expected.dtype:
        problem = f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    if problem is None and not expected.is_floating_point():
        problem = _too_far(actual.double(), expected.double(), torch.zeros_like(expected.double()), name)
    elif problem is None:
        tolerance = (CONFORMANCE_GRADIENT if gradient else CONFORMANCE)[expected.dtype]
        problem = _too_far(actual, expected, tolerance * (1 + expected.abs()), name)
    if problem is not None:
        raise AssertionError(problem)


def _allowed(dtype: torch.dtype, plain_error: float, scale: float) -> float:
    return FACTOR[dtype] * plain_error + FLOOR[dtype] * torch.finfo(dtype).eps * scale


def _largest(values: Tensor) -> float:
    return values.max().item() if values.numel() else 0.0


def _unlike(actual: Tensor, expected: Tensor, name: str) -> str | None:
    if actual.shape != expected.shape:
        return f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if expected.isnan().any():
        return f"{name}: the expected values hold NaN"
    return None


def _too_far(actual: Tensor, expected: Tensor, allowed: Tensor, name: str) -> str | None:
    actual = actual.to(expected.dtype)
    error = torch.where(actual == expected, 0, (actual - expected).abs())  # equal infinities are 0 apart
    bad = ~(error <= allowed)  # NaN is bad
    if not bad.any():
        return None
    excess = torch.where(bad, (error - allowed).nan_to_num(torch.inf), -1)
    index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    return (
        f"{name}: {int(bad.sum())} of {bad.numel()} values are too far; the worst, at {list(index)}, is "
        f"{actual[index].item():.9g}, expected {expected[index].item():.9g}; "
        f"error {error[index].item():.3g}, allowed {allowed[index].item():.3g}"
    )

"""The Triton kernels of RMSNorm on CPU tensors. test_norm_triton.py runs this file in a process of its own,
since Triton settles at its import whether it interprets. By hand:

    TRITON_INTERPRET=1 pytest tests/fusion/interpreted_norm.py
"""

import pytest
import torch
from fusion.norm_cases import CASES, NormCase
from fusion.norm_checks import DTYPES, assert_right, results
from pyvlm.triton_kernels import norm
from pyvlm.triton_kernels.common import INTERPRETED

from pyvlm.ops import rms_norm


def test_the_kernels_are_interpreted() -> None:
    assert INTERPRETED.value


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("of_weight", [None, *DTYPES[:3]], ids=str)
@pytest.mark.parametrize("unit_offset", [False, True], ids=["weight", "one more"])
def test_dtypes(unit_offset: bool, of_weight: torch.dtype | None, dtype: torch.dtype) -> None:
    sizes = torch.tensor([1.0, 100.0, 1e-3, 0.0]).repeat_interleave(5)[:, None]
    weight = None if of_weight is None else torch.randn(83).to(of_weight)
    assert_right((torch.randn(20, 83) * sizes).to(dtype), weight, unit_offset, backend="triton")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: NormCase) -> None:
    x, weight = (case.reduced() if case.large else case).inputs(torch.float32)
    assert_right(x, weight, case.unit_offset, backend="triton")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 2, 1), (2, norm.NUMBERS + 1), (301, 5)], ids=str)
def test_sizes(shape: tuple[int, ...]) -> None:
    assert_right(torch.randn(shape), torch.randn(shape[-1]), eps=0.1, backend="triton")


def test_programs_that_take_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "RESIDENT_WARPS", 1)
    monkeypatch.setattr(norm, "multiprocessors", lambda device: 3)
    assert_right(torch.randn(61, 300), torch.randn(300), backend="triton")


VIEWS = {
    "heads before tokens": lambda x: x.view(3, 8, 5, 24).transpose(1, 2),
    "a third of a joint projection": lambda x: x.chunk(3, dim=-1)[1],
    "every second channel": lambda x: x[..., ::2],
    "channels first": lambda x: x.transpose(1, 2),
    "one row for all": lambda x: x[:1, :1].expand(3, 8, -1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    x = VIEWS[view](torch.randn(3, 8, 120))
    weight, grad_y = torch.randn(x.shape[-1]), torch.randn(x.shape)
    expected = results(x.contiguous(), weight, grad_y, "triton")
    actual = results(x, weight, grad_y, "triton")
    assert actual["y"].stride() == rms_norm(x, weight, backend="native").stride()
    assert actual["y"].equal(expected["y"])
    assert actual["x"].equal(expected["x"])
    torch.testing.assert_close(actual["weight"], expected["weight"])  # added in the order that rows lie in


def test_saved_tensors_that_come_back_otherwise() -> None:
    x, weight = torch.randn(2, 7, 3, 16).transpose(1, 2), torch.randn(16)
    grad_y = torch.randn(x.shape)
    expected = results(x, weight, grad_y, "triton")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        actual = results(x, weight, grad_y, "triton")
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize(("of_x", "of_weight"), [(True, False), (False, True)])
def test_gradients_of_one_alone(of_x: bool, of_weight: bool) -> None:
    x, weight, grad_y = torch.randn(9, 40), torch.randn(40), torch.randn(9, 40)
    expected = results(x, weight, grad_y, "triton")
    leaf = (x if of_x else weight).requires_grad_()
    (grad,) = torch.autograd.grad(rms_norm(x, weight, backend="triton"), leaf, grad_y)
    assert grad.equal(expected["x" if of_x else "weight"])


def test_nan_stays_in_its_row() -> None:
    x, weight, grad_y = torch.randn(7, 40), torch.randn(40), torch.randn(7, 40)
    x[2] = torch.nan
    found = results(x, weight, grad_y, "triton")
    others = torch.arange(7) != 2
    assert found["y"][others].isfinite().all()
    assert found["x"][others].isfinite().all()


def test_the_same_bits_twice() -> None:
    x, weight, grad_y = torch.randn(70, 130), torch.randn(130), torch.randn(70, 130)
    first, second = (results(x, weight, grad_y, "triton") for _ in range(2))
    assert all(second[name].equal(first[name]) for name in first)

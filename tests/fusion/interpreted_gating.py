"""The Triton kernels of gated activations on CPU tensors. test_gating_triton.py runs this file in a process
of its own, since Triton settles at its import whether it interprets. By hand:

    TRITON_INTERPRET=1 pytest tests/fusion/interpreted_gating.py
"""

import pytest
import torch
from fusion.gating_cases import CASES, GatingCase
from fusion.gating_checks import DTYPES, assert_right, results
from pyvlm.triton_kernels import gating
from pyvlm.triton_kernels.common import INTERPRETED
from torch import Tensor

from pyvlm.ops import gated_activation
from pyvlm.reference.gating import ACTIVATIONS

both = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


def test_the_kernels_are_interpreted() -> None:
    assert INTERPRETED.value


@both
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype, gated: bool) -> None:
    gate = torch.cat([torch.randn(7, 83), 40 * torch.randn(6, 83), torch.zeros(1, 83)]).to(dtype)
    assert_right(gate, torch.randn(14, 83).to(dtype) if gated else None, activation, "triton")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: GatingCase) -> None:
    gate, *up = (case.reduced() if case.large else case).inputs(torch.float32)
    assert_right(gate, up[0] if up else None, case.activation, "triton")


@both
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 2, 1), (2, gating.NUMBERS + 1), (4100, 3)], ids=str)
def test_sizes(shape: tuple[int, ...], gated: bool) -> None:
    """None, fewer and more than a tile has of rows and of columns."""
    assert_right(torch.randn(shape), torch.randn(shape) if gated else None, "silu", "triton")


VIEWS = {
    "halves of a joint projection": lambda x: x.chunk(2, dim=-1),
    "tokens cut off": lambda x: (x[:, 1:, :60], x[:, :-1, 60:]),
    "every second channel": lambda x: (x[..., ::2], x[..., 1::2]),
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2).chunk(2, dim=1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    gate, up = VIEWS[view](torch.randn(3, 8, 120))
    grad_y = torch.randn(gate.shape[::-1]).permute(2, 1, 0)
    expected = results(gate.contiguous(), up.contiguous(), grad_y, "silu", "triton")
    for name, tensor in results(gate, up, grad_y, "silu", "triton").items():
        assert tensor.equal(expected[name]), name
    with torch.no_grad():
        assert gated_activation(gate, up.clone(), inplace=True, backend="triton").equal(expected["y"])


def test_nothing_behind_a_row_is_read_or_written() -> None:
    def framed() -> tuple[Tensor, Tensor]:
        whole = torch.full((9, 90), torch.nan)
        whole[2:7, 10:50] = torch.randn(5, 40)
        return whole, whole[2:7, 10:50]

    (whole, gate), (_, up) = framed(), framed()
    found = results(gate, up, torch.randn(5, 40), "gelu", "triton")
    assert all(tensor.isfinite().all() for tensor in found.values())
    with torch.no_grad():
        gated_activation(gate, up, "gelu", inplace=True, backend="triton")
    assert gate.equal(found["y"])
    assert whole.isnan().sum() == whole.numel() - gate.numel()


def test_the_same_bits_twice() -> None:
    gate, up, grad_y = (torch.randn(70, 130) for _ in range(3))
    first, second = (results(gate, up, grad_y, "gelu_tanh", "triton") for _ in range(2))
    assert all(second[name].equal(first[name]) for name in first)

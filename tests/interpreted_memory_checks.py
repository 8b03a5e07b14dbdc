"""Kernels with faults that Triton's interpreter would not see. test_memory_checks.py runs this file in a
process of its own, since Triton settles at its import whether it interprets. By hand:

    TRITON_INTERPRET=1 pytest tests/interpreted_memory_checks.py
"""

from collections.abc import Callable
from typing import Any

import memory_checks
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def copy_kernel(source, target, count, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + lane, tl.load(source + lane, mask=lane < count), mask=lane < count)


@triton.jit
def copy_all_kernel(source, target, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + lane, tl.load(source + lane))


@triton.jit
def left_out_kernel(source, target, count, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(target + lane, tl.load(source + lane, mask=lane < count))


@triton.jit
def sum_kernel(source, total, BLOCK: tl.constexpr):
    part = tl.load(source + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(total, tl.load(total) + tl.sum(part, 0))


@triton.jit
def last_kernel(target):
    tl.store(target, tl.program_id(0))


@triton.jit
def shift_kernel(x, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    shifted = tl.load(x + lane + BLOCK)
    tl.store(x + lane, shifted)


@triton.jit
def reverse_kernel(x, scratch, target, SYNCHRONISED: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(scratch + lane, tl.load(x + lane))
    if SYNCHRONISED:
        tl.debug_barrier()
    tl.store(target + lane, tl.load(scratch + (BLOCK - 1 - lane)))


@triton.jit
def twice_kernel(target, SYNCHRONISED: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(target + lane, lane)
    if SYNCHRONISED:
        tl.debug_barrier()
    tl.store(target + (BLOCK - 1 - lane), lane)


@triton.jit
def halved_kernel(target, values, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(target + lane // 2, tl.load(values + lane))


@triton.jit
def by_address_kernel(addresses, target, BYTES: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    source = tl.multiple_of(tl.load(addresses).to(target.dtype), BYTES)
    tl.store(target + lane, tl.load(source + lane))


@triton.jit
def arithmetic_kernel(x, n, target, OPERATION: tl.constexpr):
    lane = tl.arange(0, 2)
    value = tl.load(x + lane)
    if OPERATION == "add":
        value += n
    elif OPERATION == "sub":
        value -= n
    else:
        value *= n
    tl.store(target + lane, value)


@triton.jit
def described_kernel(source, target, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    tl.store(target + row + tl.arange(0, BLOCK), source.load([row]))


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(InterpreterError) as refusal:
        call()
    return str(refusal.value)


def numbers(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(size, dtype=dtype)


def test_what_is_right_runs() -> None:
    x, y = numbers(10), torch.zeros(10)
    copy_kernel[(3,)](x, y, 10, BLOCK=4)
    assert y.equal(x)
    backwards, scratch = torch.zeros(8), torch.zeros(8)
    reverse_kernel[(1,)](x, scratch, backwards, SYNCHRONISED=True, BLOCK=8)
    assert backwards.equal(x[:8].flip(0))
    twice_kernel[(1,)](y, SYNCHRONISED=True, BLOCK=8)
    halved_kernel[(1,)](y, torch.ones(8), BLOCK=8)  # lanes that agree
    assert y.tolist() == [1, 1, 1, 1, 3, 2, 1, 0, 8, 9]
    described_kernel[(3,)](TensorDescriptor(x, [10], [1], [4]), torch.zeros(12), BLOCK=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64], ids=str)
def test_outside_of_tensors(dtype: torch.dtype) -> None:
    x, y = numbers(10, dtype), torch.zeros(12, dtype=dtype)
    assert "reads 2 of 4 lanes outside" in refused(lambda: copy_all_kernel[(3,)](x, y, BLOCK=4))
    x, y = numbers(12, dtype), torch.zeros(11, dtype=dtype)
    assert "writes 1 of 4 lanes outside" in refused(lambda: copy_all_kernel[(3,)](x, y, BLOCK=4))
    every_other = torch.zeros(24, dtype=dtype)[::2]
    assert "writes 2 of 4 lanes between elements" in refused(
        lambda: copy_all_kernel[(3,)](x, every_other, BLOCK=4)
    )
    column = torch.zeros(12, 2, dtype=dtype)[1:, 1]
    assert "reads 2 of 4 lanes between elements" in refused(lambda: copy_all_kernel[(1,)](column, x, BLOCK=4))


def test_behind_a_view_of_a_tensor() -> None:
    rest = numbers(12)[4:]
    copy_all_kernel[(2,)](rest, torch.zeros(8), BLOCK=4)
    tail = torch.zeros(12)[:4]
    assert "between" in refused(lambda: copy_all_kernel[(2,)](rest, tail, BLOCK=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lanes_left_out_hold_nan(dtype: torch.dtype) -> None:
    y = torch.zeros(8, dtype=dtype)
    left_out_kernel[(1,)](numbers(5, dtype), y, 5, BLOCK=8)
    assert y[:5].equal(numbers(5, dtype))
    assert bool(y[5:].isnan().all())


def test_lanes_left_out_hold_the_largest_integer() -> None:
    y = torch.zeros(8, dtype=torch.int32)
    left_out_kernel[(1,)](numbers(5, torch.int32), y, 5, BLOCK=8)
    assert y.tolist() == [0, 1, 2, 3, 4] + 3 * [2**31 - 1]


def test_programs_race() -> None:
    total = torch.zeros(1)
    sum_kernel[(1,)](numbers(4), total, BLOCK=4)
    assert total.item() == 6
    assert "reads what another program wrote" in refused(lambda: sum_kernel[(2,)](numbers(8), total, BLOCK=4))
    ids = torch.zeros(1, dtype=torch.int32)
    assert "writes what another program wrote" in refused(lambda: last_kernel[(2,)](ids))
    shift_kernel[(1,)](numbers(12), BLOCK=4)
    assert "writes what another program read" in refused(lambda: shift_kernel[(2,)](numbers(12), BLOCK=4))


def test_races_may_be_allowed_where_nothing_right_comes_out() -> None:
    ids = torch.zeros(1, dtype=torch.int32)
    with memory_checks.races_allowed():
        last_kernel[(2,)](ids)
        assert "outside" in refused(lambda: copy_all_kernel[(3,)](numbers(12), numbers(11), BLOCK=4))
    assert ids.item() == 1
    assert "writes what another program wrote" in refused(lambda: last_kernel[(2,)](ids))


def test_a_program_races_with_itself() -> None:
    x, scratch, y = numbers(8), torch.zeros(8), torch.zeros(8)
    message = refused(lambda: reverse_kernel[(1,)](x, scratch, y, SYNCHRONISED=False, BLOCK=8))
    assert "reads what it wrote, without a barrier" in message
    message = refused(lambda: twice_kernel[(1,)](y, SYNCHRONISED=False, BLOCK=8))
    assert "writes again what it wrote, without a barrier" in message
    assert "unlike values to one place" in refused(lambda: halved_kernel[(1,)](y, x, BLOCK=8))


def test_addresses_in_memory() -> None:
    x, y = numbers(8), torch.zeros(8)
    addresses = torch.tensor([x.data_ptr()])
    assert "outside" in refused(lambda: by_address_kernel[(1,)](addresses, y, BYTES=4, BLOCK=8))
    memory_checks.also_given(x)
    by_address_kernel[(1,)](addresses, y, BYTES=4, BLOCK=8)
    assert y.equal(x)
    assert "no multiple of" in refused(lambda: by_address_kernel[(1,)](addresses + 4, y, BYTES=8, BLOCK=4))
    memory_checks.forget()
    assert "outside" in refused(lambda: by_address_kernel[(1,)](addresses, y, BYTES=4, BLOCK=8))


def test_a_fault_leaves_the_next_launch_alone() -> None:
    x, y = numbers(12), torch.zeros(11)
    refused(lambda: copy_all_kernel[(3,)](x, y, BLOCK=4))
    copy_kernel[(3,)](x, y, 11, BLOCK=4)
    assert y.equal(x[:11])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("operation", "x", "fits", "overflows"),
    [
        ("add", [2**31 - 5, 0], 4, 5),
        ("sub", [-(2**31) + 4, 0], 4, 5),
        ("mul", [2**30 - 1, 0], 2, 3),
    ],
)
def test_integers_that_overflow(
    operation: str, x: list[int], fits: int, overflows: int, dtype: torch.dtype
) -> None:
    given, y = torch.tensor(x, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    exact = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[operation]
    arithmetic_kernel[(1,)](given, fits, y, OPERATION=operation)
    assert y.equal(exact(given.long(), fits))
    if dtype == torch.int32:
        message = refused(lambda: arithmetic_kernel[(1,)](given, overflows, y, OPERATION=operation))
        assert f"{operation} of int32 overflows in 1 of 2 lanes" in message
    else:
        arithmetic_kernel[(1,)](given, overflows, y, OPERATION=operation)
        assert y.equal(exact(given, overflows))


def test_grids_that_are_too_large() -> None:
    ids = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(memory_checks.MemoryFault, match="CUDA launches up to"):
        last_kernel[(1, 2**16)](ids)
    last_kernel[(1,)](ids)


def test_programs_at_the_ends() -> None:
    x, y = numbers(40), torch.full((40,), -1.0)
    with memory_checks.programs_at_the_ends(10):
        copy_all_kernel[(20,)](x, y, BLOCK=2)
        assert y[:2].equal(x[:2])
        assert y[-8:].equal(x[-8:])
        assert bool((y[2:-8] == -1).all())
        copy_all_kernel[(10,)](x, y, BLOCK=4)
    assert y.equal(x)

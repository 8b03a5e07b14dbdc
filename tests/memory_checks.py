"""What a GPU does not forgive and Triton's interpreter does not see: it runs one program after the other, in
the memory of this process. `install` makes it refuse, in every kernel that it runs,

- reads and writes outside of the tensors that the launch was given, between their elements too;
- races: programs that run at once, one writing what another reads or writes; two lanes of a store that write
  unlike values to one place; a program that reads or writes again what it wrote without a barrier between;
- sums, differences and products of signed integers that overflow where these have less than 64 bits: of
  offsets, mostly;
- alignments promised to the compiler (`tl.multiple_of`) that do not hold;
- grids that CUDA does not launch.

And lanes that a mask leaves out and no `other` fills read NaN, or the largest integer, in place of 0.
"""

import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.language import semantic
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_PROGRAMS = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # of a grid, by dimension: CUDA's limits
MAP_NORESERVE = 0x4000  # Linux's, of all architectures that pyvlm runs on; Python has it from 3.13 on


class MemoryFault(Exception):
    """A kernel did to memory what it must not do."""


def untouched(size: int, dtype: Any) -> np.ndarray:
    """Zeros that take memory only where they are written, more of them than there is memory for."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, max(size, 1) * np.dtype(dtype).itemsize, flags=flags), dtype)


class Shadow:
    """For every byte of a launch's memory: whether it is a tensor's, and when it was read and written.

    Time begins at 1 and goes on with every program and with every barrier in one. Of reads the first is kept:
    a later one, by another program than wrote the place meanwhile, is refused itself.
    """

    def __init__(self, tensors: Iterable[Tensor], grid: tuple[int, ...]) -> None:
        self.grid, self.chosen = grid, _chosen(grid)
        storages: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() > 0:
                storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self.begins = np.array(sorted(storages), dtype=np.int64)
        sizes = np.array([storages[begin][0].untyped_storage().nbytes() for begin in self.begins.tolist()])
        self.ends = self.begins + sizes.astype(np.int64)
        first_index = np.cumsum(sizes) - sizes
        self.shifts = self.begins - first_index.astype(np.int64)
        size = int(sizes.sum())
        self.owned = untouched(size, np.bool_)
        self.read, self.written = untouched(size, np.int32), untouched(size, np.int32)
        self.whole = np.zeros(len(self.begins), np.bool_)  # a tensor fills the storage: all of it is owned
        owned = torch.from_numpy(self.owned)
        for i, begin in enumerate(self.begins.tolist()):
            self.whole[i] = any(_span(tensor) == sizes[i] == tensor.nbytes for tensor in storages[begin])
            for tensor in [] if self.whole[i] else storages[begin]:
                width = tensor.element_size()
                strides = (*(width * stride for stride in tensor.stride()), 1)
                offset = first_index[i].item() + width * tensor.storage_offset()
                owned.as_strided((*tensor.shape, width), strides, offset).fill_(True)
        self.stored = np.zeros(len(self.begins), np.bool_)  # whether anything wrote there
        self.time = self.program_began = 1

    def begin_program(self) -> None:
        self.time += 1
        self.program_began = self.time

    def barrier(self) -> None:
        self.time += 1

    def places(self, addresses: np.ndarray, width: int, verb: str) -> tuple[np.ndarray, int | np.ndarray]:
        """Where the bytes lie here that begin at some addresses, and in which storages."""
        addresses = addresses.astype(np.int64)
        # Nearly always they are all in one.
        storage = int(np.searchsorted(self.begins, addresses.min(), side="right")) - 1
        if storage < 0 or addresses.max() + width > self.ends[storage]:
            storage = np.searchsorted(self.begins, addresses, side="right") - 1
            outside = (storage < 0) | (addresses + width > self.ends[storage])
            if outside.any():
                lanes = f"{outside.sum()} of {outside.size} lanes"
                raise MemoryFault(f"{verb} {lanes} outside of the tensors given")
        index = addresses - self.shifts[storage]
        if not self.whole[storage].all():
            between = ~(self.owned[index] & self.owned[index + (width - 1)] | self.whole[storage])
            if between.any():
                lanes = f"{between.sum()} of {between.size} lanes"
                raise MemoryFault(f"{verb} {lanes} between elements of a tensor")
        return index, storage

    def load(self, addresses: np.ndarray, width: int) -> None:
        index, storage = self.places(addresses, width, "reads")
        if self.stored[storage].any():
            written = self.written[index]
            self._refuse((written > 0) & (written < self.program_began), "reads what another program wrote")
            self._refuse(written == self.time, "reads what it wrote, without a barrier between")
        first = self.read[index]
        self.read[index] = np.where(first > 0, first, self.time)

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        width = values.dtype.itemsize
        index, storage = self.places(addresses, width, "writes")
        read, written = self.read[index], self.written[index]
        self._refuse((written > 0) & (written < self.program_began), "writes what another program wrote")
        self._refuse((read > 0) & (read < self.program_began), "writes what another program read")
        self._refuse(written == self.time, "writes again what it wrote, without a barrier between")
        self.written[index], self.stored[storage] = self.time, True
        bits = values.view(f"u{width}")
        _, first, place = np.unique(index, return_index=True, return_inverse=True)
        self._refuse(bits[first][place] != bits, "writes unlike values to one place in one store")

    @staticmethod
    def _refuse(lanes: np.ndarray, what: str) -> None:
        if lanes.any() and not _racing:
            raise MemoryFault(f"{what}: {lanes.sum()} of {lanes.size} lanes")


_shadow: Shadow | None = None  # of the launch that is under way
_known: list[Tensor] = []


def also_given(*tensors: Tensor) -> None:
    """Tells of tensors that the next launches reach by addresses in memory; they are kept until `forget`."""
    _known.extend(tensors)


def forget() -> None:
    _known.clear()


_racing = False


@contextmanager
def races_allowed() -> Iterator[None]:
    """For arguments of which no right result comes out: only what lies outside of tensors is refused."""
    global _racing
    _racing = True
    try:
        yield
    finally:
        _racing = False


def _span(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to its last, with it."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.element_size() * (sum(steps) + 1)


_most: int | None = None


@contextmanager
def programs_at_the_ends(most: int) -> Iterator[None]:
    """Of launches of more programs, only the first and the last few in each dimension of the grid run."""
    global _most
    _most = most
    try:
        yield
    finally:
        _most = None


def _chosen(grid: tuple[int, ...]) -> list[list[int]]:
    """The programs of a launch that run, by dimension."""
    if _most is None or math.prod(grid) <= _most:
        return [list(range(size)) for size in grid]
    return [sorted({0, *range(max(0, size - 4), size)}) for size in grid]


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _garbage(dtype: np.dtype) -> np.ndarray:
    """NaN (bfloat16 is held as uint16), the largest signed integer or True."""
    if dtype.kind == "i":
        return np.array(np.iinfo(dtype).max, dtype)
    return np.array(True) if dtype.kind == "b" else np.frombuffer(b"\xff" * dtype.itemsize, dtype)[0]


# What Triton calls operations; on integers of 64 bits those of fewer are exact.
EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def install() -> None:
    """Checks every launch of this process from now on."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    run, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    set_grid, set_program = builder.set_grid_dim, builder.set_grid_idx
    set_attribute = interpreter.TensorHandle.set_attr

    def checked_run(self: Any, *args: Any, **kwargs: Any) -> None:
        global _shadow
        grid = (*self.grid, 1, 1)[:3]
        if any(size > most for size, most in zip(grid, MOST_PROGRAMS, strict=True)):
            raise MemoryFault(f"a grid of {grid}: CUDA launches up to {MOST_PROGRAMS}")
        _shadow = Shadow([*_tensors(args), *_tensors(kwargs.values()), *_known], grid)
        self.grid = tuple(map(len, _shadow.chosen))
        try:
            run(self, *args, **kwargs)
        finally:
            _shadow = None

    def checked_grid(self: Any, *_: int) -> None:
        set_grid(self, *_shadow.grid)

    def checked_program(self: Any, *at: int) -> None:
        set_program(self, *(programs[i] for programs, i in zip(_shadow.chosen, at, strict=True)))
        _shadow.begin_program()

    def checked_load(self: Any, ptrs: Any, mask: Any, other: Any, *policy: Any, **named: Any) -> Any:
        dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
        addresses = ptrs.data[mask.data]
        if addresses.size:
            _shadow.load(addresses, dtype.itemsize)
        # Of one lane alone the interpreter takes `other=0` for none.
        if other is None and addresses.size < ptrs.data.size > 1:
            filled = np.broadcast_to(_garbage(dtype), ptrs.data.shape).astype(dtype)
            other = interpreter.TensorHandle(filled, ptrs.get_element_ty())
        return load(self, ptrs, mask, other, *policy, **named)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *policy: Any, **named: Any) -> Any:
        addresses = ptrs.data[mask.data]
        if addresses.size:
            _shadow.store(addresses, np.broadcast_to(value.data, ptrs.data.shape)[mask.data])
        return store(self, ptrs, value, mask, *policy, **named)

    def checked_attribute(self: Any, key: str, value: Any) -> None:
        if key == "tt.divisibility" and np.any(self.data % np.array(value, self.data.dtype) != 0):
            raise MemoryFault(f"is no multiple of {value}, as tl.multiple_of promises")
        set_attribute(self, key, value)

    def checked_overflow(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> None:
        """In place of Triton's own check, which takes a fifth of the time and tells nobody what it finds."""
        dtype = left.dtype
        if dtype.int_bitwidth == 64 or not dtype.is_int_signed():
            return
        exact = EXACT[operation.__name__](*(side.handle.data.astype(np.int64) for side in (left, right)))
        outside = (exact < dtype.get_int_min_value()) | (exact > dtype.get_int_max_value())
        if outside.any():
            lanes = f"{outside.sum()} of {outside.size} lanes"
            raise MemoryFault(f"{operation.__name__} of {dtype} overflows in {lanes}")

    def refused(name: str) -> Callable[..., Any]:
        def refuse(self: Any, *_: Any) -> None:
            raise NotImplementedError(f"{name}: the checks of races know no atomics yet")

        return refuse

    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = checked_overflow
    executor.__call__ = checked_run
    builder.set_grid_dim, builder.set_grid_idx = checked_grid, checked_program
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_barrier = lambda self: _shadow.barrier()
    for name in ("create_atomic_rmw", "create_atomic_cas"):
        setattr(builder, name, refused(name))
    interpreter.TensorHandle.set_attr = checked_attribute

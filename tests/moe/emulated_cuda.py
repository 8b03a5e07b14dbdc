"""CUDA kernels of csrc/moe compiled for the host, where threads are emulated, and how they are called."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent / "cuda_host"
CSRC = Path(__file__).parents[2] / "csrc"

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="there is no g++ to compile the kernels"
)


def compile_for_host(library: Path) -> ctypes.CDLL:
    includes = [f"-I{HERE}", f"-I{CSRC}", *(f"-isystem{path}" for path in include_paths())]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    command = ["g++", *flags, *includes, str(HERE / "routing_on_host.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.bits_size.restype = loaded.counts_size.restype = ctypes.c_int64
    return loaded


class Guarded:
    """A tensor for a kernel to write, of garbage and between guards."""

    GUARD = 64

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        garbage = float("nan") if dtype.is_floating_point else 0x7FFF_FFFF
        self.memory = torch.full((size + 2 * self.GUARD,), garbage, dtype=dtype)
        self.tensor = self.memory[self.GUARD : self.GUARD + size]

    def written(self) -> Tensor:
        before, after = self.memory[: self.GUARD], self.memory[self.GUARD + len(self.tensor) :]
        for guard in (before, after):
            assert bool((guard.isnan() if guard.is_floating_point() else guard == 0x7FFF_FFFF).all())
        return self.tensor


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def run(function: Callable[..., Any], *arguments: Any) -> None:
    function.restype = ctypes.c_char_p
    converted = [ctypes.c_int(a) if isinstance(a, (bool, int)) else a for a in arguments]
    problem = function(*converted)
    if problem is not None:
        raise RuntimeError(problem.decode())


def pointers(tensors: dict[str, Tensor]) -> ctypes.Array:
    """Those of all tensors, in their order."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors.values()))


def sizes_of_lists(
    tokens: int, experts: int, slots: int, of_slots: str, dtype: torch.dtype
) -> dict[str, tuple[int, torch.dtype]]:
    """A routing's tensors in the kernels' order, where `of_slots` names what each slot has beside a token."""
    return {
        "token": (slots, torch.int32),
        of_slots: (slots, dtype),
        "expert_offsets": (experts + 1, torch.int32),
        "token_offsets": (tokens + 1, torch.int32),
        "slot": (slots, torch.int32),
    }


def in_both_orders(
    sizes: dict[str, tuple[int, torch.dtype]], call: Callable[[dict[str, Tensor], bool], None]
) -> dict[str, Tensor]:
    """What a call writes into tensors of these sizes: the same whether threads run in order or in reverse."""
    results = []
    for backwards in (False, True):
        arrays = {name: Guarded(*size) for name, size in sizes.items()}
        call({name: array.tensor for name, array in arrays.items()}, backwards)
        results.append({name: array.written() for name, array in arrays.items()})
    for name in sizes:
        one, other = (result[name].view(torch.uint8) for result in results)  # NaN is like itself
        assert one.equal(other), f"{name} depends on the order of threads"
    return results[0]

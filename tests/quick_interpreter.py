"""Has Triton's interpreter do once what it does over and over to the same end: patch its language, in every
call of a function in a kernel, and find out what numpy and itself call a dtype.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@cache
def _languages(function: Any) -> frozenset[str]:
    """The modules of Triton's language that a function knows, by which the interpreter patches them."""
    known = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    return frozenset(module.__name__ for module in known)


def _patch_once_a_launch() -> None:
    executor, patch = interpreter.GridExecutor, interpreter._patch_lang
    run = executor.__call__
    patched: set[str] | None = None  # of the launch that is under way

    def patch_once(function: Any) -> Any:
        if patched is None or not _languages(function) <= patched:
            if patched is not None:
                patched.update(_languages(function))
            return patch(function)
        return interpreter._LangPatchScope()

    def run_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal patched
        patched = set()
        try:
            run(self, *args, **kwargs)
        finally:
            patched = None

    interpreter._patch_lang, executor.__call__ = patch_once, run_launch
    executor._restore_args_dev = lambda *_: None  # it copies all memory onto itself


def _numpy_dtypes(of_dtype: Callable[[tl.dtype], np.dtype]) -> Callable[[tl.dtype], np.dtype]:
    of_scalar = cache(of_dtype)
    addresses = np.dtype(np.uint64)
    return lambda dtype: addresses if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)


def _share_block_types() -> None:
    """By their names, which say shape and dtype."""
    block = tl.block_type
    with_element_ty, to_ir = block.with_element_ty, block.to_ir
    known: dict[tuple[str, str], tl.block_type] = {}
    ir: dict[str, tl.block_type] = {}

    def shared_with_element_ty(self: tl.block_type, scalar: tl.dtype) -> tl.block_type:
        key = (self.name, scalar.name)
        if key not in known:
            known[key] = with_element_ty(self, scalar)
        return known[key]

    def shared_to_ir(self: tl.block_type, builder: Any) -> tl.block_type:
        if self.name not in ir:
            ir[self.name] = to_ir(self, builder)
        return ir[self.name]

    block.with_element_ty, block.to_ir = shared_with_element_ty, shared_to_ir


def _share_shapes() -> None:
    @cache
    def constants(shape: tuple[int, ...]) -> tuple[tl.tuple, tl.constexpr]:
        return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))

    def make_tensor(self: tl.tensor, handle: interpreter.TensorHandle, type: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constants(tuple(type.shape) if type.is_block() else ())

    tl.tensor.__init__ = make_tensor


def install() -> None:
    """For every launch of this process from now on."""
    _patch_once_a_launch()
    _share_block_types()
    _share_shapes()
    interpreter._get_np_dtype = _numpy_dtypes(interpreter._get_np_dtype)

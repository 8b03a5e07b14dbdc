"""Argument checks of the public functions: shapes by letters, one device, one floating dtype."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from pyvlm.reference.gating import ACTIVATIONS


def check_activation(activation: str) -> None:
    """Raises ValueError where there is no activation of that name."""
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation={activation!r} is unknown; expected one of {known}")


class Shapes:
    """Checks the tensors of one call: the first tensor that has a letter fixes its size for all the others.

    The first floating-point tensor fixes the dtype, the first tensor fixes the device. Under autocast mixed
    floating dtypes are let through, since autocast brings them together.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self._seen_in: dict[str, str] = {}
        self._first: tuple[str, Tensor] | None = None
        self._first_float: tuple[str, Tensor] | None = None

    def check(
        self,
        name: str,
        tensor: Tensor | None,
        *letters: str | tuple[str, ...],
        dtypes: tuple[torch.dtype, ...] | None = None,
    ) -> Self:
        """Checks `tensor` against `letters`: "NTC", or ("N", "T", "C"), is [N, T, C].

        Several are alternatives, told apart by their rank. `dtypes` None means floating point, the same as
        the other floating-point tensors. None as `tensor` passes.
        """
        if tensor is None:
            return self
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.op}: {name} is a {type(tensor).__name__}, expected a torch.Tensor")
        self._check_shape(name, tensor, letters)
        self._check_dtype(name, tensor, dtypes)
        if self._first is None:
            self._first = name, tensor
        elif tensor.device != self._first[1].device:
            raise ValueError(
                f"{self.op}: {name} is on {tensor.device} but {self._first[0]} is on "
                f"{self._first[1].device}; move them to one device"
            )
        return self

    def forget(self, *letters: str) -> Self:
        """Frees letters whose size differs between the next tensors and those before."""
        for letter in letters:
            self.sizes.pop(letter, None)
            self._seen_in.pop(letter, None)
        return self

    def _check_shape(
        self, name: str, tensor: Tensor, alternatives: tuple[str | tuple[str, ...], ...]
    ) -> None:
        letters = next((a for a in alternatives if len(a) == tensor.dim()), None)
        fits = letters is not None and all(
            self.sizes.get(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if letters is None or not fits:
            expected = " or ".join(f"[{', '.join(a)}]" for a in alternatives)
            known = [
                f"{letter} = {self.sizes[letter]}"
                + (f" (from {self._seen_in[letter]})" if letter in self._seen_in else "")
                for letter in dict.fromkeys(letter for a in alternatives for letter in a)
                if letter in self.sizes
            ]
            raise ValueError(
                f"{self.op}: {name} has shape {list(tensor.shape)}, expected {expected}"
                + (f" with {', '.join(known)}" if known else "")
            )
        for letter, size in zip(letters, tensor.shape, strict=True):
            if letter not in self.sizes:
                self.sizes[letter], self._seen_in[letter] = size, name

    def _check_dtype(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] | None) -> None:
        if dtypes is not None:
            if tensor.dtype not in dtypes:
                raise TypeError(
                    f"{self.op}: {name} is {tensor.dtype}, expected {' or '.join(str(d) for d in dtypes)}"
                )
            return
        if not tensor.is_floating_point():
            raise TypeError(f"{self.op}: {name} is {tensor.dtype}, expected a floating-point tensor")
        if self._first_float is None:
            self._first_float = name, tensor
        elif tensor.dtype != self._first_float[1].dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise TypeError(
                f"{self.op}: {name} is {tensor.dtype} but {self._first_float[0]} is "
                f"{self._first_float[1].dtype}; convert them to one dtype or run under torch.autocast"
            )


def as_list(op: str, name: str, tensors: Sequence[Tensor] | Tensor) -> list[Tensor]:
    tensors = list(tensors)
    if not tensors:
        raise ValueError(f"{op}: {name} is empty; give at least one map")
    return tensors


def as_grid(op: str, name: str, grid: tuple[int, int]) -> tuple[int, int]:
    if len(grid) != 2 or grid[0] < 1 or grid[1] < 1:
        raise ValueError(f"{op}: {name} is {grid}, expected (rows, columns), both at least 1")
    return (int(grid[0]), int(grid[1]))

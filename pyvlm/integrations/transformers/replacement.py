"""Classes of transformers with a forward of pyvlm's: subclasses of the same name, made as they are wanted."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn


def home_of(folder: str) -> str:
    """The module of transformers that the classes of a folder of its models are defined in."""
    return f"transformers.models.{folder}.modeling_{folder}"


@cache
def replacement(form: type, folder: str, name: str, owner: str) -> Any:
    """A subclass of a class of transformers, of the same name, with the forward of `form`.

    Args:
        form: what comes first among its bases.
        folder, name: of the original.
        owner: the module of pyvlm that knows it by name; pickle looks for it there.
    """
    original = getattr(import_module(home_of(folder)), name)
    return type(name, (form, original), {"__module__": owner, "__doc__": form.__doc__})


def swap(module: nn.Module, made: type[nn.Module]) -> Callable[[], None]:
    """Gives a module that is there another class, and returns how to take it back."""
    original = type(module)

    def undo() -> None:
        module.__class__ = original

    module.__class__ = made
    return undo

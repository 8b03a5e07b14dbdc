"""Classes of transformers with a forward of pyvlm's: subclasses of the same name, made as they are wanted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any
from weakref import ref

from torch import nn

from pyvlm.integrations.transformers.changes import Change
from pyvlm.ops._backends import resolve


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
    original, held = type(module), ref(module)

    def undo() -> None:
        if (swapped := held()) is not None:
            swapped.__class__ = original

    module.__class__ = made
    return undo


@dataclass(frozen=True)
class Served:
    """Classes of transformers that compute one thing, which an op of pyvlm does in one pass.

    Attributes:
        form: a class with the forward that they get; nothing else of a module changes.
        folders: class -> the folder of transformers.models that it lives in.
        owner: the module of pyvlm that knows the replacements by the names of the originals, for pickle.
        part: what a `Change` calls them.
        op: the op's name.
        why_not: the reason why a module of these classes cannot be served, or None.
    """

    form: Any  # a class; to mypy one of modules has no hash
    folders: Mapping[str, str]
    owner: str
    part: str
    op: str
    why_not: Callable[[Any], str | None] = lambda module: None

    def apply(self, model: nn.Module) -> list[Change]:
        """Gives the modules of a model that can be served pyvlm's forward."""
        return [
            self._serve(path, module)
            for path, module in model.named_modules()
            if type(module).__name__ in self.folders
            and type(module).__module__ == home_of(self.folders[type(module).__name__])
        ]

    def named(self, name: str) -> Any:
        """The replacement of the class of that name, for `__getattr__` of the owner."""
        if name not in self.folders:
            raise AttributeError(f"module {self.owner!r} has no attribute {name!r}")
        return replacement(self.form, self.folders[name], name, self.owner)

    def _serve(self, path: str, module: nn.Module) -> Change:
        reason = self._why_not(module)
        if reason is not None:
            return Change(path, self.part, None, reason)
        undo = swap(module, self.named(type(module).__name__))
        return Change(path, self.part, f"pyvlm.ops.{self.op}", undo=undo)

    def _why_not(self, module: nn.Module) -> str | None:
        if "forward" in vars(module):
            return "a hook has taken the place of its forward"
        reason = self.why_not(module)
        if reason is not None:
            return reason
        weight = next(module.parameters(), None)
        if weight is not None and resolve(self.op, "auto", weight.device) == "reference":
            return f"there is no kernel on {weight.device.type}"
        return None

"""Loads the compiled extensions once, and keeps the reason where one cannot be loaded.

`_C` holds the CPU kernels and the torch schemas. Nothing here raises: `pyvlm.build_info()` tells what was
loaded, and an explicit `backend="native"` raises with the reason kept here.
"""

from importlib import import_module
from types import ModuleType

C: ModuleType | None = None
load_error: str | None = None
try:
    C = import_module("pyvlm._C")
except ImportError as error:
    load_error = f"{type(error).__name__}: {error}"

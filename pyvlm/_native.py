"""Loads the compiled extensions once, and keeps the reason where one cannot be loaded.

`_C` holds the CPU kernels and the torch schemas, `_C_cuda` the CUDA kernels, which only an installation
beside a torch with CUDA has. Nothing here raises: `pyvlm.build_info()` tells what was loaded, and an explicit
`backend="native"` raises with the reason kept here.
"""

from importlib import import_module
from types import ModuleType


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return import_module(name), None
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


C, load_error = _load("pyvlm._C")
C_cuda, cuda_load_error = _load("pyvlm._C_cuda")

"""What this installation is made of and what it can run here, for people and for bug reports."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from pyvlm import _native
from pyvlm.ops import _backends

_PACKAGES = ("pyvlm", "triton", "transformers", "accelerate", "numpy")


def build_info() -> dict[str, Any]:
    """Versions, instruction sets, and for every op and backend "available" or the reason why it is not.

    Returns:
        Plain data: "versions" (None where a package is not installed), "cpu", "cuda", "native" and
        "native_cuda" (how the extension was compiled, or why it could not be loaded), and "backends", by op
        and device.
    """
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with its kind of build, which its package's version may lack
            **{name: _version(name) for name in _PACKAGES},
        },
        "cpu": {
            "name": _cpu_name(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native": _native.C.build_facts() if _native.C is not None else {"error": _native.load_error},
        "native_cuda": (
            {"cuda_runtime": _native.C_cuda.CUDART_VERSION}
            if _native.C_cuda is not None
            else {"error": _native.cuda_load_error}
        ),
        "backends": {
            op: {
                device.type: {
                    backend: _backends.why_unavailable(op, backend, device) or "available"
                    for backend in _backends.BACKENDS[1:]
                }
                for device in devices
            }
            for op in _backends.OPS
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

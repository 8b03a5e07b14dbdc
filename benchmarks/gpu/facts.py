"""What a run on a GPU was made with, and what is missing there."""

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.utils.cpp_extension import CUDA_HOME

from benchmarks.harness.machine import machine

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "numpy", "pytest")
# What each is for: a run says what is not there, and goes on with what can run.
NEEDS = {
    "triton": "the Triton kernels: nothing on a GPU runs without it",
    "pytest": "part tests",
    "safetensors": "part tests: the authors' stored outputs",
    "hypothesis": "the seeds of part tests",
    "ninja": "part build",
    "transformers": "part step, and transformers' rows of parts moe and placement",
    "liger-kernel": "Liger's rows of parts loss and layers",
    "matplotlib": "python -m benchmarks.report",
}


def facts(device: torch.device) -> dict[str, Any]:
    """The machine's, and versions of what the figures depend on; ready for JSON."""
    found = machine(device)
    found["versions"] = {name: installed(name) for name in PACKAGES} | {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "driver": _asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": nvcc_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return found


def missing() -> dict[str, str]:
    """What is not installed, and what it would be for."""
    absent = {name: purpose for name, purpose in NEEDS.items() if installed(name) is None}
    if nvcc_version() is None:
        absent["nvcc"] = "part build: pyvlm._C_cuda, the routers on a GPU"
    return absent


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_nvcc() -> str | None:
    """On the PATH, or where torch's extensions find it."""
    return shutil.which("nvcc") or (f"{CUDA_HOME}/bin/nvcc" if CUDA_HOME else None)


def nvcc_version() -> str | None:
    nvcc = find_nvcc()
    lines = (_asked(nvcc, "--version") or "").splitlines() if nvcc else []
    return next((line.split("release ")[1].split(",")[0] for line in lines if "release " in line), None)


def _asked(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None

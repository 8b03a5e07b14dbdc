"""Which implementations each op has, and on which devices: the one table behind every `backend=` argument."""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from pyvlm import _native

BACKENDS = ("auto", "reference", "native", "triton")

# op -> backend -> device types it runs on; "auto" takes the first. "reference" is plain PyTorch and runs
# everywhere. Triton's interpreter is there for tests, and so its device is not in this table.
_IMPLEMENTATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "span_attention": {"native": ("cpu",), "triton": ("cuda",)},
    "expert_choice": {"native": ("cpu", "cuda")},
    "token_choice": {"native": ("cpu", "cuda")},
    "token_choice with a capacity": {"native": ("cpu",)},
    "threshold_choice": {"native": ("cpu",)},
    "merge_routings": {"native": ("cpu", "cuda")},
    "routing_from_choices": {"native": ("cpu", "cuda")},
    "routing_from_choices of which some are dropped": {"native": ("cpu",)},
    "expert_mlp": {"native": ("cpu",), "triton": ("cuda",)},
    "pack_image_tokens": {"native": ("cpu",), "triton": ("cuda",)},
    "place_image_tokens": {"native": ("cpu",), "triton": ("cuda",)},
    "add_at_image_tokens": {"native": ("cpu",), "triton": ("cuda",)},
    "local_cross_attention": {"native": ("cpu",), "triton": ("cuda",)},
    "linear": {"native": ("cpu",)},
    "gated_activation": {"native": ("cpu",), "triton": ("cuda",)},
    "rms_norm": {"native": ("cpu",), "triton": ("cuda",)},
    "fuse_grids": {"native": ("cpu", "cuda")},
    "patches_to_token": {"native": ("cpu", "cuda")},
    "resample": {"native": ("cpu", "cuda")},
    "merge_levels": {"native": ("cpu",), "triton": ("cuda",)},
    "linear_cross_entropy": {"native": ("cpu",), "triton": ("cuda",)},
}
OPS = tuple(_IMPLEMENTATIONS)
_TRITON_IS_INSTALLED = find_spec("triton") is not None  # asked once: torch.compile cannot trace the question


def why_unavailable(op: str, backend: str, device: torch.device) -> str | None:
    """The reason why `backend` cannot run `op` on `device`, or None where it can."""
    if backend == "reference":
        return None
    devices = _IMPLEMENTATIONS.get(op, {}).get(backend)
    if devices is None:
        return f"{op} has no {backend} implementation in this version"
    if backend == "triton" and not _TRITON_IS_INSTALLED:
        return "triton is not installed: pip install triton"
    if backend == "triton" and device.type == "cpu":
        if interprets_triton():
            return None
        return (
            "the Triton kernels run on CUDA tensors; on CPU only in Triton's interpreter: "
            "set TRITON_INTERPRET=1"
        )
    if device.type not in devices:
        return f"the {backend} implementation of {op} runs on {' and '.join(devices)} tensors only"
    if _native.load_error is not None:  # it declares the op, whatever implements it
        return f"the native extension could not be loaded ({_native.load_error})"
    if backend == "native" and device.type == "cuda" and _native.cuda_load_error is not None:
        return f"the CUDA extension could not be loaded ({_native.cuda_load_error})"
    return None


def interprets_triton() -> bool:
    """Whether the Triton kernels run in Triton's interpreter, which was settled at their first import."""
    if not _TRITON_IS_INSTALLED or os.environ.get("TRITON_INTERPRET", "0") == "0":
        return False
    from pyvlm.triton_kernels.common import INTERPRETED

    return bool(INTERPRETED.value)


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend to run: the named one or an error that says why not; "auto" takes the first that is there.

    For float64, where it is told, "auto" passes Triton by: it exists for checking gradients, and most
    Triton kernels do not have it.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        RuntimeError: a backend was named that is not available for `op` on `device`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        for name, devices in _IMPLEMENTATIONS.get(op, {}).items():
            known = device.type in devices and not (name == "triton" and dtype == torch.float64)
            if known and why_unavailable(op, name, device) is None:
                return name
        return "reference"
    reason = why_unavailable(op, backend, device)
    if reason is not None:
        raise RuntimeError(
            f'backend="{backend}" cannot run on {device}: {reason}; use backend="auto" or "reference"'
        )
    return backend


def triton_function(family: str, name: str) -> Callable[..., Any]:
    """A function of a module of pyvlm.triton_kernels, imported at its first call: Triton takes a second."""

    def run(*args: Any) -> Any:
        return getattr(import_module(f"pyvlm.triton_kernels.{family}"), name)(*args)

    return run


def refuse_second_derivative(op: str) -> None:
    """Has the gradients of an op's kernels raise where they are differentiated themselves."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f'{op} has no second derivative but in its reference: use backend="reference"')

    torch.library.register_autograd(f"pyvlm::{op}_backward", refuse)

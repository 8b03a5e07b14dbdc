"""Which implementations each op has, and on which devices: the one table behind every `backend=` argument."""

import torch

from pyvlm import _native

BACKENDS = ("auto", "reference", "native", "triton")

# op -> backend -> device types it runs on. "reference" is plain PyTorch and runs everywhere.
_IMPLEMENTATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "span_attention": {"native": ("cpu",)},
}
OPS = tuple(_IMPLEMENTATIONS)


def why_unavailable(op: str, backend: str, device: torch.device) -> str | None:
    """The reason why `backend` cannot run `op` on `device`, or None where it can."""
    if backend == "reference":
        return None
    devices = _IMPLEMENTATIONS.get(op, {}).get(backend)
    if devices is None:
        return f"{op} has no {backend} implementation in this version"
    if device.type not in devices:
        return f"the {backend} implementation of {op} runs on {' and '.join(devices)} tensors only"
    if backend == "native" and _native.load_error is not None:
        return f"the native extension could not be loaded ({_native.load_error})"
    return None


def resolve(op: str, backend: str, device: torch.device) -> str:
    """The backend to run: the named one or an error that says why not; "auto" takes the first that is there.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        RuntimeError: a backend was named that is not available for `op` on `device`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        return next(b for b in ("native", "triton", "reference") if why_unavailable(op, b, device) is None)
    reason = why_unavailable(op, backend, device)
    if reason is not None:
        raise RuntimeError(
            f'backend="{backend}" cannot run on {device}: {reason}; use backend="auto" or "reference"'
        )
    return backend

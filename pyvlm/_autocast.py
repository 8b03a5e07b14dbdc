"""Autocast, for tensors of any device: the meta device, on which models are counted, has none."""

from contextlib import AbstractContextManager, nullcontext

import torch

# Asked here, once: torch.compile of torch 2.11 cannot trace the question.
_DEVICES = tuple(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    return device.type in _DEVICES and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switches autocast off for a device."""
    if device.type not in _DEVICES:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)

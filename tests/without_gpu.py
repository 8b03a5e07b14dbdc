"""What pyvlm's ops launch on a GPU that need not be there: they are called as anybody calls them, on tensors
without memory (torch's meta device)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from ahead_of_time import Launch, recorded
from pyvlm.triton_kernels import attention, cross_attention, fusion, gating, loss, moe, norm, placement
from torch.utils._python_dispatch import TorchDispatchMode

from pyvlm.ops import _backends

META = torch.device("meta")
FAMILIES = (attention, cross_attention, fusion, gating, loss, moe, norm, placement)
# Tensors without memory have the implementations that a GPU's have.
IMPLEMENTATIONS = {
    op: {backend: (META.type,) for backend, devices in backends.items() if "cuda" in devices}
    for op, backends in _backends._IMPLEMENTATIONS.items()
}


class _LaunchesKernels(TorchDispatchMode):
    """Ops of pyvlm's that have Triton kernels launch them, in backward passes too."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # What is in it nobody knows, and no launch depends on it.
            return True if args[0].dtype == torch.bool else 1
        if op.namespace == "pyvlm":
            name = op.overloadpacket.__name__
            op = next((vars(family)[name] for family in FAMILIES if name in vars(family)), op)
        return op(*args, **(kwargs or {}))


@contextmanager
def launches_as_on_a_gpu(architecture: int) -> Iterator[dict[str, list[Launch]]]:
    """Tensors that are made inside have no memory; what their ops launch is written down, by family."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(_backends, "_IMPLEMENTATIONS", IMPLEMENTATIONS)
        launches = {
            family.__name__.split(".")[-1]: stack.enter_context(recorded(family, architecture))
            for family in FAMILIES
        }
        stack.enter_context(META)
        stack.enter_context(_LaunchesKernels())
        yield launches

"""The calls of RMSNorm whose Triton kernels are compiled ahead of time.

To write norm_triton_aot.json anew, and print it:

    cd tests && python -m fusion.norm_triton_aot
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from ahead_of_time import ARCHITECTURES, TYPES, Launch, recorded, write_table
from pyvlm.triton_kernels import norm

TABLE = Path(__file__).with_name("norm_triton_aot.json")


@dataclass(frozen=True)
class Call:
    """Forward and backward of tokens, or of their heads."""

    architecture: int
    dtype: torch.dtype = torch.bfloat16
    channels: int = 4096
    unit_offset: bool = False
    wants_x: bool = True  # its gradient, which embeddings from outside a model need not have
    kernels: tuple[str, ...] = ("rms_norm_kernel", "rms_norm_backward_kernel")
    on_tensor_cores: tuple[str, ...] = ()

    def name(self, kernel: str) -> str:
        of_weight = "" if self.wants_x else " weight alone"
        offset = " unit_offset" if self.unit_offset else ""
        return f"{kernel} sm_{self.architecture} {TYPES[self.dtype]} C{self.channels}{offset}{of_weight}"

    def launches(self, tokens: int = 2432, eps: float = 1e-6) -> list[Launch]:
        x = torch.empty(tokens, self.channels, dtype=self.dtype, device="meta")
        weight = torch.empty(self.channels, dtype=self.dtype, device="meta")
        with recorded(norm, self.architecture) as recorded_launches:
            _, rstd = norm.rms_norm(x, weight, eps, self.unit_offset)
            norm.rms_norm_backward(x, x, weight, rstd, self.unit_offset, self.wants_x, True)
        return recorded_launches


CALLS = (
    *(Call(architecture) for architecture in ARCHITECTURES),
    Call(90, channels=256, unit_offset=True),
    Call(90, dtype=torch.float32, channels=1152),
    Call(90, channels=8192),
    *(Call(90, channels=channels) for channels in (128, 2048)),  # a head's, and those of a step's models
    Call(90, channels=2048, wants_x=False, kernels=("rms_norm_backward_kernel",)),
)

if __name__ == "__main__":
    write_table(TABLE, CALLS)

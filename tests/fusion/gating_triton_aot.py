"""The calls of gated activations whose Triton kernels are compiled ahead of time.

To write gating_triton_aot.json anew, and print it:

    cd tests && python -m fusion.gating_triton_aot
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from ahead_of_time import ARCHITECTURES, TYPES, Launch, recorded, write_table
from pyvlm.triton_kernels import gating

TABLE = Path(__file__).with_name("gating_triton_aot.json")


@dataclass(frozen=True)
class Call:
    """Forward and backward: halves of Qwen2 0.5B's joint projection, or an encoder's MLP without a gate."""

    architecture: int
    dtype: torch.dtype = torch.bfloat16
    activation: str = "silu"
    gated: bool = True
    width: int = 4864
    joint: bool = True  # else gate and up are tensors of their own
    kernels: tuple[str, ...] = ("gated_kernel", "gated_backward_kernel")
    on_tensor_cores: tuple[str, ...] = ()

    def name(self, kernel: str) -> str:
        gate = "gated" if self.gated else "plain"
        name = f"{kernel} sm_{self.architecture} {TYPES[self.dtype]} {self.activation} {gate} I{self.width}"
        return name if self.joint else f"{name} apart"

    def launches(self, tokens: int = 2432) -> list[Launch]:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=self.dtype, device="meta")

        gate, up = empty(tokens, 2 * self.width).chunk(2, dim=-1)
        if not self.joint:
            gate, up = gate.contiguous(), up.contiguous()
        arguments = (gate, up if self.gated else None, self.activation)
        with recorded(gating, self.architecture) as recorded_launches:
            gating.gated_activation(*arguments)
            gating.gated_activation_backward(empty(tokens, self.width), *arguments)
        return recorded_launches


CALLS = (
    *(Call(architecture) for architecture in ARCHITECTURES),
    Call(90, dtype=torch.float32, activation="gelu"),
    Call(90, activation="gelu_tanh"),
    Call(90, activation="quick_gelu", gated=False, width=4096),
    # transformers' Llamas, whose projections are apart, and CLIP.
    *(Call(90, width=width, joint=False) for width in (5504, 11_008)),
    Call(90, activation="quick_gelu", gated=False, width=4096, joint=False),
)

if __name__ == "__main__":
    write_table(TABLE, CALLS)

"""The calls of `linear_cross_entropy` whose Triton kernels are compiled ahead of time.

To write loss_triton_aot.json anew, and print it:

    cd tests && python -m fusion.loss_triton_aot
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from ahead_of_time import ARCHITECTURES, TYPES, Launch, recorded, write_table
from pyvlm.triton_kernels import loss

TABLE = Path(__file__).with_name("loss_triton_aot.json")
PRODUCTS = ("statistics_kernel", "grad_logits_kernel", "grad_hidden_kernel", "grad_weight_kernel")
OTHERS = ("combine_kernel", "grad_bias_kernel")


@dataclass(frozen=True)
class Call:
    """A call of the op, of which the kernels are compiled: Qwen2-0.5B's head, with a bias."""

    architecture: int
    dtype: torch.dtype = torch.bfloat16
    softcap: float = 0.0
    kernels: tuple[str, ...] = PRODUCTS
    features: int = 896
    words: int = 151_936
    bias: bool = True

    @property
    def on_tensor_cores(self) -> tuple[str, ...]:
        return () if self.dtype == torch.float32 else PRODUCTS

    def name(self, kernel: str) -> str:
        options = " softcap smoothing" if self.softcap else ""
        head = "" if self.bias else f" H{self.features} V{self.words} no bias"
        return f"{kernel} sm_{self.architecture} {TYPES[self.dtype]}{options}{head}"

    def launches(self, tokens: int = 4096, words: int | None = None) -> list[Launch]:
        """The launches of one forward and backward."""
        words = self.words if words is None else words

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=self.dtype, device="meta")

        labels = torch.empty(tokens, dtype=torch.int64, device="meta")
        smoothing = 0.1 if self.softcap else 0.0
        bias = empty(words) if self.bias else None
        arguments = (empty(tokens, self.features), empty(words, self.features), labels, -100, bias)
        with recorded(loss, self.architecture) as recorded_launches:
            out, lse = loss.linear_cross_entropy(*arguments, self.softcap, smoothing, 0.0, True)
            loss.linear_cross_entropy_backward(
                out, *arguments, self.softcap, smoothing, 0.0, True, lse, [True] * 3
            )
        return recorded_launches


CALLS = (
    *(Call(architecture) for architecture in ARCHITECTURES),
    *(Call(architecture, softcap=30.0, kernels=PRODUCTS[:2]) for architecture in ARCHITECTURES),
    *(Call(architecture, dtype=torch.float32) for architecture in ARCHITECTURES),
    *(Call(architecture, kernels=OTHERS) for architecture in ARCHITECTURES),
    # What benchmarks measure: heads without biases.
    Call(90, features=2048, bias=False),
    Call(90, features=2048, words=32_000, bias=False),
    Call(90, features=2048, words=32_000, bias=False, kernels=("combine_kernel",)),
    Call(90, dtype=torch.float16),
)

if __name__ == "__main__":
    write_table(TABLE, CALLS)

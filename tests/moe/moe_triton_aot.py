"""The calls of the experts' MLP whose Triton kernels are compiled ahead of time.

To write moe_triton_aot.json anew, and print it:

    cd tests && python -m moe.moe_triton_aot
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from ahead_of_time import ARCHITECTURES, TYPES, Launch, recorded, write_table
from pyvlm.triton_kernels import moe

TABLE = Path(__file__).with_name("moe_triton_aot.json")
PRODUCTS = (
    *("up_kernel", "down_kernel", "grad_hidden_kernel", "grad_rows_kernel"),
    *("grad_matrix_kernel 1", "grad_matrix_kernel 2"),  # of gate_up and of down
)
OTHERS = (
    *("schedule_kernel", "sum_slots_kernel", "grad_weight_kernel"),
    *("grad_bias_kernel 1", "grad_bias_kernel 2"),
)


@dataclass(frozen=True)
class Call:
    """A call of the op, of which the kernels are compiled: hidden size 2,048, 8 gated experts, top 2."""

    architecture: int
    intermediate: int = 1408
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 4096
    kernels: tuple[str, ...] = PRODUCTS
    biases: bool = True
    needs: str = "all"  # gradients: "all", "fixed routing" (not those of the routing's weights) or "none"

    @property
    def on_tensor_cores(self) -> tuple[str, ...]:
        few = self.tokens < 1024  # a tile of few rows is too small for wgmma and tcgen05
        return () if few or self.dtype == torch.float32 else tuple(name.split()[0] for name in PRODUCTS)

    def name(self, kernel: str) -> str:
        biases = "" if self.biases else " no biases"
        needs = {"all": "", "fixed routing": " fixed routing", "none": " forward"}[self.needs]
        sizes = f"I{self.intermediate} T{self.tokens}"
        return f"{kernel} sm_{self.architecture} {TYPES[self.dtype]} {sizes}{biases}{needs}"

    def launches(self, tokens: int | None = None, slots: int | None = None, experts: int = 8) -> list[Launch]:
        """The launches of one forward and, where gradients are needed, backward."""
        tokens = self.tokens if tokens is None else tokens
        slots = 2 * tokens if slots is None else slots
        hidden, up_rows = 2048, 2 * self.intermediate

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def index(length: int) -> torch.Tensor:
            return empty(length, dtype=torch.int32)

        x = empty(tokens, hidden)
        routing = (
            index(slots),
            empty(slots, dtype=torch.float32),
            index(experts + 1),
            index(tokens + 1),
            index(slots),
        )
        layer = (
            empty(experts, up_rows, hidden),
            empty(experts, hidden, self.intermediate),
            "silu",
            True,
            empty(experts, up_rows) if self.biases else None,
            empty(experts, hidden) if self.biases else None,
        )
        trains = self.needs != "none"
        needs = [True, self.needs == "all", True, True, self.biases, self.biases]
        with recorded(moe, self.architecture) as recorded_launches:
            y, pre_activation = moe.expert_mlp(x, *routing, *layer, trains)
            if trains:
                moe.expert_mlp_backward(y, x, pre_activation, *routing, *layer, needs)
        return recorded_launches


CALLS = (
    *(Call(architecture) for architecture in ARCHITECTURES),
    *(Call(architecture, dtype=torch.float32) for architecture in ARCHITECTURES),
    *(Call(architecture, kernels=OTHERS) for architecture in ARCHITECTURES),
    *(Call(architecture, tokens=8) for architecture in ARCHITECTURES),
    Call(90, dtype=torch.float32, tokens=8),
    # MoE-LLaVA's and Mixtral's kind, and of many small experts: what benchmarks measure.
    Call(90, intermediate=5504, biases=False),
    Call(90, intermediate=5504, biases=False, tokens=8),
    Call(90, intermediate=5504, biases=False, kernels=("schedule_kernel 1", "grad_weight_kernel")),
    Call(90, intermediate=5504, biases=False, needs="fixed routing", kernels=("grad_hidden_kernel",)),
    *(Call(90, intermediate=size, biases=False, needs="fixed routing") for size in (1024, 768)),
    *(
        Call(90, intermediate=size, biases=False, tokens=tokens, needs="none", kernels=("up_kernel",))
        for size, tokens in ((5504, 4096), (5504, 8), (1024, 4096), (768, 4096))
    ),
    Call(90, dtype=torch.float16),
    *(Call(architecture, dtype=torch.float32, tokens=8) for architecture in (80, 100)),
)

if __name__ == "__main__":
    write_table(TABLE, CALLS)

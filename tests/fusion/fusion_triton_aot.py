"""The calls of `merge_levels` whose Triton kernels are compiled ahead of time.

To write fusion_triton_aot.json anew, and print it:

    cd tests && python -m fusion.fusion_triton_aot
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from ahead_of_time import ARCHITECTURES, TYPES, Launch, recorded, write_table
from pyvlm.triton_kernels import fusion

TABLE = Path(__file__).with_name("fusion_triton_aot.json")


@dataclass(frozen=True)
class Call:
    """A call of the op, of which the kernels are compiled: levels with CLS cut off, 1,024 features."""

    architecture: int
    channels: int = 1024
    dtype: torch.dtype = torch.bfloat16
    per_level: str = ""  # what each level has of its own: "w", projections, "g", norms
    trains: bool = True
    kernels: tuple[str, ...] = ("merge_kernel", "merge_backward_kernel")
    on_tensor_cores: tuple[str, ...] = ()  # the products are cuBLAS's

    def name(self, kernel: str) -> str:
        name = f"{kernel} sm_{self.architecture} {TYPES[self.dtype]} C{self.channels}"
        per_level = f" {self.per_level} per level" if self.per_level else ""
        return name + per_level + ("" if self.trains else " forward")

    def launches(self, levels: int = 24, images: int = 4, tokens: int = 576) -> list[Launch]:
        """The launches of one forward and, where it trains, backward."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=self.dtype, device="meta")

        def each(letter: str, *shape: int) -> torch.Tensor:
            return empty(levels, *shape) if letter in self.per_level else empty(*shape)

        maps = [empty(images, tokens + 1, self.channels)[:, 1:] for _ in range(levels)]
        parameters = (
            empty(levels),
            each("w", 1024, self.channels),
            each("w", 1024),
            each("g", self.channels),
            each("g", self.channels),
        )
        with recorded(fusion, self.architecture) as recorded_launches:
            out, mean, rstd = fusion.merge_levels(maps, *parameters, 1e-5, self.trains)
            if self.trains:
                fusion.merge_levels_backward(out, maps, *parameters, mean, rstd, [True] * 6)
        return recorded_launches


CALLS = (
    *(Call(architecture) for architecture in ARCHITECTURES),
    *(Call(90, channels=channels) for channels in (1152, 768, 4096)),
    Call(90, dtype=torch.float32),
    *(Call(90, per_level=letters) for letters in ("w", "g", "wg")),
    Call(90, dtype=torch.float32, per_level="g"),
    *(Call(architecture, kernels=("table_kernel",)) for architecture in ARCHITECTURES),
    *(Call(90, per_level=letters, trains=False, kernels=("merge_kernel",)) for letters in ("", "wg")),
)

if __name__ == "__main__":
    write_table(TABLE, CALLS)

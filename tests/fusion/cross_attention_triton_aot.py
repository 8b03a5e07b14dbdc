"""The calls of `local_cross_attention` whose Triton kernels are compiled ahead of time.

To write cross_attention_triton_aot.json anew, and print it:

    cd tests && python -m fusion.cross_attention_triton_aot
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from ahead_of_time import ARCHITECTURES, TYPES, Launch, recorded, write_table
from pyvlm.triton_kernels import cross_attention

TABLE = Path(__file__).with_name("cross_attention_triton_aot.json")


@dataclass(frozen=True)
class Call:
    """A call of the op and of its backward: 16 heads, and windows of some sides."""

    architecture: int
    dtype: torch.dtype = torch.bfloat16
    dim: int = 64
    sides: tuple[int, ...] = (1, 1, 1, 4)
    masked: bool = False
    kernels: tuple[str, ...] = ("forward_kernel", "backward_kernel")
    on_tensor_cores: tuple[str, ...] = ()  # one query has no matrix to multiply with

    def name(self, kernel: str) -> str:
        sides, masked = ",".join(map(str, self.sides)), " masked" if self.masked else ""
        return f"{kernel} sm_{self.architecture} {TYPES[self.dtype]} D{self.dim} sides {sides}{masked}"

    def launches(self, images: int = 4, grid: tuple[int, int] = (24, 24), heads: int = 16) -> list[Launch]:
        """The launches of one forward and backward."""
        queries = grid[0] * grid[1]

        def tokens(side: int) -> torch.Tensor:
            shape = (images, queries * side**2, heads, self.dim)
            return torch.empty(shape, dtype=self.dtype, device="meta").transpose(1, 2)

        query, maps = tokens(1), [tokens(side) for side in self.sides]
        masks = [
            torch.empty(images, queries * side**2, dtype=torch.bool, device="meta")
            for side in self.sides
            if self.masked
        ]
        arguments = (query, maps, maps, *grid, masks, 0.125)
        with recorded(cross_attention, self.architecture) as launches:
            out, lse = cross_attention.local_cross_attention(*arguments)
            cross_attention.local_cross_attention_backward(out, *arguments, out, lse)
        return launches


CALLS = (
    *(Call(architecture) for architecture in ARCHITECTURES),
    Call(90, dtype=torch.float32),
    Call(90, masked=True),
    Call(90, dim=128),
    Call(90, sides=(8, 8, 8)),  # several tiles a map
)

if __name__ == "__main__":
    write_table(TABLE, CALLS)

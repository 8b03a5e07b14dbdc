"""The calls of placement whose Triton kernels are compiled ahead of time.

To write placement_triton_aot.json anew, and print it:

    cd tests && python -m fusion.placement_triton_aot
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from ahead_of_time import ARCHITECTURES, TYPES, Launch, recorded, write_table
from pyvlm.triton_kernels import placement

TABLE = Path(__file__).with_name("placement_triton_aot.json")


@dataclass(frozen=True)
class Call:
    """A call of all three ops, of which the kernels are compiled: LLaVA-NeXT 7B's image of five tiles."""

    architecture: int
    dtype: torch.dtype = torch.bfloat16
    width: int = 4096
    index_dtype: torch.dtype = torch.int32
    kernels: tuple[str, ...] = (
        *("place_kernel 1", "place_kernel 2", "place_kernel 3", "place_kernel 4"),  # as in `launches`
        *("split_kernel 1", "split_kernel 2", "split_kernel 3"),
        *("sum_kernel 1", "sum_kernel 2", "sum_kernel 3"),
    )
    on_tensor_cores: tuple[str, ...] = ()

    def name(self, kernel: str) -> str:
        return f"{kernel} sm_{self.architecture} {TYPES[self.dtype]} {TYPES[self.index_dtype]} C{self.width}"

    def launches(
        self, samples: int = 1, length: int = 2788, rows: int = 2340, num_features: int = 2880
    ) -> list[Launch]:
        """The launches of one forward and backward of each."""

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        text, image_mask = empty(samples, length, self.width), empty(samples, length, dtype=torch.bool)
        features, newline = empty(num_features, self.width), empty(self.width)
        packed, index = empty(rows, self.width), empty(rows, dtype=self.index_dtype)
        sizes = (num_features, self.width)
        with recorded(placement, self.architecture) as recorded_launches:
            placement.place_image_tokens(text, packed, image_mask, None, None)
            placement.place_image_tokens(text, features, image_mask, index, newline)
            placement.pack_image_tokens(features, index, newline)
            placement.add_at_image_tokens(text, packed, image_mask)
            placement.place_image_tokens_backward(
                text, image_mask, None, rows, self.width, [True, True, False]
            )
            placement.place_image_tokens_backward(text, image_mask, index, *sizes, [True] * 3)
            placement.add_at_image_tokens_backward(text, image_mask, rows)
            placement.pack_image_tokens_backward(packed, index, *sizes, [True, False])
        return recorded_launches


CALLS = (
    *(Call(architecture) for architecture in ARCHITECTURES),
    Call(90, dtype=torch.float32),
    Call(90, width=1152, index_dtype=torch.int64),
)

if __name__ == "__main__":
    write_table(TABLE, CALLS)

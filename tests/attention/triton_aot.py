"""The calls of span attention whose Triton kernels are compiled ahead of time.

To write triton_aot.json anew, and print it:

    cd tests && python -m attention.triton_aot
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from ahead_of_time import ARCHITECTURES, TYPES, Launch, recorded, write_table
from pyvlm.triton_kernels import attention

TABLE = Path(__file__).with_name("triton_aot.json")
MAIN_KERNELS = ("forward_kernel", "grad_q_kernel", "grad_kv_kernel")


@dataclass(frozen=True)
class Call:
    """A call of the op, of which the kernels are compiled: its heads on 4, 4,096 tokens."""

    architecture: int
    head_dim: int
    streams: str  # "one range", "joint" (two ranges) or "separate"
    dtype: torch.dtype = torch.bfloat16
    queries: int = 4096
    kernels: tuple[str, ...] = MAIN_KERNELS
    softcap: float = 0.0
    heads: int = 8
    sinks: bool = False

    @property
    def on_tensor_cores(self) -> tuple[str, ...]:
        return () if self.dtype == torch.float32 else MAIN_KERNELS

    @property
    def spills(self) -> int:
        """Known spills of a loop: a float32 product is three of tf32, with fragments of their own."""
        return 156 if self.dtype == torch.float32 and self.head_dim > 128 else 0

    def name(self, kernel: str) -> str:
        few = "" if self.queries == 4096 else f" I{self.queries}"
        softcap = " softcap" if self.softcap else ""
        name = f"{kernel} sm_{self.architecture} D{self.head_dim} {TYPES[self.dtype]} {self.streams}"
        heads = "" if self.heads == 8 else f" H{self.heads}"
        sinks = " sinks" if self.sinks else ""
        return name + few + softcap + heads + sinks

    def launches(
        self,
        keys: int = 4096,
        batch: int = 2,
        masks: tuple[int, ...] = (2, 4),
        scale: float = 0.125,
        padding: int = 0,
    ) -> list[Launch]:
        """The launches of one forward and backward; `padding` lies between the rows of q, k and v."""
        ranges = 1 if self.streams == "one range" else 2
        head_dim = self.head_dim

        def empty(heads: int, tokens: int) -> torch.Tensor:
            full = torch.empty((batch, heads, tokens, head_dim + padding), dtype=self.dtype, device="meta")
            return full[..., :head_dim]

        q, k, v = empty(self.heads, self.queries), empty(4, keys), empty(4, keys)
        spans = (
            torch.empty((batch, self.queries, ranges, 2), dtype=torch.int32, device="meta"),
            torch.empty((batch, keys), dtype=torch.uint8, device="meta"),
            masks[:ranges],
            self.streams == "separate",
        )
        options = (scale, self.softcap, q.new_empty(self.heads) if self.sinks else None)
        with recorded(attention, self.architecture) as recorded_launches:
            results = attention.span_attention(q, k, v, *spans, *options)
            attention.span_attention_backward(torch.empty_like(q), None, q, k, v, *spans, *options, *results)
        return recorded_launches


def most_rows(architecture: int, head_dim: int, dtype: torch.dtype) -> Call:
    """As many queries as are still decoded: two streams of two heads a key head, each a row."""
    config = attention.default_config(head_dim, dtype, divmod(architecture, 10))
    queries = config.decode_rows // 4
    return Call(architecture, head_dim, "separate", dtype, queries=queries, kernels=("decode_kernel",))


DECODING = ("decode_kernel", "combine_kernel")
HELPERS = ("summarise_keys", "summarise_queries", "row_statistics")
STREAMS = ("one range", "joint", "separate")
CALLS = (
    *(
        Call(architecture, head_dim, streams)
        for architecture in ARCHITECTURES
        for head_dim in (64, 128, 256)
        for streams in STREAMS
    ),
    *(Call(90, head_dim, "one range", softcap=50.0) for head_dim in (128, 256)),  # as Gemma 2's
    *(Call(architecture, 64, "separate", torch.float32) for architecture in ARCHITECTURES),
    *(Call(90, head_dim, "separate", torch.float32) for head_dim in (128, 256)),
    *(Call(architecture, 128, "separate", kernels=HELPERS) for architecture in ARCHITECTURES),
    *(
        Call(architecture, head_dim, "separate", queries=1, kernels=DECODING)
        for architecture in ARCHITECTURES
        for head_dim in (64, 128, 256)
    ),
    # Four heads a key head, and no second softmax: what benchmarks measure.
    Call(90, 128, "one range", queries=1, heads=16, kernels=DECODING),
    *(
        most_rows(architecture, head_dim, dtype)
        for architecture in (80, 90)
        for head_dim in (128, 256)
        for dtype in (torch.bfloat16, torch.float32)
    ),
    # The other helpers that benchmarks launch; the first keys to be summarised are the forward's.
    Call(90, 128, "one range", kernels=("summarise_keys 1", *HELPERS)),
    Call(90, 128, "joint", kernels=("summarise_queries", "row_statistics")),
    Call(90, 128, "separate", kernels=("summarise_keys 1",)),
    *(Call(90, 64, streams, kernels=("row_statistics",)) for streams in ("one range", "separate")),
    Call(90, 128, "one range", torch.float16),
    *(Call(90, head_dim, "one range") for head_dim in (72, 80, 96)),  # filled up to 128
    *(Call(80, 72, streams) for streams in STREAMS),
    Call(90, 64, "one range", heads=32, sinks=True, kernels=("forward_kernel",)),  # gpt-oss
    Call(90, 64, "one range", queries=1, heads=32, sinks=True, kernels=DECODING),
    *(
        Call(architecture, head_dim, "separate", torch.float32)
        for architecture in (80, 100)
        for head_dim in (128, 256)
    ),
)


if __name__ == "__main__":
    write_table(TABLE, CALLS)

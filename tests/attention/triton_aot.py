"""Compiles the Triton kernels of span attention as they are launched, for GPUs that need not be there.

The launches are those of the entry points, on tensors without memory (torch's meta device), with `launch`
replaced. What a compiled kernel takes is read from its machine code with the tools in Triton's wheel.

    python tests/attention/triton_aot.py        # writes triton_aot.json anew, and prints it
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from pyvlm.triton_kernels import attention
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

TABLE = Path(__file__).with_name("triton_aot.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.uint8: "u8",
}
SCALARS = {"int32": "i32", "int64": "i64", "float32": "fp32"}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program may have
MATRIX_INSTRUCTIONS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # HGMMA: wgmma, UTCHMMA: tcgen05
MAIN_KERNELS = ("forward_kernel", "grad_q_kernel", "grad_kv_kernel")


@dataclass(frozen=True)
class Launch:
    kernel: Any
    tiles: attention.Tiles
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A call of the op, of which the kernels are compiled: 8 heads on 4, 4,096 tokens."""

    architecture: int
    head_dim: int
    streams: str  # "one range", "joint" (two ranges) or "separate"
    dtype: torch.dtype = torch.bfloat16
    queries: int = 4096
    kernels: tuple[str, ...] = MAIN_KERNELS

    def name(self, kernel: str) -> str:
        return f"{kernel} sm_{self.architecture} D{self.head_dim} {TYPES[self.dtype]} {self.streams}"


CALLS = (
    *(Call(architecture, head_dim, "separate") for architecture in (80, 90, 100) for head_dim in (64, 128)),
    *(Call(90, head_dim, "one range") for head_dim in (64, 128)),
    Call(90, 128, "joint", kernels=("grad_kv_kernel",)),
    Call(90, 64, "separate", torch.float32),
    Call(90, 128, "separate", kernels=("summarise_keys", "summarise_queries", "row_statistics")),
    Call(90, 128, "separate", queries=1, kernels=("decode_kernel", "combine_kernel")),
)


@contextmanager
def recorded(architecture: int) -> Iterator[list[Launch]]:
    """Launches that happen inside, on a GPU of this architecture, are only written down."""
    launches: list[Launch] = []
    originals = {name: getattr(attention, name) for name in ("launch", "_capability", "_multiprocessors")}
    attention.launch = lambda kernel, grid, tiles, arguments: launches.append(
        Launch(kernel, tiles, {name: arguments[name] for name in kernel.arg_names})
    )
    attention._capability = lambda device: divmod(architecture, 10)
    attention._multiprocessors = lambda device: 132
    try:
        yield launches
    finally:
        for name, original in originals.items():
            setattr(attention, name, original)


def launches(
    call: Call,
    keys: int = 4096,
    batch: int = 2,
    masks: tuple[int, ...] = (2, 4),
    scale: float = 0.125,
    padding: int = 0,
) -> list[Launch]:
    """The launches of one forward and backward; `padding` lies between the rows of q, k and v."""
    ranges = 1 if call.streams == "one range" else 2
    head_dim = call.head_dim

    def empty(heads: int, tokens: int) -> torch.Tensor:
        full = torch.empty((batch, heads, tokens, head_dim + padding), dtype=call.dtype, device="meta")
        return full[..., :head_dim]

    q, k, v = empty(8, call.queries), empty(4, keys), empty(4, keys)
    spans = (
        torch.empty((batch, call.queries, ranges, 2), dtype=torch.int32, device="meta"),
        torch.empty((batch, keys), dtype=torch.uint8, device="meta"),
        masks[:ranges],
        call.streams == "separate",
    )
    with recorded(call.architecture) as recorded_launches:
        results = attention.span_attention(q, k, v, *spans, scale, 0.0)
        attention.span_attention_backward(
            torch.empty_like(q), None, q, k, v, *spans, scale, 0.0, None, *results
        )
    return recorded_launches


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and alignments, as Triton sees the arguments: no number is a constant or aligned."""
    types, constants, alignments = {}, {}, {}
    for parameter in launch.kernel.params:
        name = parameter.name
        value = launch.arguments[name]
        if parameter.is_constexpr or value is None:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            types[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + TYPES[value.dtype]
            alignments[(parameter.num,)] = [["tt.divisibility", 16]]
        else:
            assert parameter.do_not_specialize, name
            types[name] = SCALARS.get(parameter.annotation, parameter.annotation)
    return types, constants, alignments


def facts(launch: Launch, architecture: int) -> dict[str, Any]:
    """Registers a thread, bytes of local memory (spills) and of shared memory, and matrix instructions."""
    types, constants, alignments = signature(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, types, constants, alignments),
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": launch.tiles.warps,
            "num_stages": launch.tiles.stages,
            "enable_fp_fusion": True,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for command in (
                [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
                [TOOLS / "nvdisasm", file.name],
            )
        )
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups()
    matrix = Counter(re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", code))
    return {
        "registers": int(registers),
        "local_bytes": int(stack) + int(local),
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": dict(sorted(matrix.items())),
    }


def compile_call(call: Call) -> dict[str, dict[str, Any]]:
    """The facts of the kernels of a call, by their names in the table."""
    found = {launch.kernel.__name__: launch for launch in launches(call)}
    return {call.name(name): facts(found[name], call.architecture) for name in call.kernels}


def main() -> None:
    kernels = {name: row for call in CALLS for name, row in compile_call(call).items()}
    table = {"triton": triton.__version__, "kernels": kernels}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    for name, row in kernels.items():
        print(name, row)


if __name__ == "__main__":
    main()

"""Compiles Triton kernels as they are launched, for GPUs that need not be there.

The launches are those of a family's entry points, on tensors without memory (torch's meta device), with
`launch` replaced. What a compiled kernel takes is read from its machine code with the tools in Triton's
wheel. Each family has a file of calls, and a table of what their kernels took.
"""

import json
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
SCALARS = {"int32": "i32", "int64": "i64", "float32": "fp32"}
ARCHITECTURES = (80, 90, 100)
MULTIPROCESSORS = 132  # of the GPU that launches are for
REGISTERS = 2**16  # of a multiprocessor; a warp has them in eights for each of its 32 threads
# Bytes that one program may have. 8.6 and 8.9 run what 8.0 does, and have less of it.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
SPILL = re.compile(r"\b(LDL|STL)\b")
EXPONENTIAL = re.compile(r"\bMUFU\.EX2\b")
WGMMA = re.compile(r"\bHGMMA\b")
WGMMA_WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b")
NARROW_LOAD = re.compile(r"\bLDG\S*\.[US]16\b")  # one number of a tensor of bfloat16, and not asynchronous
MATRIX_INSTRUCTIONS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # HGMMA: wgmma, UTCHMMA: tcgen05
# Another version of Triton gives registers away otherwise: such a part of a main loop may then be spills.
SPILLS_OF_OTHER_VERSIONS = 0.02
# Bytes that may lie in local memory outside of main loops, where they are written and read once.
MOST_LOCAL_BYTES = 512

compiles_ahead_of_time = [
    pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="this Triton has no compiler for NVIDIA GPUs"),
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: kernels are not compiled"),
]


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    tiles: Any
    arguments: dict[str, Any]


class Call(Protocol):
    """A call of an op, of which some kernels are compiled for an architecture (80: capability 8.0)."""

    architecture: int
    kernels: tuple[str, ...]

    @property
    def on_tensor_cores(self) -> tuple[str, ...]:
        """The kernels that must make their products with this architecture's own instructions."""

    def name(self, kernel: str) -> str:
        """What the table calls a kernel of this call."""

    def launches(self) -> list[Launch]: ...


@contextmanager
def recorded(family: ModuleType, architecture: int) -> Iterator[list[Launch]]:
    """Launches of a family that happen inside, on a GPU of this architecture, are only written down."""
    launches: list[Launch] = []
    replacements = {
        "launch": lambda kernel, grid, tiles, arguments: launches.append(
            Launch(kernel, grid, tiles, {name: arguments[name] for name in kernel.arg_names})
        ),
        "capability": lambda device: divmod(architecture, 10),
        "multiprocessors": lambda device: MULTIPROCESSORS,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in replacements.keys() & vars(family).keys():
            patch.setattr(family, name, replacements[name])
        yield launches


def signature(
    launch: Launch,
) -> tuple[dict[str, Any], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, constants and alignments, as Triton sees the arguments: no number is a constant or aligned.

    Except in a tuple of tensors and strides: there Triton looks at them.
    """
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
        elif isinstance(value, tuple) and parameter.do_not_specialize:  # of numbers
            types[name] = ("i64",) * len(value)
        elif isinstance(value, tuple):
            types[name] = _types_in(value, (parameter.num,), alignments)
        else:
            assert parameter.do_not_specialize, name
            types[name] = SCALARS.get(parameter.annotation, parameter.annotation)
    return types, constants, alignments


def _types_in(value: Any, path: tuple[int, ...], alignments: dict[tuple[int, ...], list[list[Any]]]) -> Any:
    """The types of a tuple of tensors, strides or tuples; it adds their alignments."""
    if isinstance(value, tuple):
        return tuple(_types_in(item, (*path, i), alignments) for i, item in enumerate(value))
    is_tensor = isinstance(value, torch.Tensor)
    if is_tensor or value % 16 == 0:
        alignments[path] = [["tt.divisibility", 16]]
    return "*" + TYPES[value.dtype] if is_tensor else "i32"


def facts(launch: Launch, architecture: int) -> dict[str, Any]:
    """Registers a thread, bytes of local memory and of shared memory, matrix instructions, and of each main
    loop the instructions and how many of them are spills, or loads of two bytes; with wgmma also how many of
    its exponentials are made while one runs, and how many there are."""
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
        # -c -ndf: the code without the data's flow, in half the time
        usage, code = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in (
                (TOOLS / "cuobjdump", "--dump-resource-usage"),
                (TOOLS / "nvdisasm", "-c", "-ndf"),
            )
        )
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups()
    loops = main_loops(code)
    found = {
        "registers": int(registers),
        "local_bytes": int(stack) + int(local),
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": dict(sorted(Counter(MATRIX.findall(code)).items())),
        "loop_instructions": [len(loop) for loop in loops],
        "loop_spills": [sum(map(bool, map(SPILL.search, loop))) for loop in loops],
        "loop_narrow_loads": [sum(map(bool, map(NARROW_LOAD.search, loop))) for loop in loops],
    }
    if "HGMMA" in found["matrix_instructions"]:
        exponentials = [exponentials_beside_wgmma(loop) for loop in loops]
        if any(total for _, total in exponentials):
            found["loop_exponentials_beside_wgmma"] = exponentials
    return found


def main_loops(code: str) -> list[list[str]]:
    """The innermost loops that have matrix instructions, from what nvdisasm prints."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
    loops = []
    for i, line in enumerate(lines):
        if (to := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and labels[to[1]] <= i:
            loop = range(labels[to[1]], i + 1)
            # Waiting for a barrier is written behind the end of the program, and goes back from there.
            beyond = any(re.search(r"\bEXIT\b", lines[j]) for j in loop)
            if not beyond and any(MATRIX.search(lines[j]) for j in loop):
                loops.append(loop)
    innermost = [
        loop for loop in loops if not any(other != loop and set(other) <= set(loop) for other in loops)
    ]
    return [[lines[i] for i in loop] for loop in innermost]


def exponentials_beside_wgmma(loop: list[str]) -> list[int]:
    """How many of a loop's exponentials are made after a wgmma has been issued and before it is waited for;
    and how many there are."""
    running, beside = False, 0
    for i, instruction in enumerate(loop * 2):  # what is issued at the end of a round may run on in the next
        if WGMMA.search(instruction):
            running = True
        elif WGMMA_WAIT.search(instruction):
            running = False
        elif i >= len(loop):
            beside += running and bool(EXPONENTIAL.search(instruction))
    return [beside, sum(map(bool, map(EXPONENTIAL.search, loop)))]


def compiled_launches(call: Call) -> dict[str, Launch]:
    """The launches of a call whose kernels are compiled, by the names that the call has for these.

    Of several launches of a kernel the last is meant; the others are `kernel 1`, `kernel 2` and so on.
    """
    found: dict[str, Launch] = {}
    count: Counter[str] = Counter()
    for launch in call.launches():
        name = launch.kernel.__name__
        count[name] += 1
        found[name] = found[f"{name} {count[name]}"] = launch
    return {name: found[name] for name in call.kernels}


def compile_call(call: Call) -> dict[str, dict[str, Any]]:
    """The facts of the kernels of a call, by their names in the table."""
    launches = compiled_launches(call)
    return {call.name(name): facts(launch, call.architecture) for name, launch in launches.items()}


def write_table(table: Path, calls: Sequence[Call]) -> None:
    kernels = {name: row for call in calls for name, row in compile_call(call).items()}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
    table.write_text(f'{{"triton": "{triton.__version__}", "kernels": {{\n{rows}\n}}}}\n')
    for name, row in kernels.items():
        print(name, row)


def check_machine_code(
    call: Call, table: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spills: int = 0
) -> None:
    """No spills in a main loop, or as many as are known; the GPU's own matrix instructions; shared memory
    that it has; loads of more than one number; and as in the table. Without a main loop nothing spills."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what was compiled before proves nothing
    stored = json.loads(table.read_text())
    same_version = stored["triton"] == triton.__version__
    for name, row in compile_call(call).items():
        allowed = spills
        if not same_version:
            allowed += int(SPILLS_OF_OTHER_VERSIONS * max(row["loop_instructions"], default=0))
        found = max(row["loop_spills"]) if row["loop_spills"] else row["local_bytes"]
        assert found <= allowed, (name, row)
        assert spills or row["local_bytes"] <= MOST_LOCAL_BYTES, (name, row)
        assert not any(row["loop_narrow_loads"]), (name, row)
        assert row["shared_bytes"] <= SHARED_MEMORY[call.architecture], (name, row)
        if name.split()[0] in call.on_tensor_cores:
            instruction = MATRIX_INSTRUCTIONS[call.architecture]
            assert row["matrix_instructions"].get(instruction, 0) >= 2 * 2, (name, row)
            assert row["loop_instructions"], (name, row)
        if same_version:
            assert row == stored["kernels"][name], (
                f"{name}: where this is meant, write {table.name} anew, as {type(call).__module__} says, "
                "and commit it"
            )


def check_that_all_programs_run_at_once(call: Call, kernel: str, table: Path, **sizes: int) -> None:
    """Of a call of such sizes, by the registers and the shared memory in the table.

    Programs that share the rows of a tensor take as long as each other: one more than fit would begin when
    all others end.
    """
    *_, launch = (launch for launch in call.launches(**sizes) if launch.kernel.__name__ == kernel)
    row = json.loads(table.read_text())["kernels"][call.name(kernel)]
    registers = -(-row["registers"] // 8) * 8 * 32 * launch.tiles.warps
    shared = row["shared_bytes"] + 1024  # of which the system takes 1 KiB a program
    fit = min(REGISTERS // registers, (SHARED_MEMORY[call.architecture] + 1024) // shared)
    assert math.prod(launch.grid) <= MULTIPROCESSORS * fit, (launch.grid, fit)


def specialisations(launches: list[Launch], architecture: int) -> list[tuple[str, str, Any]]:
    """What Triton would look kernels up by: types, and the values and alignments that it compiles in."""
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    keys = []
    for launch in launches:
        kernel = launch.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        # Host memory in place of the meta device's, whose address is 0: what counts is how it is aligned.
        arguments = {name: _aligned(value) for name, value in launch.arguments.items()}
        keys.append((kernel.__name__, str(bind(**arguments)[1]), launch.tiles))
    return keys


def check_no_number_is_specialised(launches: list[Launch]) -> None:
    for launch in launches:
        types, constants, alignments = signature(launch)  # it asserts that numbers are left alone
        for index, parameter in enumerate(launch.kernel.params):
            is_pointer = str(types[parameter.name]).startswith("*")
            assert ((index,) in alignments) == is_pointer
            assert is_pointer or parameter.name in constants or parameter.do_not_specialize


def _aligned(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_aligned, value))
    if not isinstance(value, torch.Tensor):
        return value
    # An allocation is aligned, and a view of one is as far behind that as it begins.
    offset = value.storage_offset() % 16
    return torch.zeros(16 + offset, dtype=value.dtype)[offset:]

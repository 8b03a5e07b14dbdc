"""Builds the wheel: compiles what csrc/sources.txt lists into `pyvlm._C` and, where torch is a CUDA build and
nvcc is found, its .cu files into `pyvlm._C_cuda`, by a generated ninja file."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import CUDA_HOME, include_paths

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

# Each row gives an object of every `each-isa` source. The baseline comes first: where several objects carry
# the same inline function, the linker keeps the first one, and that one must run on every machine.
ISA_FLAGS = {"DEFAULT": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["AVX2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["AVX512"] = (
        "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512"
        " -mamx-tile -mamx-bf16"  # only where intrinsics ask for them, behind a look at the processor
    )


def objects() -> list[tuple[str, str, str]]:
    """(source, object, instruction set) of every object of `_C`, from csrc/sources.txt."""
    rows = []
    for line in (CSRC / "sources.txt").read_text().splitlines():
        source, *kind = line.split("#")[0].split() or [""]
        stem = source.removesuffix(".cpp")
        if kind == ["each-isa"]:
            rows += [(source, f"{stem}.{isa}.o", isa) for isa in ISA_FLAGS]
        elif source.endswith(".cpp"):
            rows.append((source, f"{stem}.o", ""))
    rank = {isa: i for i, isa in enumerate(ISA_FLAGS)}
    return sorted(rows, key=lambda row: rank.get(row[2], 0))


def precompiled(source: str, isa: str) -> str:
    """The header below csrc/, without its `.h`, that is compiled once and put before this source."""
    layer = "kernels" if isa else "bindings" if source.startswith("bindings/") else "ops"
    return f"precompiled_{layer}"


def cuda_objects() -> list[tuple[str, str]]:
    """(source, object) of every object of `_C_cuda`, from csrc/sources.txt."""
    sources = [line.split("#")[0].strip() for line in (CSRC / "sources.txt").read_text().splitlines()]
    return [(source, f"{source}.o") for source in sources if source.endswith(".cu")]


def why_no_cuda() -> str | None:
    """Why `_C_cuda` cannot be built here, or None where it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return "there is no nvcc" if CUDA_HOME is None else None


class NinjaBuildExt(build_ext):
    """setuptools' build_ext recompiles everything on any change and has one set of flags for all sources."""

    def run(self) -> None:
        if (reason := why_no_cuda()) is not None:
            print(f"pyvlm._C_cuda is not built: {reason}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        build = (ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}").resolve()
        build.mkdir(parents=True, exist_ok=True)
        compiler = (self.compiler.compiler_cxx or ["c++"])[0]
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        includes = [*include_paths(), sysconfig.get_path("include")]  # torch's bring pybind11's
        flags = [
            "-std=c++20 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math",
            "-Wall -Wno-unknown-pragmas -Wno-psabi",
            "-Wno-maybe-uninitialized -Wno-uninitialized",  # GCC's own intrinsics
            f"-DPYVLM_COMPILER='\"{re.sub(r'[^ -~]', '', version.splitlines()[0])}\"'",
            f"-I{CSRC.resolve()}",
            *(f"-isystem {path}" for path in includes),
        ]
        libraries = Path(torch.__file__).parent / "lib"
        link = f"-shared -fopenmp -L{libraries} -lc10 -ltorch_cpu -ltorch -ltorch_python"
        if sys.platform == "darwin":
            link += " -undefined dynamic_lookup"
        rules = [
            f"cxx = {compiler}",
            f"cxxflags = {' '.join(flags)}",
            "rule compile",
            "  command = $cxx $cxxflags $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            f"  command = $cxx $in {link} -o $out",
            "  description = link $out",
        ]
        isa_flags = {"": ""} | {
            isa: f"-DCPU_CAPABILITY={isa} -DCPU_CAPABILITY_{isa} {extra}" for isa, extra in ISA_FLAGS.items()
        }
        rows = objects()
        for header, isa in sorted({(precompiled(source, isa), isa) for source, _, isa in rows}):
            rules += [
                f"build {header}{isa}.h.gch: compile {CSRC.resolve() / header}.h",
                f"  extra = {isa_flags[isa]} -x c++-header",
            ]
        for source, obj, isa in rows:
            header = precompiled(source, isa) + isa
            rules += [
                f"build {obj}: compile {CSRC.resolve() / source} | {header}.h.gch",
                f"  extra = {isa_flags[isa]} -include {header}.h",
            ]
        rules += [f"build _C.so: link {' '.join(obj for _, obj, _ in rows)}", ""]
        if why_no_cuda() is None:
            rules += self.cuda_rules(includes, libraries)
        library = f"{ext.name.split('.')[-1]}.so"
        (build / "build.ninja").write_text("\n".join(rules))
        # make -j tells of files that hold its jobs, which Python does not pass on, and ninja would miss.
        environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
        ninja = [sys.executable, "-m", "ninja", "--quiet", "-C", str(build), library]
        subprocess.run(ninja, env=environment, check=True)
        # In place and into a wheel: what was linked once is copied, not linked anew.
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / library, target)

    def cuda_rules(self, includes: list[str], libraries: Path) -> list[str]:
        # The stable ABI of torch 2.11, which later versions keep. -arch=all-major: machine code for every
        # generation that this nvcc knows, and PTX for later ones.
        flags = [
            "-std=c++20 -O3 -arch=all-major --threads 0",
            "-Xcompiler -fPIC,-fvisibility=hidden,-Wall -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000",
            f"-I{CSRC.resolve()}",
            *(f"-isystem {path}" for path in includes),
        ]
        rows = cuda_objects()
        return [
            f"nvcc = {Path(CUDA_HOME) / 'bin' / 'nvcc'}",
            f"nvccflags = {' '.join(flags)}",
            "rule nvcc",
            "  command = $nvcc $nvccflags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule nvlink",
            f"  command = $nvcc -shared $in -L{libraries} -ltorch_cpu -ltorch_cuda -ltorch -o $out",
            "  description = link $out",
            *(f"build {obj}: nvcc {CSRC.resolve() / source}" for source, obj in rows),
            f"build _C_cuda.so: nvlink {' '.join(obj for _, obj in rows)}",
            "",
        ]


setup(
    packages=[
        "pyvlm",
        *(
            f"pyvlm.{name}"
            for name in (
                "ops",
                "reference",
                "nn",
                "models",
                "data",
                "training",
                "recipes",
                "integrations",
                "integrations.transformers",
            )
        ),
        "pyvlm.triton_kernels",
    ],
    package_dir={"pyvlm": "pyvlm", "pyvlm.triton_kernels": "triton_kernels"},
    package_data={
        "pyvlm": ["py.typed"],
        "pyvlm.recipes": ["*.yaml"],
        "pyvlm.models": ["chat_templates/*.jinja"],
        "pyvlm.training": ["templates/*"],
    },
    ext_modules=[
        Extension(name, sources=[])
        for name in ("pyvlm._C", *(["pyvlm._C_cuda"] if why_no_cuda() is None else []))
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)

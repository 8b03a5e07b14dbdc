"""The CUDA sources compile without a GPU and without CUDA in torch, and their kernels do not spill."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

import pyvlm
from benchmarks.gpu.facts import find_nvcc

CSRC = Path(__file__).parents[2] / "csrc"
LINES = [line.split("#")[0].strip() for line in (CSRC / "sources.txt").read_text().splitlines()]
SOURCES = [line for line in LINES if line.endswith(".cu")]
ARCHITECTURES = (80, 90, 100)
NVCC = find_nvcc()

pytestmark = pytest.mark.skipif(
    NVCC is None, reason="there is no nvcc, on the PATH or in CUDA_HOME, to compile CUDA sources"
)

LOAD = """
import importlib.machinery, importlib.util, os, sys
sys.setdlopenflags(os.RTLD_LAZY)  # a torch without CUDA lacks functions that only a call would need
import pyvlm
loader = importlib.machinery.ExtensionFileLoader("pyvlm._C_cuda", sys.argv[1])
spec = importlib.util.spec_from_loader("pyvlm._C_cuda", loader)
extension = importlib.util.module_from_spec(spec)
loader.exec_module(extension)
import torch
assert extension.CUDART_VERSION >= 12000
for op in sys.argv[2:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pyvlm::{op}", "CUDA"), op
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """The object of each source, and what ptxas says about its kernels. Warnings are errors."""
    folder = tmp_path_factory.mktemp("cuda_build")
    includes = [*include_paths(), sysconfig.get_path("include")]
    command = [
        str(NVCC),
        *["-std=c++20", "-O3", "--threads", "0", "--Werror", "all-warnings", "-Xptxas", "-v"],
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES),
        *["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Werror"],
        *["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"],  # as setup.py: what torch 2.11 has
        f"-I{CSRC}",
        *(f"-isystem={path}" for path in includes),
    ]
    runs = {}
    for source in SOURCES:
        target = folder / f"{source.replace('/', '_')}.o"
        arguments = [*command, "-c", str(CSRC / source), "-o", str(target)]
        runs[source] = target, subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    results = {}
    for source, (target, run) in runs.items():
        output = run.communicate()[0].decode()
        assert run.returncode == 0, output
        results[source] = target, output
    return results


def test_kernels_do_not_spill(compiled: dict[str, tuple[Path, str]]) -> None:
    kernels = []
    for _, output in compiled.values():
        for part in output.split("Compiling entry function")[1:]:
            name, number = re.findall(r"'(\w+)' for 'sm_(\d+)'", part)[0]
            assert re.findall(r"(\d+) bytes (?:stack frame|spill)", part), part
            assert all(amount == "0" for amount in re.findall(r"(\d+) bytes (?:stack frame|spill)", part)), (
                part
            )
            kernels.append((name, int(number)))
    names = {name for name, _ in kernels}
    assert len(names) > 0
    assert sorted(kernels) == sorted((name, number) for name in names for number in ARCHITECTURES)


@pytest.mark.skipif(sys.platform != "linux", reason="lazy binding of functions that torch lacks is Linux's")
def test_the_extension_registers_its_kernels(compiled: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    library = tmp_path / "_C_cuda.so"
    objects = [str(target) for target, _ in compiled.values()]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch"]
    subprocess.run([str(NVCC), "-shared", *objects, *libraries, "-o", str(library)], check=True)
    ops = re.findall(r'm\.impl\("(\w+)"', (CSRC / "bindings/ops_cuda.cu").read_text())
    assert ops
    subprocess.run([sys.executable, "-c", LOAD, str(library), *ops], check=True)


def test_a_missing_extension_is_told() -> None:
    if torch.version.cuda is None:
        assert "pyvlm._C_cuda" in pyvlm.build_info()["native_cuda"]["error"]
    else:
        assert pyvlm.build_info()["native_cuda"]["cuda_runtime"] >= 12000

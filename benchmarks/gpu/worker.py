"""One part of a run in a process of its own: `python -m benchmarks.gpu.worker PART FILE SECONDS [--dry-run]`.

The file is written anew after every record, so that whoever ends this process has what was measured.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.facts import installed

ROOT = Path(__file__).parents[2]
DONE, FAILED, OUT_OF_TIME = "done", "failed", "out of time"
Write = Callable[[dict[str, Any]], None]


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


def build(dry_run: bool, write: Write) -> None:
    """`_C` and `_C_cuda` in place, with the Python and the nvcc that are there."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if dry_run:
        write({"status": DONE, "detail": f"a dry run builds nothing; it would run {' '.join(command)}"})
        return
    if find_spec("pyvlm.triton_kernels") is None:  # an installation maps the package there; else a link does
        link = ROOT / "pyvlm" / "triton_kernels"
        link.symlink_to(Path("..") / "triton_kernels", target_is_directory=True)
    start = time.monotonic()
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - start
    print(run.stdout + run.stderr)
    if run.returncode != 0:
        write({"status": FAILED, "detail": (run.stdout + run.stderr)[-3000:], "build_s": seconds})
        return
    ask = "import json, pyvlm; print(json.dumps(pyvlm.build_info()))"
    info = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    if info.returncode != 0:
        write({"status": FAILED, "detail": info.stderr[-3000:], "build_s": seconds})
        return
    found = json.loads(info.stdout.splitlines()[-1])
    error = found["native"].get("error") or found["native_cuda"].get("error")
    status = {"status": DONE} if error is None else {"status": FAILED, "detail": error}
    write({**status, "build_s": seconds, "build_info": found})


_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)")


def run_tests(dry_run: bool, write: Write) -> None:
    """tests/gpu on the GPU, or in a dry run on the CPU; what has failed is told as it fails."""
    device = "on-cpu" if dry_run else "on-cuda"
    command = [
        sys.executable,
        "-u",
        "-m",
        "pytest",
        "tests/gpu",
        "-v",
        "-k",
        device,
        "-p",
        "no:cacheprovider",
    ]
    command += ["-o", "addopts=-ra"]  # the project's own name plugins that may not be here
    if installed("pytest-xdist") is None:
        command += ["-W", "ignore::pytest.PytestUnknownMarkWarning"]
    else:
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"]
    content: dict[str, Any] = {"status": OUT_OF_TIME, "counts": {}, "failures": []}
    write(content)
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    told, line = [], ""
    for line in run.stdout:
        print(line, end="", flush=True)
        if re.match(r"(FAILED|ERROR) ", line):  # of the list at the end, with the reasons
            told.append(line.strip()[:300])
        elif re.search(r" (FAILED|ERROR)( |$)", line) and "tests/gpu" in line:
            content["failures"].append(line.strip()[:300])
            write(content)
    counts = {name: int(number) for number, name in _COUNT.findall(line)}
    passed = run.wait() == 0
    detail = "" if passed else f"pytest ended with {run.returncode}"
    failures = told or content["failures"]
    status = DONE if passed else FAILED
    write(content | {"status": status, "counts": counts, "failures": failures, "detail": detail})


def run_part(part: str, dry_run: bool, seconds: float, write: Write) -> None:
    from benchmarks.gpu.parts import PARTS, Context

    device = torch.device("cpu" if dry_run else "cuda")
    if dry_run:  # compiling takes minutes, and shows nothing of a GPU's code
        torch.compile = lambda function=None, **_: function
    context = Context(device, dry_run, time.monotonic() + seconds)
    records: list[dict[str, Any]] = []
    write({"status": OUT_OF_TIME, "records": records})
    for record in PARTS[part](context):
        records.append(record)
        write({"status": OUT_OF_TIME, "records": records})
        print(part, record["case"], record.get("pass", ""), flush=True)
    status = DONE if context.in_time() else OUT_OF_TIME
    write({"status": status, "records": records})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("part")
    parser.add_argument("file", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()

    def write(content: dict[str, Any]) -> None:
        write_atomically(given.file, content)

    if given.part == "build":
        build(given.dry_run, write)
    elif given.part == "tests":
        run_tests(given.dry_run, write)
    else:
        run_part(given.part, given.dry_run, given.seconds, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())

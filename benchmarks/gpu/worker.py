"""One part of a run in a process of its own: `python -m benchmarks.gpu.worker --help`.

The file is written anew after every record, so that whoever ends this process has what was measured. Where a
kernel has taken the GPU from this process it ends, and another one goes on, with the same file, behind the
job that it was at.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.facts import installed
from benchmarks.gpu.pytest_reasons import REASON

ROOT = Path(__file__).parents[2]
DONE, FAILED, OUT_OF_TIME = "done", "failed", "out of time"
FAULT = 3  # exit status where a job broke off, and the others are still to be run
TOLD = 3000  # characters of what went wrong
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
    start = time.monotonic()
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    content: dict[str, Any] = {"status": DONE, "build_s": time.monotonic() - start}
    print(run.stdout + run.stderr)
    if run.returncode != 0:
        content |= {"status": FAILED, "detail": (run.stdout + run.stderr)[-TOLD:]}
    # What was not built may be a part of it: the routers alone need `_C_cuda`.
    ask = "import json, pyvlm; print(json.dumps(pyvlm.build_info()))"
    info = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    if info.returncode != 0:
        write({"detail": info.stderr[-TOLD:]} | content | {"status": FAILED})
        return
    found = json.loads(info.stdout.splitlines()[-1])
    error = found["native"].get("error") or found["native_cuda"].get("error")
    if error is not None:
        content = {"detail": error} | content | {"status": FAILED}
    write(content | {"build_info": found})


_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)")


def run_tests(dry_run: bool, seconds: float, write: Write) -> None:
    """tests/gpu on the GPU, or in a dry run on the CPU; what has failed is told as it fails."""
    device = "on-cpu" if dry_run else "on-cuda"
    command = [sys.executable, "-u", "-m", "pytest", "tests/gpu", "-v", "-k", device]
    command += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_reasons"]
    command += ["-o", "addopts=-ra"]  # the project's own name plugins that may not be here
    if installed("pytest-xdist") is None:
        command += ["-W", "ignore::pytest.PytestUnknownMarkWarning"]
    else:
        # Compiling takes most of the time, so each core has a worker.
        command += ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "loadgroup"]
    content: dict[str, Any] = {"status": OUT_OF_TIME, "counts": {}, "failures": []}
    write(content)
    # Each worker would have as many more processes to compile in.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    # Asked to end, pytest still tells what it knows.
    interrupt = threading.Timer(seconds, run.send_signal, [signal.SIGINT])
    interrupt.daemon = True
    interrupt.start()
    line = ""
    for line in run.stdout:
        print(line, end="", flush=True)
        if line.startswith(REASON):
            content["failures"].append(line.removeprefix(REASON).strip()[:600])
            write(content)
    in_time = interrupt.is_alive()
    interrupt.cancel()
    content["counts"] = {name: int(number) for number, name in _COUNT.findall(line)}
    ended = run.wait()
    if in_time:
        content["status"] = DONE if ended == 0 else FAILED
        content["detail"] = "" if ended == 0 else f"pytest ended with {ended}"
    else:
        content["detail"] = f"interrupted after {seconds:.0f} s"
    write(content)


def run_part(
    part: str, dry_run: bool, seconds: float, write: Write, before: dict[str, Any], of: Sequence[str] = ()
) -> int:
    """Goes on from what an earlier process has written, `before`; returns the exit status."""
    from benchmarks.gpu import compilation
    from benchmarks.gpu.parts import PARTS, Context

    if dry_run:  # compiling takes minutes, and shows nothing of a GPU's code
        torch.compile = lambda function=None, **_: function
    context = Context(torch.device("cpu" if dry_run else "cuda"), dry_run, time.monotonic() + seconds)
    if part == "compile":
        compilation.run(of, context, write)
        return 0
    content = {"records": [], "broken": [], "begun": 0} | before | {"status": OUT_OF_TIME}
    write(content)
    jobs = PARTS[part]
    for i in range(content["begun"], len(jobs)):
        now = time.monotonic()
        if now >= context.deadline:
            return 0
        content |= {"begun": i + 1, "job": jobs[i].name}
        write(content)
        share = (context.deadline - now) / (len(jobs) - i)
        of_job = replace(context, deadline=now + share) if jobs[i].share else context
        try:
            for record in jobs[i].run(of_job):
                content["records"].append(record)
                write(content)
                print(part, record["case"], record.get("pass", ""), flush=True)
        except Exception:
            trace = traceback.format_exc()
            print(trace, flush=True)
            content["broken"].append({"job": jobs[i].name, "detail": trace[-TOLD:]})
            write(content)
            return FAULT
    write(content | {"status": FAILED if content["broken"] else DONE})
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("part")
    parser.add_argument("file", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--of", default="", help="the parts for which part compile compiles")
    given = parser.parse_args()

    def write(content: dict[str, Any]) -> None:
        write_atomically(given.file, content)

    if given.part == "build":
        build(given.dry_run, write)
    elif given.part == "tests":
        run_tests(given.dry_run, given.seconds, write)
    else:
        before = json.loads(given.file.read_text()) if given.file.exists() else {}
        of = [part for part in given.of.split(",") if part]
        return run_part(given.part, given.dry_run, given.seconds, write, before, of)
    return 0


if __name__ == "__main__":
    sys.exit(main())

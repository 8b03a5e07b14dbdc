"""`python -m benchmarks.gpu`: see `--help`."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.aims import judge
from benchmarks.gpu.facts import facts, missing
from benchmarks.gpu.summary import summary
from benchmarks.gpu.worker import FAILED, FAULT, OUT_OF_TIME, write_atomically

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1
# Each part's share of the time. What a part leaves is the later ones'.
SHARES = {
    "build": 180,
    "limits": 10,
    "tests": 100,
    "compile": 60,
    "attention": 70,
    "moe": 35,
    "fusion": 25,
    "loss": 15,
    "placement": 15,
    "layers": 10,
    "step": 30,
    "profile": 90,
    "tune": 600,
}
OPTIONAL = ("profile", "tune")  # why a figure is what it is, and what it might be
LEAST_S = 10  # what a part that broke off goes on with


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Builds, tests and measures pyvlm on the GPU here. Needs no network; parts that lack "
        "something say so, and the others run.",
    )
    parser.add_argument(
        "--parts",
        default=",".join(part for part in SHARES if part not in OPTIONAL),
        help=f"of {','.join(SHARES)}; all but {', '.join(OPTIONAL)} where not given. Part compile "
        "compiles, on all cores, what the parts behind it measure; without it each compiles for itself",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default 8)")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU: shows that all runs, not how fast"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: benchmarks/results/<gpu>")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where a part failed, or was ended without having measured anything."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    parts = [part for part in options.parts.split(",") if part]
    unknown = sorted(set(parts) - set(SHARES))
    if unknown or not parts:
        options_parser.error(f"--parts {options.parts}: there are {','.join(SHARES)}")
    if not options.minutes > 0:
        options_parser.error(f"--minutes {options.minutes}: expected a positive number")
    if not options.dry_run and not torch.cuda.is_available():
        options_parser.error(
            f"torch {torch.__version__} finds no GPU here (torch.cuda.is_available() is False); "
            "--dry-run runs every part on the CPU at tiny sizes"
        )
    device = torch.device("cpu" if options.dry_run else "cuda")
    made_with = facts(device)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "dry_run": options.dry_run,
        "machine": made_with,
        "missing": missing(),
        "parts": {},
    }
    for package, purpose in document["missing"].items():
        print(f"{package} is not here: {purpose}")
    if not options.dry_run:
        link_kernels()
        if "build" not in parts and find_spec("pyvlm._C") is None:
            print("pyvlm._C is not built yet: part build comes first")
            parts.insert(0, "build")
    path = result_path(options.out, made_with, options.dry_run)
    path.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    for i, part in enumerate(parts):
        # What is built too late leaves less to the others, but without it they have nothing to run.
        shares = [SHARES[part]] if part == "build" else [SHARES[name] for name in parts[i:]]
        seconds = max(0.0, ends - time.monotonic()) * shares[0] / sum(shares)
        print(f"\n== {part}: up to {seconds:.0f} s", flush=True)
        # Beside the results until it has ended: who ends this process has what was measured.
        file = path.with_suffix(f".{part}.json")
        document["parts"][part] = run_part(part, seconds, options.dry_run, file, of=parts[i + 1 :])
        document["aims"] = judge(document)
        write_atomically(path, document)
        path.with_suffix(".md").write_text(summary(document))
        file.unlink(missing_ok=True)
        if part == "build" and not options.dry_run and not is_built(document["parts"][part]):
            print("without pyvlm._C there is nothing to test or to measure")
            break
    print(f"\n{path.with_suffix('.md').read_text()}\nwrote {path} and {path.with_suffix('.md').name}")
    return int(any(failed(part) for part in document["parts"].values()))


def failed(part: dict[str, Any]) -> bool:
    nothing = part["status"] == OUT_OF_TIME and not part.get("records")
    return part["status"] == FAILED or bool(part.get("broken")) or nothing


def result_path(out: Path | None, made_with: dict[str, Any], dry_run: bool) -> Path:
    """Of a dry run not among the results: its times say nothing, and nobody shall commit them."""
    sha = (made_with["git_sha"] or "no-commit")[:10] + ("-dirty" if made_with["git_changes"] else "")
    name = f"{made_with['date'][:19].replace(':', '')}-{sha}.json"
    if out is None:
        gpu = re.sub(r"[^a-z0-9]+", "-", str(made_with["device"]).lower()).strip("-")
        out = ROOT / "runs" / "gpu-dry-run" if dry_run else RESULTS / gpu
    return out / name


def link_kernels() -> None:
    """Makes `pyvlm.triton_kernels` known where pyvlm is not installed, which maps that package."""
    if find_spec("pyvlm.triton_kernels") is None:
        link = ROOT / "pyvlm" / "triton_kernels"
        link.symlink_to(Path("..") / "triton_kernels", target_is_directory=True)


def is_built(part: dict[str, Any]) -> bool:
    """Whether `_C` loads, without which pyvlm has no op; `_C_cuda` has the routers alone."""
    return part.get("build_info", {}).get("native", {"error": "unknown"}).get("error") is None


def run_part(part: str, seconds: float, dry_run: bool, file: Path, of: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a part in a process of its own, and ends it with all its children where its time is up.

    Where a job of it breaks off, another process goes on with the next one. `file` holds what was measured;
    `of` are the parts for which part compile compiles.
    """
    start = time.monotonic()
    file.unlink(missing_ok=True)
    left, begun = seconds, 0
    while True:
        ended = _run_worker(part, left, dry_run, file, of)
        content = json.loads(file.read_text()) if file.exists() else {"status": FAILED}
        left = seconds - (time.monotonic() - start)
        if ended in (None, 0) or left < LEAST_S or content.get("begun", 0) == begun:
            break
        begun = content["begun"]
        if ended != FAULT:  # which the worker has told itself
            lost = {"job": content["job"], "detail": f"its process ended with {ended}"}
            write_atomically(file, content | {"broken": [*content["broken"], lost]})
    if ended is None:
        content |= {"status": OUT_OF_TIME, "detail": f"ended after {seconds:.0f} s, its share of the time"}
    elif ended != 0:
        content = {"detail": f"its process ended with {ended}"} | content | {"status": FAILED}
    return content | {"seconds": round(time.monotonic() - start, 1)}


def _run_worker(part: str, seconds: float, dry_run: bool, file: Path, of: Sequence[str]) -> int | None:
    """The exit status, or None where the time was up."""
    command = [sys.executable, "-m", "benchmarks.gpu.worker", part, str(file), f"{0.9 * seconds:.0f}"]
    command += ["--of", ",".join(of)]
    process = subprocess.Popen(
        [*command, *(["--dry-run"] if dry_run else [])], cwd=ROOT, start_new_session=True
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main())

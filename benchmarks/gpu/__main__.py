"""`python -m benchmarks.gpu`: see `--help`."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.aims import judge
from benchmarks.gpu.facts import facts, missing
from benchmarks.gpu.summary import summary
from benchmarks.gpu.worker import FAILED, OUT_OF_TIME, write_atomically

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1
# Each part's share of the time. What a part leaves is the later ones'.
SHARES = {
    "build": 100,
    "limits": 10,
    "tests": 105,
    "attention": 105,
    "moe": 45,
    "fusion": 20,
    "loss": 20,
    "placement": 20,
    "layers": 10,
    "step": 45,
    "tune": 600,
}
OPTIONAL = ("tune",)  # it measures what might be, and takes a while


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Builds, tests and measures pyvlm on the GPU here. Needs no network; parts that lack "
        "something say so, and the others run.",
    )
    parser.add_argument(
        "--parts",
        default=",".join(part for part in SHARES if part not in OPTIONAL),
        help=f"of {','.join(SHARES)}; all but {', '.join(OPTIONAL)} where not given",
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
    path = result_path(options.out, made_with, options.dry_run)
    ends = time.monotonic() + 60 * options.minutes
    for i, part in enumerate(parts):
        shares = [SHARES[name] for name in parts[i:]]
        seconds = max(0.0, ends - time.monotonic()) * shares[0] / sum(shares)
        print(f"\n== {part}: up to {seconds:.0f} s", flush=True)
        document["parts"][part] = run_part(part, seconds, options.dry_run)
        document["aims"] = judge(document)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, document)
    text = summary(document)
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\nwrote {path} and {path.with_suffix('.md').name}")
    return int(any(failed(part) for part in document["parts"].values()))


def failed(part: dict[str, Any]) -> bool:
    return part["status"] == FAILED or (part["status"] == OUT_OF_TIME and not part.get("records"))


def result_path(out: Path | None, made_with: dict[str, Any], dry_run: bool) -> Path:
    """Of a dry run not among the results: its times say nothing, and nobody shall commit them."""
    sha = (made_with["git_sha"] or "no-commit")[:10] + ("-dirty" if made_with["git_changes"] else "")
    name = f"{made_with['date'][:19].replace(':', '')}-{sha}.json"
    if out is None:
        gpu = re.sub(r"[^a-z0-9]+", "-", str(made_with["device"]).lower()).strip("-")
        out = ROOT / "runs" / "gpu-dry-run" if dry_run else RESULTS / gpu
    return out / name


def run_part(part: str, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Runs a part in a process of its own, and ends it with all its children where its time is up."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu.worker", part, str(file), f"{0.9 * seconds:.0f}"]
        process = subprocess.Popen(
            [*command, *(["--dry-run"] if dry_run else [])], cwd=ROOT, start_new_session=True
        )
        try:
            process.wait(timeout=seconds)
            ended = ""
        except subprocess.TimeoutExpired:
            ended = f"ended after {seconds:.0f} s, its share of the time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        content = json.loads(file.read_text()) if file.exists() else {"status": FAILED}
    if ended:
        content |= {"status": OUT_OF_TIME, "detail": ended}
    elif process.returncode != 0:
        content |= {"status": FAILED, "detail": f"its process ended with {process.returncode}"}
    return content | {"seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    sys.exit(main())

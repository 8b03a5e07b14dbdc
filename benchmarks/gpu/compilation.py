"""Compiles what parts will measure, in many processes at once, each of which runs this module for one task.

What they leave are the caches on disk, torch's and Triton's, where whoever measures finds it.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import PARTS, Context

ROOT = Path(__file__).parents[2]
# They share a GPU. Of 80 GB a dense peer may take ten, and a model with what its backward keeps thirty.
PROCESSES, PROCESSES_OF_MODELS = 8, 2
COMPILED, FAILED, OUT_OF_TIME = "compiled", "failed", "out of time"


@dataclass(frozen=True)
class Task:
    """One of the things that a job of a part compiles."""

    part: str
    job: int
    index: int

    def __str__(self) -> str:
        return f"{self.part} {PARTS[self.part][self.job].name}"

    def run(self, context: Context) -> None:
        PARTS[self.part][self.job].compile[self.index](context)


def tasks(parts: Sequence[str]) -> list[Task]:
    """Whole models first, which take longest."""
    found = [
        Task(part, i, j)
        for part in parts
        for i, job in enumerate(PARTS.get(part, ()))
        for j in range(len(job.compile))
    ]
    return sorted(found, key=lambda task: task.part != "step")


def outcomes(parts: Sequence[str], context: Context) -> Iterator[tuple[Task, str, str]]:
    """Task, outcome and what there is to say, as they end."""
    if context.dry_run:  # here: importing torch in so many processes would take minutes
        for task in tasks(parts):
            try:
                task.run(context)
                yield task, COMPILED, ""
            except Exception as error:  # whatever a peer may raise
                yield task, FAILED, f"{type(error).__name__}: {error}"
        return
    cores = os.cpu_count() or 1
    pools = {True: ThreadPoolExecutor(PROCESSES_OF_MODELS), False: ThreadPoolExecutor(min(PROCESSES, cores))}
    futures: dict[Future[tuple[str, str]], Task] = {
        pools[task.part == "step"].submit(_in_a_process, task, context.deadline): task
        for task in tasks(parts)
    }
    for future in as_completed(futures):
        yield futures[future], *future.result()


def _in_a_process(task: Task, deadline: float) -> tuple[str, str]:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        return OUT_OF_TIME, ""
    command = [sys.executable, "-m", "benchmarks.gpu.compilation", task.part, str(task.job), str(task.index)]
    # Each would have as many more processes to compile in.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return OUT_OF_TIME, ""
    if ended.returncode == 0:
        return COMPILED, ""
    said = ended.stderr.strip().splitlines()
    return FAILED, said[-1] if said else f"its process ended with {ended.returncode}"


def run(parts: Sequence[str], context: Context, write: Callable[[dict[str, Any]], None]) -> None:
    """Compiles what parts will measure until the context's deadline; they compile what is left themselves."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    content = {"status": "done", "counts": counts, "failures": failures}
    write(content)
    for task, outcome, said in outcomes(parts, context):
        counts[outcome] += 1
        if said:
            failures.append(f"{task}: {said}"[:600])
        print("compile", task, outcome, said, flush=True)
        write(content)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.compilation")
    parser.add_argument("part")
    parser.add_argument("job", type=int)
    parser.add_argument("index", type=int)
    given = parser.parse_args(arguments)
    # Inductor keeps which of several tiles was fastest. Beside so many others that is chance: who measures
    # chooses anew.
    torch._inductor.config.autotune_local_cache = False
    Task(given.part, given.job, given.index).run(Context(torch.device("cuda"), False, float("inf")))


if __name__ == "__main__":
    main()

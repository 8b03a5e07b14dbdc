"""What a run tells while it trains: progress bar, metrics.jsonl, trackers, curves.png."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from pyvlm.training.curves import write_curves
from pyvlm.training.heldout import Look
from pyvlm.training.recipe import Recipe
from pyvlm.training.runfolder import RunFolder
from pyvlm.training.trackers import finish_trackers, start_trackers

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


@dataclass(frozen=True)
class StagePlan:
    """A stage as the log needs it: its name and how much there is to do."""

    name: str
    steps: int
    batch_size: int


class TrainingLog:
    """Collects the figures of each step and writes them every `recipe.log_every` steps; a context manager.

    Losses stay on their device until then, so that no step waits for the device to tell its own.

    Args:
        run: where to write. Of several processes only the one that holds it says anything.
        recipe: how often to write, and whom to tell.
        plan: all stages.
        done: steps that were done before.
        show: draw the progress bar, and tell at the end where the time went.
    """

    def __init__(
        self, run: RunFolder, recipe: Recipe, plan: Sequence[StagePlan], done: int, show: bool
    ) -> None:
        self.run, self.recipe, self.plan, self.show = run, recipe, plan, show and run.main
        if run.main:
            run.cut_metrics(done)
        self.trackers = start_trackers(recipe, run, done) if run.main else []
        self.bar = tqdm(
            total=sum(stage.steps for stage in plan),
            initial=done,
            disable=not self.show,
            dynamic_ncols=True,
            bar_format=BAR,
        )
        self.pending: list[tuple[dict[str, Any], Tensor]] = []
        self.since = self.drawn = time.perf_counter()
        self.flops_per_token = 0.0  # of this stage; 0: not known yet
        self.limit = 0.0  # FLOPs a second

    def __enter__(self) -> "TrainingLog":
        self.since = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with ExitStack() as last:  # in reverse, whatever one of them raises
            last.callback(self.bar.close)
            last.callback(finish_trackers, self.trackers, failed=kind is not None)
            if not isinstance(value, OSError):  # on a full disk it would only fail again
                self.flush()
        if self.show and kind is None:
            for line in describe_time(self.run.read_metrics()):
                tqdm.write(line)

    def step(self, step: int, stage: int, loss: Tensor, optimizer: Optimizer, tokens: int) -> None:
        """One step's figures; `step` counts from 1, over all stages."""
        rates: dict[str, float] = {}
        for group in optimizer.param_groups:
            rates[group["part"]] = max(group["lr"], rates.get(group["part"], 0.0))
        line = {"step": step, "stage": self.plan[stage].name, "lr": rates, "tokens": tokens}
        self.pending.append((line, loss))
        self.bar.update()
        if len(self.pending) >= self.recipe.log_every:
            self.flush()

    def look(self, step: int, look: Look) -> None:
        """A look at held-out data after a step."""
        self.flush()
        name = look.metric.removeprefix("held_out_")
        self._write([{"step": step, look.metric: look.value}], step, {f"held_out/{name}": look.value})
        self.forget_pause()

    def profile(self, step: int, seconds: Mapping[str, float], tokens: int) -> None:
        """Where the time of a step went."""
        self.flush()
        total = sum(seconds.values())
        split = {part: taken for part, taken in seconds.items() if taken}
        line: dict[str, Any] = {"step": step, "step_time": split}
        scalars = {f"step_time/{part}": taken for part, taken in split.items()}
        if (mfu := self.utilization(tokens / total)) is not None:
            line |= {"mfu": mfu, "flops": self.flops_per_token * tokens, "limit": self.limit}
            scalars["train/mfu"] = mfu
        self._write([line], step, scalars)

    def utilization(self, tokens_per_second: float) -> float | None:
        """Model-FLOP utilisation at a speed; None before the FLOPs of a token are known."""
        if not self.flops_per_token or not self.limit:
            return None
        return self.flops_per_token * tokens_per_second / self.limit

    def draw(self, at_most_every: float = 0.0) -> None:
        """Writes curves.png, of all that is in metrics.jsonl, but not more often than in so many seconds."""
        self.flush()
        if self.run.main and time.perf_counter() - self.drawn >= at_most_every:
            write_curves(self.run.curves, self.run.read_metrics(), self.recipe.name)
            self.drawn = time.perf_counter()

    def forget_pause(self) -> None:
        """What was done since the last flush (a checkpoint, an evaluation) is no part of the next steps."""
        self.since = time.perf_counter()

    def flush(self) -> None:
        """Writes what is pending."""
        if not self.pending:
            return
        losses = [loss.item() for _, loss in self.pending]
        seconds = time.perf_counter() - self.since
        speed = sum(line["tokens"] for line, _ in self.pending) / seconds
        lines = [
            {**line, "loss": loss, "seconds": seconds / len(self.pending)}
            for (line, _), loss in zip(self.pending, losses, strict=True)
        ]
        for line in lines:
            rates = {f"lr/{part}": rate for part, rate in line["lr"].items()}
            self._tell(line["step"], {"train/loss": line["loss"], **rates})
        self._write(lines, lines[-1]["step"], {"train/tokens_per_second": speed})
        if self.show:
            left = seconds_left(self.plan, lines[-1]["step"], lines[-1]["seconds"])
            mfu = self.utilization(speed)
            self.bar.set_description_str(lines[-1]["stage"], refresh=False)
            self.bar.set_postfix_str(
                f"{timedelta(seconds=round(left))} left, loss {losses[-1]:.3f}, {speed:,.0f} tokens/s"
                + ("" if mfu is None else f", MFU {mfu:.0%}")
            )
        self.pending.clear()
        self.since = time.perf_counter()

    def _write(self, lines: list[dict[str, Any]], step: int, scalars: dict[str, float]) -> None:
        if self.run.main:
            self.run.append_metrics(lines)
        self._tell(step, scalars)

    def _tell(self, step: int, scalars: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(scalars, step=step)


def seconds_left(plan: Sequence[StagePlan], done: int, seconds: float) -> float:
    """What the steps of all stages after `done` will take, where the last one took so many seconds.

    Steps of later stages are taken to cost in proportion to their batches.
    """
    left, per_sample, start = 0.0, None, 0
    for stage in plan:
        end = start + stage.steps
        if per_sample is None and done <= end:
            per_sample = seconds / stage.batch_size
        if per_sample is not None:
            left += max(0, end - max(start, done)) * stage.batch_size * per_sample
        start = end
    return left


def describe_time(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the time of the profiled steps went and how near the limit they came, in lines for a terminal."""
    profiled = [line for line in metrics if "step_time" in line]
    if not profiled:
        return []
    sums: dict[str, float] = {}
    for line in profiled:
        for part, seconds in line["step_time"].items():
            sums[part] = sums.get(part, 0.0) + seconds
    total = sum(sums.values())
    shares = ", ".join(
        f"{part} {seconds / total:.0%}" for part, seconds in sorted(sums.items(), key=lambda item: -item[1])
    )
    lines = [f"step time      {1000 * total / len(profiled):,.1f} ms, mean of {len(profiled)}: {shares}"]
    if measured := [line for line in profiled if "mfu" in line]:
        mfu = sum(line["flops"] for line in measured) / sum(
            sum(line["step_time"].values()) * line["limit"] for line in measured
        )
        limit = measured[-1]["limit"]
        lines.append(f"utilisation    {mfu:.1%} of the {limit / 1e9:,.0f} GFLOP/s that torch.mm reached")
    return lines

"""What a run tells while it trains: progress bar, metrics.jsonl, TensorBoard."""

import time
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from pyvlm.training.recipe import Recipe
from pyvlm.training.runfolder import RunFolder


class TrainingLog:
    """Collects the figures of each step and writes them every `recipe.log_every` steps; a context manager.

    Losses stay on their device until then, so that no step waits for the device to tell its own.

    Args:
        run: where to write.
        recipe: how many steps there are, and how often to write.
        done: steps that were done before.
        show: draw the progress bar.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, done: int, show: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run.cut_metrics(done)
        self.run, self.every = run, recipe.log_every
        self.stage_names = list(recipe.stages)
        self.bar = tqdm(
            total=recipe.total_steps, initial=done, unit="step", disable=not show, dynamic_ncols=True
        )
        self.tensorboard = SummaryWriter(str(run.tensorboard), purge_step=done + 1)
        self.pending: list[tuple[dict[str, Any], Tensor]] = []
        self.since = time.perf_counter()

    def __enter__(self) -> "TrainingLog":
        self.since = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.flush()
        self.tensorboard.close()
        self.bar.close()

    def step(self, step: int, stage: int, loss: Tensor, optimizer: Optimizer, tokens: int) -> None:
        """One step's figures; `step` counts from 1, over all stages."""
        rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
        line = {"step": step, "stage": self.stage_names[stage], "lr": rates, "tokens": tokens}
        self.pending.append((line, loss))
        self.bar.update()
        if len(self.pending) >= self.every:
            self.flush()

    def evaluation(self, step: int, accuracy: float) -> None:
        """Held-out accuracy after a step."""
        self.flush()
        self.run.append_metrics([{"step": step, "held_out_accuracy": accuracy}])
        self.tensorboard.add_scalar("held_out/accuracy", accuracy, step)
        self.since = time.perf_counter()  # the time of an evaluation is not the next steps'

    def flush(self) -> None:
        """Writes what is pending."""
        if not self.pending:
            return
        losses = [loss.item() for _, loss in self.pending]
        seconds = time.perf_counter() - self.since
        speed = sum(line["tokens"] for line, _ in self.pending) / seconds
        lines = []
        for (line, _), loss in zip(self.pending, losses, strict=True):
            lines.append({**line, "loss": loss, "seconds": seconds / len(self.pending)})
            self.tensorboard.add_scalar("train/loss", loss, line["step"])
            for part, rate in line["lr"].items():
                self.tensorboard.add_scalar(f"lr/{part}", rate, line["step"])
        self.tensorboard.add_scalar("train/tokens_per_second", speed, lines[-1]["step"])
        self.run.append_metrics(lines)
        self.bar.set_description(lines[-1]["stage"], refresh=False)
        self.bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:,.0f} tokens/s")
        self.pending.clear()
        self.since = time.perf_counter()

"""curves.png: loss, learning rates and held-out metric of a run, its stages marked."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyvlm.models.checkpoint import write_file
from pyvlm.training.charts import ACCENT, SECOND, smooth
from pyvlm.training.heldout import HIGHER_IS_BETTER

COLORS = [ACCENT, SECOND, "#3ba57d", "#a55bb8", "#888888", "#c9a227", "#5bb8b0"]


def write_curves(path: Path, metrics: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws the lines of metrics.jsonl; without any step nothing is written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return
    looks = {
        metric: [(line["step"], line[metric]) for line in metrics if metric in line]
        for metric in HIGHER_IS_BETTER
    }
    looks = {metric: points for metric, points in looks.items() if points}
    figure = Figure(figsize=(8, 2.4 * (2 + len(looks))), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes, *look_axes = figure.subplots(2 + len(looks), 1, sharex=True, squeeze=False)[:, 0]

    x, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    loss_axes.plot(x, losses, color=ACCENT, linewidth=0.7, alpha=0.35)
    loss_axes.plot(x, smooth(losses), color=ACCENT, linewidth=1.6)
    loss_axes.set(ylabel="loss, smoothed", title=title)
    same: dict[tuple[float, ...], list[str]] = {}  # parts whose rates are the same share a line
    for part in dict.fromkeys(part for line in steps for part in line["lr"]):
        same.setdefault(tuple(line["lr"].get(part, 0.0) for line in steps), []).append(part)
    for color, (rates, parts) in enumerate(same.items()):
        label, chosen = ", ".join(parts), COLORS[color % len(COLORS)]
        rate_axes.plot(x, rates, color=chosen, linewidth=1.2, label=label)
    rate_axes.set(ylabel="learning rate")
    rate_axes.legend(frameon=False, fontsize=8)
    for axes, (metric, points) in zip(look_axes, looks.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color=SECOND, marker="o", markersize=3)
        axes.set(ylabel=metric.replace("_", " "))
    for axes in (loss_axes, rate_axes, *look_axes):
        axes.spines[["top", "right"]].set_visible(False)
        for step, _ in stage_starts(steps)[1:]:
            axes.axvline(step - 0.5, color="black", linewidth=0.5, alpha=0.5, linestyle="--")
    for step, stage in stage_starts(steps):
        label = loss_axes.annotate(
            stage,
            (step - 0.5, 1),
            (3, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=8,
        )
        label.set_in_layout(False)  # a long name of a short stage would leave no room for the axes
    figure.axes[-1].set(xlabel="step")

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_file(path, buffer.getvalue())


def stage_starts(steps: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """The first step of each stage, and its name."""
    starts: dict[str, int] = {}
    for line in steps:
        starts.setdefault(line["stage"], line["step"])
    return [(step, stage) for stage, step in starts.items()]

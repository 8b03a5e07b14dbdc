"""The picture of `pyvlm ablate`: held-out accuracy against training FLOPs, with the spread of the seeds."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from pyvlm.models.checkpoint import write_file


@dataclass(frozen=True)
class Curve:
    """A variant: training FLOPs of its looks, the accuracies of every seed at each, and how it ended."""

    label: str  # "connector=resampler, mask=mmca"
    flops: Sequence[float]
    accuracies: Sequence[Sequence[float]]
    final_flops: float
    final: Sequence[float]


def draw_curves(curves: Sequence[Curve]) -> Figure:
    """Lines: means over the seeds; bands: lowest to highest; at the end, the final evaluation.

    Variants that agree in what is varied first share a colour; those that agree in the rest, a kind of line.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    parts = [curve.label.partition(", ")[::2] for curve in curves]
    firsts, rests = (list(dict.fromkeys(values)) for values in zip(*parts, strict=True))
    for (first, rest), curve in zip(parts, curves, strict=True):
        color = colormaps["tab10"](firsts.index(first) % 10)
        style = ("-", "--", ":", "-.")[rests.index(rest) % 4]
        by_look = list(zip(*curve.accuracies, strict=True))
        means = [100 * sum(values) / len(values) for values in by_look]
        axes.plot(
            curve.flops, means, color=color, linestyle=style, marker="o", markersize=2, label=curve.label
        )
        low, high = ([100 * pick(values) for values in by_look] for pick in (min, max))
        axes.fill_between(curve.flops, low, high, color=color, alpha=0.15, linewidth=0)
        mean = sum(curve.final) / len(curve.final)
        ends = [[100 * (mean - min(curve.final))], [100 * (max(curve.final) - mean)]]
        axes.errorbar(
            curve.final_flops,
            100 * mean,
            yerr=ends,
            color=color,
            fmt="D",
            markersize=5,
            capsize=3,
            clip_on=False,
        )
    axes.set(xlabel="training FLOPs", ylabel="held-out accuracy, %", ylim=(0, 100))
    axes.set_title(
        "lines: looks on the way, mean and range of the seeds; diamonds: final evaluation", fontsize="small"
    )
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def write_png(path: str | os.PathLike[str], curves: Sequence[Curve]) -> None:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    draw_curves(curves).savefig(buffer, format="png", dpi=150)
    write_file(Path(path), buffer.getvalue())

"""The picture of `pyvlm moe-report`: how busy each expert is, and the commonest pathways."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pyvlm.models.checkpoint import write_file
from pyvlm.training.charts import ACCENT, SECOND
from pyvlm.training.moe_report import ExpertReport, format_pathway

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"text": ACCENT, "image": SECOND}
MAX_EXPERTS = 16  # of a heat map with numbers in its cells: more do not fit


def draw_report(report: ExpertReport, top: int) -> Figure:
    """Above, the share of each expert in a modality's dispatched tokens, by layer; below, its pathways."""
    from matplotlib.figure import Figure

    rows = len(report.layers)
    heights = [0.9 + 0.35 * rows, 0.9 + 0.25 * top]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    axes = figure.subplots(2, len(report.loads), height_ratios=heights)
    for column, modality in enumerate(report.loads):
        _draw_loads(axes[0, column], report, modality)
        _draw_pathways(axes[1, column], report, modality, top)
    return figure


def write_png(path: str | os.PathLike[str], report: ExpertReport, top: int) -> None:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    draw_report(report, top).savefig(buffer, format="png", dpi=150)
    write_file(Path(path), buffer.getvalue())


def _draw_loads(axes: Axes, report: ExpertReport, modality: str) -> None:
    percent = [[100 * share for share in load.shares] for load in report.loads[modality]]
    experts = len(percent[0])
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    if experts <= MAX_EXPERTS:
        for y, shares in enumerate(percent):
            for x, share in enumerate(shares):
                colour = "white" if share > 60 else "black"
                axes.text(x, y, f"{share:.0f}", ha="center", va="center", color=colour, fontsize="small")
        axes.set_xticks(range(experts))
    axes.set_yticks(range(len(report.layers)), [str(layer) for layer in report.layers])
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title(f"{modality}: {report.tokens[modality]:,} tokens, % by expert", fontsize="medium")


def _draw_pathways(axes: Axes, report: ExpertReport, modality: str, top: int) -> None:
    pathways = report.pathways[modality][:top]
    shares = [100 * pathway.tokens / report.tokens[modality] for pathway in pathways]
    axes.barh(range(len(pathways)), shares, color=COLOURS[modality])
    axes.set_yticks(range(len(pathways)), [format_pathway(pathway.experts) for pathway in pathways])
    axes.set_ylim(top - 0.5, -0.5)  # the commonest first
    axes.set(xlabel="% of the tokens")
    axes.set_title(f"{modality}: pathways through the layers", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)

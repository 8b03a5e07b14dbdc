"""Charts as inline SVG that take their text colour from the page, so that they fit a light and a dark one."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Stands for the page's text colour; no chart uses it for anything else.
_TEXT = "#010203"
ACCENT, SECOND = "#3b7dd8", "#d8813b"


@dataclass(frozen=True)
class Line:
    """A series; `dots` marks its points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = ACCENT
    faint: bool = False
    dots: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    y_label: str,
    x_label: str = "step",
    marks: Sequence[tuple[float, str]] = (),
    y_limits: tuple[float | None, float | None] = (0, None),
) -> str:
    """An SVG element.

    Args:
        lines: what to draw.
        marks: vertical lines at an x, with a name each.
        y_limits: ends of the vertical axis; None: as the data say.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "pyvlm",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _TEXT,
        "axes.edgecolor": _TEXT,
        "axes.labelcolor": _TEXT,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.5,
    }
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(5.2, 2.5), layout="constrained")
        for line in lines:
            width, alpha = (0.7, 0.35) if line.faint else (1.6, 1.0)
            marker = "o" if line.dots else None
            label = None if line.faint else line.label
            axes.plot(
                line.x,
                line.y,
                color=line.color,
                linewidth=width,
                alpha=alpha,
                marker=marker,
                ms=3,
                label=label,
            )
        for x, name in marks:
            axes.axvline(x, color=_TEXT, linewidth=0.5, alpha=0.4, linestyle="--")
            axes.annotate(
                name,
                (x, 1),
                (4, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                fontsize=8,
                alpha=0.7,
            )
        axes.set(xlabel=x_label, ylabel=y_label, ylim=y_limits)
        axes.grid(axis="y", color=_TEXT, alpha=0.12, linewidth=0.5)
        if sum(not line.faint for line in lines) > 1:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_TEXT, "currentColor")


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average without a start from zero."""
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        smoothed.append(total / mass)
    return smoothed

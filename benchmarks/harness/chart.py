"""The chart of a run: how near each provider comes to the machine's limit."""

from pathlib import Path
from typing import Any

from benchmarks.harness.report import describe

_TITLE = (
    "% of the limit measured in the same rounds: torch.mm, or copy bandwidth where that is the nearer one"
)
_BAR = 0.8  # of the height of a case, all its bars together


def write_png(path: Path, report: dict[str, Any]) -> None:
    """A panel a dtype and pass, a group of bars a case, a bar a provider; the line at 100 % is the limit."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in report["records"]:
        panels.setdefault((record["dtype"], record["pass"]), []).append(record)
    names = list(dict.fromkeys(name for record in report["records"] for name in record["providers"]))
    rows = list(dict.fromkeys(dtype for dtype, _ in panels))
    columns = list(dict.fromkeys(pass_name for _, pass_name in panels))
    bars = max(len(records) for records in panels.values()) * (len(names) + 1)

    size = (6.5 * len(columns), (1 + 0.2 * bars) * len(rows) + 1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, dtype in enumerate(rows):
        for j, pass_name in enumerate(columns):
            axes[i, j].set_title(f"{pass_name}, {dtype}")
            _panel(axes[i, j], panels.get((dtype, pass_name), []), names)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.suptitle(f"{_TITLE}\n{describe(report['machine'])}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _panel(axis: Any, records: list[dict[str, Any]], names: list[str]) -> None:
    height = _BAR / len(names)
    for index, name in enumerate(names):
        outcomes = [record["providers"].get(name, {}) for record in records]
        values = [100 * outcome.get("of_limit", 0.0) for outcome in outcomes]
        labels = [
            f"{value:.0f} %" if "of_limit" in outcome else outcome.get("status", "")
            for value, outcome in zip(values, outcomes, strict=True)
        ]
        offset = height * (index - (len(names) - 1) / 2)
        bars = axis.barh([row + offset for row in range(len(records))], values, height, label=name)
        axis.bar_label(bars, labels, padding=2, fontsize=7)
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_xlim(0, 1.12 * max(100.0, *axis.get_xlim()))
    axis.set_yticks(range(len(records)), [record["case"] for record in records], fontsize=8)
    axis.invert_yaxis()

"""`python -m benchmarks.report` draws the results of GPUs: how near the machine's limits, and beside whom.

Parts that were measured one by one come together here, with the table of aims.

Roofline after Williams, Waterman and Patterson (Communications of the ACM 52(4), 2009).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.aims import judge
from benchmarks.gpu.summary import summary
from benchmarks.harness.run import TIMED

RESULTS = Path(__file__).parent / "results"
OWN = "pyvlm"
_MARKERS = "osD^v<>P"


def newest(folder: Path = RESULTS) -> list[list[Path]]:
    """Of every GPU the newest result, and the earlier ones of its commit: files are named by their date."""
    runs = []
    for gpu in sorted(folder.glob("*")):
        paths = sorted(gpu.glob("*.json"))
        if paths:
            commit = _commit(paths[-1])
            earlier = [path for path in paths[:-1] if commit is not None and _commit(path) == commit]
            runs.append([*earlier, paths[-1]])
    return runs


def _commit(path: Path) -> str | None:
    """None where nobody can tell what was measured."""
    document = json.loads(path.read_text())
    changed = document["dry_run"] or document["machine"]["git_changes"]
    return None if changed else document["machine"]["git_sha"]


def load(paths: Sequence[Path]) -> dict[str, Any]:
    """A result as `python -m benchmarks.gpu` wrote it, or several, oldest first, as one.

    Each part is the newest one that measured something, whole: what is compared was measured in one run.

    Raises:
        ValueError: one is of a dry run, or together they hold nothing that was timed.
    """
    documents = [json.loads(path.read_text()) for path in paths]
    parts: dict[str, Any] = {}
    for path, document in zip(paths, documents, strict=True):
        if document["dry_run"]:
            raise ValueError(
                f"{path} is of a dry run, whose times say nothing; give the result of a run on a GPU"
            )
        found = document["parts"].items()
        parts |= {name: part for name, part in found if part.get("records") or name not in parts}
    whole: dict[str, Any] = documents[-1] | {"parts": parts}
    if not timed(whole):
        raise ValueError(
            f"{paths[-1]} holds no timed record; run python -m benchmarks.gpu with more parts or minutes"
        )
    return whole | {"aims": judge(whole)}


def timed(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The records in which pyvlm was timed."""
    return [
        record
        for part in document["parts"].values()
        for record in part.get("records", ())
        if record.get("providers", {}).get(OWN, {}).get("status") == TIMED
    ]


def title(document: dict[str, Any]) -> str:
    made_with = document["machine"]
    commit = (made_with["git_sha"] or "no commit")[:10] + ("+changes" if made_with["git_changes"] else "")
    versions = made_with["versions"]
    packages = f"torch {versions['torch']}, triton {versions['triton']}, CUDA {versions['cuda']}"
    return f"{made_with['device']}, {packages}; pyvlm at {commit}, {made_with['date'][:10]}"


def draw_roofline(document: dict[str, Any], path: Path) -> None:
    """Rates over FLOPs a byte, both counted on what is useful; the roof was measured in the same rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    records = [record for record in timed(document) if record.get("useful_flops")]
    gemm = max((record["limits"]["gemm"]["gflops"] for record in records), default=None)
    copy = max((record["limits"]["copy"]["gbytes_per_s"] for record in records), default=None)
    for marker, op in zip(_MARKERS, sorted({record["op"] for record in records}), strict=False):
        of_op = [record for record in records if record["op"] == op]
        x = [record["useful_flops"] / record["least_bytes"] for record in of_op]
        y = [record["providers"][OWN]["useful_gflops"] / 1e3 for record in of_op]
        axes.scatter(x, y, marker=marker, label=op)
    if gemm and copy:
        low, high = axes.get_xlim()
        knee = gemm / copy
        ends = (min(max(low, 0.1), knee / 10), max(high, 10 * knee))
        roof = [min(gemm, copy * x) / 1e3 for x in (ends[0], knee, ends[1])]
        label = f"torch.mm {gemm / 1e3:.0f} TFLOP/s, copy {copy:.0f} GB/s"
        axes.plot([ends[0], knee, ends[1]], roof, color="black", linewidth=1, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("useful FLOPs a byte of the fewest bytes")
    axes.set_ylabel("useful TFLOP/s")
    axes.legend(fontsize=8)
    figure.suptitle(title(document), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_bars(document: dict[str, Any], path: Path) -> None:
    """How many times as long as pyvlm each peer takes: a panel an op, a group of bars a case and pass."""
    from matplotlib.figure import Figure

    by_op: dict[str, list[dict[str, Any]]] = {}
    for record in timed(document):
        by_op.setdefault(record["op"], []).append(record)
    heights = [1 + 0.22 * sum(len(_times(record)) + 1 for record in records) for records in by_op.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(by_op), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (op, records) in zip(panels, by_op.items(), strict=True):
        _panel(axes, op, records)
    figure.suptitle(f"time, as a multiple of pyvlm's\n{title(document)}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _times(record: dict[str, Any]) -> dict[str, float]:
    """Each provider's time over pyvlm's."""
    own = record["providers"][OWN]["median_s"]
    outcomes = record["providers"].items()
    return {name: outcome["median_s"] / own for name, outcome in outcomes if outcome["status"] == TIMED}


def _panel(axes: Any, op: str, records: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for record in records for name in _times(record)))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    row, ticks, labels = 0, [], []
    for record in records:
        times = _times(record)
        ticks.append(row + (len(times) - 1) / 2)
        labels.append(f"{record['case']}\n{record['pass']}")
        for name, times_as_long in times.items():
            bar = axes.barh(row, times_as_long, color=colors[name])
            axes.bar_label(bar, [f"{name} {times_as_long:.2f}"], padding=2, fontsize=7)
            row += 1
        row += 1
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_title(op, fontsize=9)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        help="JSON files of one GPU, oldest first, which are taken together; where none is given, for every "
        "GPU its newest and those of the same commit",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside the newest result")
    options = parser.parse_args(arguments)
    runs = [options.results] if options.results else newest()
    if not runs:
        parser.error(f"no results in {RESULTS}; python -m benchmarks.gpu on a GPU writes them")
    for paths in runs:
        try:
            document = load(paths)
        except ValueError as error:
            parser.error(str(error))
        folder = options.out or paths[-1].parent
        for name, draw in (("roofline.png", draw_roofline), ("bars.png", draw_bars)):
            draw(document, folder / name)
            print(f"wrote {folder / name}")
        (folder / "summary.md").write_text(summary(document))
        print(f"wrote {folder / 'summary.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

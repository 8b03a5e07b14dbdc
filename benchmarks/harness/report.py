"""The table of a record, and the JSON of a run."""

import json
from pathlib import Path
from typing import Any

from benchmarks.harness.limits import COPY, GEMM

SCHEMA = 1
_HEADINGS = ("provider", "median ms", "quartiles ms", "GFLOP/s", "of limit", "time/pyvlm", "peak MB")
_WIDTHS = (10, 12, 23, 10, 9, 13, 9)


def document(
    machine: dict[str, Any], settings: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """What is written as JSON: where, how, and one record a workload and pass."""
    return {"schema": SCHEMA, "machine": machine, "settings": settings, "records": records}


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def describe(machine: dict[str, Any]) -> str:
    """One line for the head of a table or a chart."""
    place = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    commit = (machine["git_sha"] or "no commit")[:10] + ("+changes" if machine["git_changes"] else "")
    return (
        f"{place}, {machine['cores']} cores ({machine['isa']}), {machine['threads']} torch threads, "
        f"torch {machine['torch']}, pyvlm {machine['pyvlm']} at {commit}, {machine['date']}"
    )


def table(record: dict[str, Any]) -> str:
    """One record as text: a line a provider, under the limits that were measured in the same rounds."""
    gemm, copy = record["limits"][GEMM], record["limits"][COPY]
    lines = [
        f"{record['op']} {record['case']}: {record['pass']} {record['dtype']}, {record['shape']}",
        f"  {gemm['what']}: {gemm['gflops']:.0f} GFLOP/s; {copy['what']}: {copy['gbytes_per_s']:.1f} GB/s; "
        f"limit here: {record['bound']}" + ("; inputs not in cache" if record["cold"] else ""),
        _line(_HEADINGS),
    ]
    providers = record["providers"]
    own = next(iter(providers.values())).get("median_s")
    for name, outcome in providers.items():
        if "median_s" not in outcome:
            lines.append(f"  {name:<{_WIDTHS[0]}}{outcome['status']}: {outcome['detail']}")
            continue
        peak = outcome["peak_bytes"]
        lines.append(
            _line(
                (
                    name,
                    f"{1e3 * outcome['median_s']:.3f}",
                    f"{1e3 * outcome['q1_s']:.3f} - {1e3 * outcome['q3_s']:.3f}",
                    f"{outcome['useful_gflops']:.1f}",
                    f"{100 * outcome['of_limit']:.0f} %",
                    "-" if own is None else f"{outcome['median_s'] / own:.2f}",
                    "-" if peak is None else f"{peak / 1e6:.1f}",
                )
            )
        )
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """All records as one table for a README; the peers' times are multiples of pyvlm's."""
    names = list(dict.fromkeys(name for record in report["records"] for name in record["providers"]))
    own, *peers = names
    headings = ["case", "pass", "dtype", f"{own} ms", "GFLOP/s", "of limit", "peak MB"]
    headings += [f"{peer} time / {own}" for peer in peers]
    rows = [headings, ["---"] * len(headings)]
    for record in report["records"]:
        outcomes = record["providers"]
        times = {name: outcome.get("median_s") for name, outcome in outcomes.items()}
        row = [record["case"], record["pass"], record["dtype"]]
        if times[own] is None:
            row += [outcomes[own]["status"], "", "", ""]
        else:
            peak = outcomes[own]["peak_bytes"]
            row += [
                f"{1e3 * times[own]:.2f}",
                f"{outcomes[own]['useful_gflops']:.0f}",
                f"{100 * outcomes[own]['of_limit']:.0f} %",
                "" if peak is None else f"{peak / 1e6:.0f}",
            ]
        for peer in peers:
            both = times.get(peer) and times[own]
            row.append(
                f"{times[peer] / times[own]:.1f}" if both else outcomes.get(peer, {}).get("status", "")
            )
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    first, *rest = cells
    numbers = (f"{cell:>{width}}" for cell, width in zip(rest, _WIDTHS[1:], strict=True))
    return f"  {first:<{_WIDTHS[0]}}" + "".join(numbers)

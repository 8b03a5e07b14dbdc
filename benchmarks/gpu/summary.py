"""The summary of a run: how each part ended, what was aimed at and reached, and every measured row."""

from typing import Any

from benchmarks.gpu.aims import MISSED, NOT_MEASURED

LONGEST = 5  # kernels of a pass; the JSON has more


def summary(document: dict[str, Any]) -> str:
    """Markdown."""
    made_with = document["machine"]
    commit = (made_with["git_sha"] or "no commit")[:10] + ("+changes" if made_with["git_changes"] else "")
    versions = ", ".join(f"{name} {v}" for name, v in made_with["versions"].items() if v is not None)
    lines = [
        f"# {made_with['device']}, pyvlm {made_with['pyvlm']} at {commit}, {made_with['date'][:10]}",
        "",
        versions,
        "",
    ]
    if document["dry_run"]:
        lines += ["A dry run at tiny sizes on the CPU: its times say nothing.", ""]
    lines += [f"- not here: {name} ({purpose})" for name, purpose in document["missing"].items()]
    lines += ["", "| part | status | s | |", "|---|---|---|---|"]
    for name, part in document["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']} | {_of_part(part)} |")
    lines += ["", "| aim | bound | measured | |", "|---|---|---|---|"]
    for aim in document["aims"]:
        value = "" if aim["value"] is None else f"{aim['value']:.3g}"
        mark = {NOT_MEASURED: NOT_MEASURED, MISSED: "**missed**"}.get(aim["verdict"], aim["verdict"])
        lines.append(f"| {aim['aim']} | {aim['bound']} | {value} | {mark} |")
    lines += [
        "",
        "| op, case, pass | by | median ms | TFLOP/s | of limit | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for part in document["parts"].values():
        for record in part.get("records", ()):
            lines += _rows(record)
    return "\n".join(lines) + "\n"


def _of_part(part: dict[str, Any]) -> str:
    counts = ", ".join(f"{number} {name}" for name, number in part.get("counts", {}).items())
    detail = " ".join(part.get("detail", "").split())[:200]
    broken = [f"{job['job']}: {job['detail'].strip().splitlines()[-1]}" for job in part.get("broken", ())]
    failures = "; ".join([*broken, *part.get("failures", [])][:5])
    records = f"{len(part['records'])} records" if "records" in part else ""
    return ", ".join(text for text in (counts, records, detail, failures) if text).replace("|", "/")


def _rows(record: dict[str, Any]) -> list[str]:
    name = " ".join((record["op"], record["case"], record.get("pass", "")))
    if "kernels" in record:
        return [
            f"| {name} | {kernel['name'][:80].replace('|', '/')} x {kernel['calls']} "
            f"| {1e3 * kernel['seconds']:.4g} | | | |"
            for kernel in record["kernels"][:LONGEST]
        ]
    if "providers" not in record:
        rates = f"{record['gemm_gflops'] / 1e3:.0f} TFLOP/s, {record['copy_gbytes_per_s']:.0f} GB/s"
        return [f"| {name}: {rates} | the machine | {1e3 * record['call_s']:.4f} (a call) | | | |"]
    rows = []
    for provider, outcome in record["providers"].items():
        if "median_s" not in outcome:
            detail = " ".join(outcome["detail"].split())[:120].replace("|", "/")
            rows.append(f"| {name} | {provider} | {outcome['status']}: {detail} | | | |")
            continue
        rate = f"{outcome['useful_gflops'] / 1e3:.3g}" if outcome.get("useful_gflops") else ""
        of_limit = f"{100 * outcome['of_limit']:.0f} %" if "of_limit" in outcome else ""
        peak = outcome.get("peak_bytes")
        peak_text = "" if peak is None else f"{peak / 1e6:.1f}"
        rows.append(
            f"| {name} | {provider} | {1e3 * outcome['median_s']:.4g} | {rate} | {of_limit} | {peak_text} |"
        )
    return rows

"""`python -m benchmarks`: see `--help`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.harness.chart import write_png
from benchmarks.harness.machine import machine
from benchmarks.harness.report import describe, document, markdown, table, write_json
from benchmarks.harness.run import DTYPES, QUICK, TIMED, Settings, measure
from benchmarks.harness.workload import Operation

# Every module beside this one is an op family, but for small-op timings (pytest's) and what draws results.
OPERATIONS = sorted(
    p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith(("_", "test_", "report"))
)


def load(name: str) -> Operation:
    """The op family of that name."""
    return importlib.import_module(f"benchmarks.{name}").OPERATION


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures ops beside their peers and the machine's limits; times no wrong answer.",
    )
    parser.add_argument("--op", choices=OPERATIONS, help="one op family; all where not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--case", nargs="+", metavar="NAME", help="cases of the tests; the large ones where not given"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: fp32 bf16 on CPU, bf16 on CUDA")
    parser.add_argument(
        "--against", nargs="*", metavar="PROVIDER", help="peers to measure; all where not given"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few rounds: shows that all runs, not how fast"
    )
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks.json"), metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table of a README")
    parser.add_argument("--png", type=Path, default=Path("runs/benchmarks.png"), metavar="FILE")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where pyvlm's own provider was wrong or not there."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    operations = [load(name) for name in ([options.op] if options.op else OPERATIONS)]
    _known(options_parser, "--case", options.case, {name for op in operations for name in op.case_names})
    peers = {provider.name for op in operations for provider in op.providers[1:]}
    _known(options_parser, "--against", options.against, peers)
    device = torch.device(options.device)
    default = ["bf16"] if device.type == "cuda" else ["fp32", "bf16"]
    dtypes = [DTYPES[name] for name in options.dtype or default]
    settings = QUICK if options.quick else Settings()

    facts = machine(device)
    print(describe(facts))
    if options.quick:
        print("quick: small sizes and few rounds; these figures say nothing about speed")
    records = []
    for operation in operations:
        own, *others = operation.providers
        providers = (own, *(p for p in others if options.against is None or p.name in options.against))
        for work in operation.workloads(device, dtypes, options.case, options.quick):
            for record in measure(operation, work, providers, settings):
                records.append(record)
                print("\n" + table(record), flush=True)
    report = document(facts, asdict(settings), records)
    write_json(options.json, report)
    write_png(options.png, report)
    if options.markdown:
        options.markdown.write_text(f"{describe(facts)}\n\n{markdown(report)}")
    print(f"\nwrote {options.json} and {options.png}")
    own_status = {next(iter(record["providers"].values()))["status"] for record in records}
    return 0 if own_status == {TIMED} else 1


def _known(options: argparse.ArgumentParser, flag: str, given: list[str] | None, known: set[str]) -> None:
    unknown = sorted(set(given or ()) - known)
    if unknown:
        options.error(f"{flag} {' '.join(unknown)}: unknown; there are {', '.join(sorted(known))}")


if __name__ == "__main__":
    sys.exit(main())

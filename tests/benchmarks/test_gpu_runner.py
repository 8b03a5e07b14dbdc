"""The runner of a GPU's measurements, its aims, its summary and its charts, without a GPU."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import cases, compilation, step, worker
from benchmarks.gpu.aims import AIMS, MET, MISSED, NOT_MEASURED, Results, judge
from benchmarks.gpu.parts import PARTS, Context, Job
from benchmarks.gpu.summary import summary
from benchmarks.harness.measure import interleave, kernels
from benchmarks.harness.workload import FORWARD, TRAINING

MACHINE = {
    "device": "A GPU",
    "pyvlm": "0",
    "git_sha": "0123456789abcdef",
    "git_changes": True,
    "date": "2001-02-03T04:05:06+00:00",
    "versions": {"torch": "2", "triton": "3", "cuda": "13", "driver": None},
}


def record(
    op: str, case: str, of_pass: str, times: dict[str, float], flops: float = 1e12, **more: Any
) -> dict[str, Any]:
    """As the harness makes them; the machine does 1,000 TFLOP/s and copies 1,000 GB/s."""
    return {
        "op": op,
        "case": case,
        "pass": of_pass,
        "useful_flops": flops,
        "least_bytes": 8e8,
        "limits": {"gemm": {"gflops": 1e6}, "copy": {"gbytes_per_s": 1e3}},
        "providers": {
            name: {"status": "timed", "median_s": t, "useful_gflops": flops / t / 1e9, "of_limit": 0.5}
            | {"peak_bytes": 10**6}
            for name, t in times.items()
        },
        **more,
    }


def document(*records: dict[str, Any], dry_run: bool = False) -> dict[str, Any]:
    parts = {"attention": {"status": "done", "seconds": 1.0, "records": list(records)}}
    made = {"schema": 1, "dry_run": dry_run, "machine": MACHINE, "missing": {"x": "y"}, "parts": parts}
    return made | {"aims": judge(made)}


def verdict(made: dict[str, Any], beginning: str) -> tuple[str, float | None]:
    (found,) = [aim for aim in made["aims"] if aim["aim"].startswith(beginning)]
    return found["verdict"], found["value"]


class TestAims:
    def test_rates_of_forward_and_of_the_backward_alone(self):
        case = "bidirectional-image-8k"
        made = document(
            record("attention", case, FORWARD, {"pyvlm": 2e-3, "flex": 3e-3}),
            record("attention", case, TRAINING, {"pyvlm": 12e-3, "flex": 30e-3}, flops=3.5e12),
            record("attention", "causal-8k", FORWARD, {"pyvlm": 2e-3, "cudnn": 1e-3}),
        )
        assert verdict(made, f"{case} D128 forward") == (MET, pytest.approx(500))
        assert verdict(made, f"{case} D128 backward") == (MISSED, pytest.approx(250))
        assert verdict(made, f"{case} forward, times as fast as Flex") == (MISSED, pytest.approx(1.5))
        assert verdict(made, f"{case} forward+backward, times as fast") == (MET, pytest.approx(2.5))
        assert verdict(made, f"{case} backward, times as fast as Flex") == (MET, pytest.approx(2.7))
        assert verdict(made, f"{case} forward, of cuDNN") == (MISSED, pytest.approx(0.5))
        assert verdict(made, f"{case} forward+backward, of cuDNN") == (NOT_MEASURED, None)

    def test_bounds_from_above(self):
        for twin, expected in ((1.0, MET), (0.8, MISSED)):
            made = document(
                record("attention", "mmca-8k", FORWARD, {"pyvlm": 1.1}),
                record("attention", "mmca-joint-8k", FORWARD, {"pyvlm": twin}),
            )
            assert verdict(made, "mmca-8k forward, times as long")[0] == expected

    def test_experts_copies_and_memory(self):
        experts = {"pyvlm": 1.0, "glue": 1.5, "compile": 0.9, "grouped_mm": 2.0, "compile grouped_mm": 1.8}
        made = document(
            record("moe", "moe-llava", FORWARD, experts, cublas_s=0.9),
            record("placement", "place", FORWARD, {"pyvlm": 1e-3}),
            record("routing", "expert-choice", FORWARD, {"pyvlm": 1e-3}),
            record("moe", "expert-choice", FORWARD, {"pyvlm": 0.05}),
        )
        assert verdict(made, "experts moe-llava forward, of cuBLAS") == (MET, pytest.approx(0.9))
        assert verdict(made, "experts moe-llava forward, times") == (MISSED, pytest.approx(0.9))
        assert verdict(made, "place_image_tokens forward, of copy") == (MET, pytest.approx(0.8))
        assert verdict(made, "expert-choice forward, of the time") == (MISSED, pytest.approx(0.02))

    def test_nothing_is_met_where_a_peer_is_missing(self):
        """It may be the fastest."""
        for missing in ({}, {"flex": {"status": "unavailable", "detail": "OutOfMemoryError"}}):
            made = record("attention", "short-1k", FORWARD, {"pyvlm": 1e-3, "sdpa": 2e-3})
            made["providers"] |= missing
            assert verdict(document(made), "short-1k forward, times") == (NOT_MEASURED, None)
        made = record("attention", "short-1k", FORWARD, {"pyvlm": 1e-3, "sdpa": 2e-3, "flex": 3e-3})
        assert verdict(document(made), "short-1k forward, times") == (MET, pytest.approx(2))

    def test_nothing_is_met_by_a_dry_run_or_by_nothing(self):
        own = record("placement", "place", FORWARD, {"pyvlm": 1e-9})
        for made in (document(own, dry_run=True), document()):
            assert {aim["verdict"] for aim in made["aims"]} == {NOT_MEASURED}
        names = [aim.name for aim in AIMS]
        assert len(set(names)) == len(names)

    def test_every_case_of_an_aim_is_measured(self):
        """Else an aim would stay "not measured" for ever by a wrong name."""

        class Asked(dict):
            def get(self, key: Any, default: Any = None) -> Any:
                asked.add(key[:2])
                return default

        asked: set[tuple[str, str]] = set()
        for aim in AIMS:
            results = Results({"parts": {}})
            results.records = Asked()
            aim.value(results)
        sizes = {
            "attention": cases.ATTENTION,
            "moe": cases.EXPERTS,
            "routing": cases.ROUTING,
            "fusion": cases.FUSION,
            "loss": cases.LOSS,
            "placement": cases.PLACEMENT,
            "norm": cases.NORM,
            "gating": cases.GATING,
        }
        measured = {(op, case.name) for op, of_op in sizes.items() for case in of_op}
        measured |= {("step", step.case_name(*case)) for case in step.CASES}
        assert asked <= measured
        assert len(asked) > 15


class TestSummaryAndReport:
    made = document(
        record("attention", "mmca-8k", FORWARD, {"pyvlm": 2e-3, "flex": 9e-3}),
        record("moe", "moe-llava", TRAINING, {"pyvlm": 5e-3}) | {"useful_flops": 2e12},
    )

    def test_the_summary_tells_aims_rows_and_what_is_missing(self):
        text = summary(self.made)
        assert "0123456789+changes" in text
        assert "- not here: x (y)" in text
        assert (
            "| mmca-8k forward, times as fast as two FlexAttention calls summed | at least 3 | 4.5 | met |"
            in text
        )
        assert "| attention mmca-8k forward | flex | 9 | 111 | 50 % | 1.0 |" in text
        assert "**missed**" not in text
        assert f"| {NOT_MEASURED} |" in text

    def test_charts_are_drawn_from_results(self, tmp_path):
        path = tmp_path / "a-gpu" / "result.json"
        path.parent.mkdir()
        path.write_text(json.dumps(self.made))
        assert report.newest(tmp_path) == [[path]]
        assert report.main([str(path)]) == 0
        for name in ("roofline.png", "bars.png"):
            assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
        assert (path.parent / "summary.md").read_text() == summary(self.made)

    def test_parts_of_one_commit_come_together(self, tmp_path):
        def parts(slow: float, sha: str, names: tuple[str, ...], changes: bool = False) -> dict[str, Any]:
            machine = MACHINE | {"git_sha": sha, "git_changes": changes}
            of_part = {
                name: {
                    "status": "done",
                    "seconds": 1.0,
                    "records": [record("placement", name, FORWARD, {"pyvlm": 1e-3 * slow})],
                }
                for name in names
            }
            return document() | {"machine": machine, "parts": of_part}

        files = {
            "1": parts(7, "older", ("place", "add")),
            "2": parts(2, "newer", ("place", "add")),
            "3": parts(5, "newer", ("add",), changes=True),
            "4": parts(1, "newer", ("place",)),
        }
        (tmp_path / "gpu").mkdir()
        for name, made in files.items():
            (tmp_path / "gpu" / f"{name}.json").write_text(json.dumps(made))
        (paths,) = report.newest(tmp_path)
        assert [path.stem for path in paths] == ["2", "4"]
        made = report.load(paths)
        assert verdict(made, "place_image_tokens forward,") == (MET, pytest.approx(0.8))
        assert verdict(made, "add_at_image_tokens forward,") == (MISSED, pytest.approx(0.4))

    @pytest.mark.parametrize(
        ("made", "reason"), [(document(dry_run=True), "dry run"), (document(), "no timed record")]
    )
    def test_what_says_nothing_is_not_drawn(self, made, reason, tmp_path, capsys):
        path = tmp_path / "result.json"
        path.write_text(json.dumps(made))
        with pytest.raises(SystemExit):
            report.main([str(path)])
        assert reason in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == [path]


class TestRunner:
    def test_the_build_may_take_all_the_time_and_the_others_share_what_is_left(self, monkeypatch, tmp_path):
        given = {}

        def run_part(
            part: str, seconds: float, dry_run: bool, file: Path, of: Sequence[str]
        ) -> dict[str, Any]:
            given[part] = seconds
            return {"status": "done", "seconds": 0.0, "records": []}

        monkeypatch.setattr(runner, "run_part", run_part)
        parts = ["--parts", "build,attention,moe", "--minutes", "2"]
        assert runner.main(["--dry-run", *parts, "--out", str(tmp_path)]) == 0
        share = runner.SHARES["attention"] / (runner.SHARES["attention"] + runner.SHARES["moe"])
        assert given["build"] == pytest.approx(120, rel=0.01)
        assert given["attention"] == pytest.approx(120 * share, rel=0.02)
        assert given["moe"] == pytest.approx(120, rel=0.02)

    def test_a_dry_run_of_a_part_writes_one_json_and_a_table(self, tmp_path):
        assert runner.main(["--dry-run", "--parts", "build,limits", "--out", str(tmp_path)]) == 0
        (path,) = tmp_path.glob("*.json")
        made = json.loads(path.read_text())
        assert made["dry_run"]
        assert list(made["parts"]) == ["build", "limits"]
        assert [part["status"] for part in made["parts"].values()] == ["done", "done"]
        assert len(made["parts"]["limits"]["records"]) == 3
        assert {"torch", "triton", "nvcc", "driver", "cuda"} <= made["machine"]["versions"].keys()
        assert path.with_suffix(".md").read_text().startswith("# ")

    def test_a_part_that_crashes_or_hangs_keeps_what_it_had_and_spares_the_others(
        self, monkeypatch, tmp_path
    ):
        """The worker is replaced by programs that write one record and then die, or sleep."""
        written = '{"status": "out of time", "records": [{"case": "one"}]}'
        ends = {"moe": "os.abort()", "loss": "time.sleep(60)", "fusion": "sys.exit(0)"}
        popen = subprocess.Popen

        def start(command: list[str], **options: Any) -> Any:
            code = f"import os, sys, time; open({command[4]!r}, 'w').write({written!r}); {ends[command[3]]}"
            return popen([sys.executable, "-c", code], **options)

        monkeypatch.setattr(runner.subprocess, "Popen", start)
        begin = time.monotonic()
        parts = {name: runner.run_part(name, 3, True, tmp_path / f"{name}.json") for name in ends}
        assert time.monotonic() - begin < 30
        assert all(part["records"] == [{"case": "one"}] for part in parts.values())
        assert parts["moe"]["status"] == "failed"
        assert "ended with -6" in parts["moe"]["detail"]
        assert parts["loss"]["status"] == "out of time"
        assert "its share of the time" in parts["loss"]["detail"]

    def test_results_are_committed_and_dry_runs_are_not(self):
        assert runner.result_path(None, MACHINE, dry_run=False) == (
            runner.RESULTS / "a-gpu" / "2001-02-03T040506-0123456789-dirty.json"
        )
        assert runner.result_path(None, MACHINE, dry_run=True).parent == runner.ROOT / "runs" / "gpu-dry-run"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    def test_without_a_gpu_it_says_so(self, capsys):
        with pytest.raises(SystemExit) as stop:
            runner.main([])
        assert stop.value.code == 2
        assert "finds no GPU here" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [(["--parts", "build,bild"], "there are build,limits"), (["--minutes", "0"], "a positive number")],
    )
    def test_wrong_options(self, arguments, reason, capsys):
        with pytest.raises(SystemExit):
            runner.main(["--dry-run", *arguments])
        assert reason in capsys.readouterr().err

    @pytest.mark.parametrize("part", ["limits", "fusion", "profile"])
    def test_records_are_written_as_they_are_made(self, part, tmp_path, monkeypatch):
        monkeypatch.setattr(torch, "compile", torch.compile)  # put back what the worker replaces
        written: list[int] = []
        ended = worker.run_part(part, True, 60.0, lambda content: written.append(len(content["records"])), {})
        assert ended == 0
        assert written[0] == 0
        assert sorted(written) == written
        assert written[-1] >= 3

    def test_a_part_goes_on_behind_a_job_that_broke_off(self, monkeypatch, tmp_path):
        """By an exception, or with its whole process."""

        def run(name: str) -> Any:
            def records(context: Context) -> Any:
                yield {"case": f"{name} 1"}
                if name == "b":
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
                if name == "c":
                    raise SystemExit(-6)
                yield {"case": f"{name} 2"}

            return records

        monkeypatch.setattr(torch, "compile", torch.compile)
        monkeypatch.setitem(PARTS, "loss", tuple(Job(name, run(name)) for name in "abcd"))
        processes: list[float] = []

        def in_this_process(part: str, seconds: float, dry_run: bool, file: Path, of: Sequence[str]) -> int:
            processes.append(seconds)
            before = json.loads(file.read_text()) if file.exists() else {}
            write = partial(worker.write_atomically, file)
            try:
                return worker.run_part(part, dry_run, seconds, write, before)
            except SystemExit as end:
                return int(end.code)

        monkeypatch.setattr(runner, "_run_worker", in_this_process)
        part = runner.run_part("loss", 60.0, True, tmp_path / "loss.json")
        assert len(processes) == 3
        cases = [record["case"] for record in part["records"]]
        assert cases == ["a 1", "a 2", "b 1", "c 1", "d 1", "d 2"]
        assert part["status"] == "failed"
        assert [broken["job"] for broken in part["broken"]] == ["b", "c"]
        assert "illegal memory access" in part["broken"][0]["detail"]
        assert part["broken"][1]["detail"] == "its process ended with -6"
        made = {**document(), "parts": {"loss": part | {"records": []}}}
        assert "b: RuntimeError: CUDA error: an illegal memory access" in summary(made)

    def test_no_time_is_no_record(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", torch.compile)
        for part in ("attention", "fusion", "step"):
            written: list[dict[str, Any]] = []
            assert worker.run_part(part, True, -1.0, written.append, {}) == 0
            assert written[-1]["records"] == []
            assert written[-1]["status"] == "out of time"

    def test_a_part_without_the_extension_builds_it_first_and_no_part_follows_a_build_without_it(
        self, monkeypatch, tmp_path
    ):
        asked: list[str] = []

        def run_part(
            part: str, seconds: float, dry_run: bool, file: Path, of: Sequence[str]
        ) -> dict[str, Any]:
            asked.append(part)
            return {"status": "failed", "seconds": 1.0, "detail": "no compiler"}

        monkeypatch.setattr(runner, "run_part", run_part)
        monkeypatch.setattr(runner, "find_spec", lambda name: None if name == "pyvlm._C" else "found")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(runner, "facts", lambda device: MACHINE)
        assert runner.main(["--parts", "limits", "--out", str(tmp_path)]) == 1
        assert asked == ["build"]
        (path,) = tmp_path.glob("*.json")
        assert json.loads(path.read_text())["parts"]["build"]["detail"] == "no compiler"
        built = {"build_info": {"native": {"available": True}, "native_cuda": {"error": "no nvcc"}}}
        assert runner.is_built(built)
        assert not runner.is_built({"build_info": {"native": {"error": "undefined symbol"}}})

    def test_part_compile_calls_what_the_parts_behind_it_compile(self, monkeypatch):
        called: list[str] = []

        def breaks_off(context: Context) -> None:
            raise NotImplementedError("not on a CPU")

        monkeypatch.setattr(torch, "compile", torch.compile)
        for part in ("loss", "step", "norm"):
            compiled = (breaks_off, *[lambda context, part=part: called.append(part)] * 2)
            monkeypatch.setitem(PARTS, part, (Job("a job", lambda context: iter(()), compile=compiled),))
        written: list[dict[str, Any]] = []
        of = ("build", "loss", "step", "limits")
        assert worker.run_part("compile", True, 60.0, written.append, {}, of) == 0
        assert called == ["step", "step", "loss", "loss"]
        said = "NotImplementedError: not on a CPU"
        assert written[-1] == {
            "status": "done",
            "counts": {"failed": 2, "compiled": 4},
            "failures": [f"step a job: {said}", f"loss a job: {said}"],
        }
        assert not runner.failed(written[-1])

    def test_what_does_not_compile_is_told_and_spares_the_others(self, monkeypatch):
        """By processes of their own; there is no task 7 of this part."""
        asked = [compilation.Task("limits", 0, 7), compilation.Task("step", 0, 0)]
        monkeypatch.setattr(compilation, "tasks", lambda parts: asked)
        process = compilation._in_a_process

        def start(task: compilation.Task, deadline: float) -> tuple[str, str]:
            return process(task, deadline if task.part == "limits" else time.monotonic() - 1)

        monkeypatch.setattr(compilation, "_in_a_process", start)
        written: list[dict[str, Any]] = []
        context = Context(torch.device("cuda"), False, time.monotonic() + 120)
        compilation.run(("limits", "step"), context, written.append)
        assert written[-1]["counts"] == {"failed": 1, "out of time": 1}
        (failure,) = written[-1]["failures"]
        assert failure.startswith("limits torch.bfloat16: IndexError")

    def test_every_case_that_is_measured_is_compiled_beforehand(self):
        for part, jobs in PARTS.items():
            assert all(job.compile or part in ("limits", "profile", "tune") for job in jobs), part
        asked = compilation.tasks(("attention", "step"))
        assert [task.part for task in asked] == ["step"] * 7 + ["attention"] * len(cases.ATTENTION)

    @pytest.fixture
    def tests_of(self, tmp_path, monkeypatch) -> Any:
        """Runs a file as if it were all of tests/gpu; returns what was written last."""

        def run(code: str, seconds: float) -> dict[str, Any]:
            (tmp_path / "tests" / "gpu").mkdir(parents=True)
            (tmp_path / "tests" / "gpu" / "test_some.py").write_text(code)
            written: list[dict[str, Any]] = []
            worker.run_tests(True, seconds, lambda content: written.append(json.loads(json.dumps(content))))
            return written[-1]

        monkeypatch.setattr(worker, "ROOT", tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(runner.ROOT))
        monkeypatch.setattr(worker, "installed", lambda package: None)  # xdist takes 8 s more to end
        return run

    def test_why_a_test_failed_is_told_when_it_fails(self, tests_of):
        """And where the time is up the others are not waited for."""
        begin = time.monotonic()
        told = tests_of(
            "import time, pytest\n"
            "each = pytest.mark.parametrize('device', ['cpu'], ids=['on-cpu'])\n"
            "@each\ndef test_wrong(device):\n    assert 1 == 2, 'a reason'\n"
            "@each\ndef test_slow(device):\n    time.sleep(300)\n",
            seconds=4.0,
        )
        assert time.monotonic() - begin < 60
        assert told["status"] == "out of time"
        assert "interrupted after 4 s" in told["detail"]
        (failure,) = told["failures"]
        assert "test_wrong[on-cpu]: AssertionError: a reason" in failure

    def test_tests_that_cannot_be_imported_have_failed(self, tests_of):
        told = tests_of("import a_package_that_is_not_there\n", seconds=60.0)
        assert told["status"] == "failed"
        assert told["detail"] == "pytest ended with 2"
        (failure,) = told["failures"]
        assert "test_some.py: " in failure
        assert "No module named 'a_package_that_is_not_there'" in failure


def test_a_profile_tells_what_takes_longest_and_how_often():
    a = torch.rand(300, 300)
    found = kernels(lambda: (a @ a @ a).relu(), a.device)
    assert found[0]["name"] == "aten::mm"
    assert found[0]["calls"] == 2
    seconds = [kernel["seconds"] for kernel in found]
    assert seconds == sorted(seconds, reverse=True)
    records = [{"op": "kernels of fusion", "case": "a", "pass": FORWARD, "kernels": found}]
    assert "| kernels of fusion a forward | aten::mm x 2 |" in summary(document(*records))


def test_on_a_gpu_its_own_clock_counts_and_the_cache_is_swept(monkeypatch):
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("synchronize")

        def elapsed_time(self, end: "Event") -> float:
            return 7.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    calls = {"a": lambda: order.append("a")}
    samples = interleave(
        calls, torch.device("cuda"), 0.0, min_rounds=1, max_rounds=1, sweep=lambda: order.append("sweep")
    )
    assert samples == {"a": [7e-3]}
    assert order[-5:] == ["sweep", "record", "a", "record", "synchronize"]


def test_the_readme_tells_what_is_measured_and_what_is_not():
    """While there is nothing under benchmarks/results, every row says so."""
    text = (runner.ROOT / "README.md").read_text()
    table = text[text.index("### On a GPU") :].split("\n\n")[2]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    assert len(rows) == 8
    if not list((runner.ROOT / "benchmarks" / "results").glob("*/*.json")):
        assert {row[-1].strip() for row in rows} == {NOT_MEASURED}

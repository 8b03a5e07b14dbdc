"""The benchmark harness end to end on small cases, with providers that are right, wrong, or not there."""

import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from attention.cases import CASES, LARGE_CASES

from benchmarks.__main__ import main
from benchmarks.attention import OPERATION, workload
from benchmarks.harness.measure import interleave, peak_memory, summary
from benchmarks.harness.report import table
from benchmarks.harness.run import QUICK, TIMED, UNAVAILABLE, WRONG, measure
from benchmarks.harness.workload import FORWARD, TRAINING, Provider, Unavailable

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module", autouse=True)
def _stays_frozen() -> Iterator[None]:
    """What `peak_memories` froze stays so: to look through all that is imported takes a second a record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()


def run(*providers, case="mmca", dtype=torch.float32):
    """Records by pass, with `providers` in the place of the operation's own."""
    work = workload(BY_NAME[case], CPU, dtype)
    return {record["pass"]: record for record in measure(OPERATION, work, providers, QUICK)}


def right(work):
    return OPERATION.reference(work)


def slightly_off(work):
    return lambda q, k, v: OPERATION.reference(work)(q, k, v) * 1.01


def wrong_gradient(work):
    return lambda q, k, v: OPERATION.reference(work)(q, k.detach() + 0 * k, v)


def nan_rows(work):
    return lambda q, k, v: OPERATION.reference(work)(q, k, v).index_fill(2, torch.tensor([0]), torch.nan)


def wrong_shape(work):
    return lambda q, k, v: OPERATION.reference(work)(q, k, v)[:, :1]


def raises(work):
    def function(q, k, v):
        raise NotImplementedError("no such kernel\nand more")

    return function


def absent(work):
    raise Unavailable("not on this machine")


class TestEndToEnd:
    def test_quick_run_writes_json_and_png(self, tmp_path, capsys):
        json_path, png_path, table_path = tmp_path / "new" / "b.json", tmp_path / "b.png", tmp_path / "b.md"
        arguments = ["--op", "attention", "--quick", "--against", "sdpa", "--dtype", "fp32", "bf16"]
        arguments += ["--case", "mmca", "decode", "--json", str(json_path), "--png", str(png_path)]
        status = main([*arguments, "--markdown", str(table_path)])
        assert status == 0
        report = json.loads(json_path.read_text())
        assert report["schema"] == 1
        assert {"cpu", "cores", "isa", "torch", "threads", "git_sha", "date"} <= report["machine"].keys()
        keys = [(r["case"], r["dtype"], r["pass"]) for r in report["records"]]
        assert keys == [
            ("mmca", "fp32", FORWARD),
            ("mmca", "fp32", TRAINING),
            ("mmca", "bf16", FORWARD),
            ("mmca", "bf16", TRAINING),
            ("decode", "fp32", FORWARD),
            ("decode", "bf16", FORWARD),
        ]
        for record in report["records"]:
            assert list(record["providers"]) == ["pyvlm", "sdpa"]
            for outcome in record["providers"].values():
                assert outcome["status"] == TIMED
                assert 0 < outcome["q1_s"] <= outcome["median_s"] <= outcome["q3_s"]
                assert outcome["samples"] >= QUICK.min_rounds
                rate = record["useful_flops"] / outcome["median_s"] / 1e9
                assert outcome["useful_gflops"] == pytest.approx(rate)
            assert record["limits"]["gemm"]["gflops"] > 0
            assert record["limits"]["copy"]["gbytes_per_s"] > 0
        lines = table_path.read_text().splitlines()
        assert lines[2].endswith("| peak MB | sdpa time / pyvlm |")
        assert [tuple(line.split(" | ")[:3]) for line in lines[4:]] == [
            (f"| {case}", pass_name, dtype) for case, dtype, pass_name in keys
        ]
        assert png_path.read_bytes().startswith(b"\x89PNG")
        printed = capsys.readouterr().out
        assert "say nothing about speed" in printed
        assert printed.count("sdpa") == len(keys)

    @pytest.mark.parametrize(
        ("op", "cases", "passes"),
        [
            ("moe", ["moe-llava-expert-choice", "decode-t1"], 3),
            ("routing", ["one-group", "images", "choices-t8"], 3),
            ("placement", ["merge", "pack-tiles", "merge-tiles", "deepstack"], 8),
            ("cross_attention", ["cambrian", "cambrian-letterbox"], 4),
            ("linear", ["connector"], 2),
            ("resample", ["qwen-vl-b4"], 2),
            ("grids", ["eagle"], 2),
            ("loss", ["answers", "odd-rows"], 4),
            ("fusion", ["comm-clip-l"], 2),
            ("models", ["moe-training-step"], 1),
        ],
    )
    def test_quick_run_of_the_other_families(self, op, cases, passes, tmp_path, monkeypatch):
        # Traced, not compiled: the C++ compiler would take most of the test's time.
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        path = tmp_path / "b.json"
        arguments = ["--op", op, "--quick", "--dtype", "fp32", "--case", *cases]
        assert main([*arguments, "--json", str(path), "--png", str(tmp_path / "b.png")]) == 0
        records = json.loads(path.read_text())["records"]
        assert len(records) == passes
        for record in records:
            assert all(outcome["status"] in (TIMED, UNAVAILABLE) for outcome in record["providers"].values())
            assert record["providers"]["pyvlm"]["status"] == TIMED

    @pytest.mark.parametrize(("flag", "given"), [("--case", "no-such-case"), ("--against", "no-such-peer")])
    def test_unknown_name_is_told_with_the_known_ones(self, flag, given, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["--quick", flag, given])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert given in message
        assert {"--case": "mmca-4k-d64", "--against": "sdpa"}[flag] in message


class TestNoWrongAnswerIsTimed:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_right_provider_is_timed(self, dtype):
        for record in run(Provider("right", right), dtype=dtype).values():
            assert record["providers"]["right"]["status"] == TIMED

    @pytest.mark.parametrize("build", [slightly_off, nan_rows])
    def test_wrong_output(self, build):
        for record in run(Provider("right", right), Provider("bad", build)).values():
            outcome = record["providers"]["bad"]
            assert outcome["status"] == WRONG
            assert outcome.keys() == {"status", "detail"}
            assert f"WRONG: {outcome['detail']}" in table(record)
            assert record["providers"]["right"]["status"] == TIMED

    def test_wrong_shape(self):
        outcome = run(Provider("bad", wrong_shape))[FORWARD]["providers"]["bad"]
        assert outcome["status"] == WRONG
        assert "shape" in outcome["detail"]

    def test_wrong_gradient_is_refused_in_the_pass_that_has_one(self):
        records = run(Provider("bad", wrong_gradient))
        assert records[FORWARD]["providers"]["bad"]["status"] == TIMED
        outcome = records[TRAINING]["providers"]["bad"]
        assert outcome["status"] == WRONG
        assert "gradient of input 1" in outcome["detail"]

    @pytest.mark.parametrize(
        ("build", "detail"),
        [(raises, "NotImplementedError: no such kernel"), (absent, "not on this machine")],
    )
    def test_provider_that_cannot(self, build, detail):
        for record in run(Provider("gone", build), Provider("right", right)).values():
            assert record["providers"]["gone"] == {"status": UNAVAILABLE, "detail": detail}
            assert record["providers"]["right"]["status"] == TIMED
            assert detail in table(record)

    def test_exit_status_tells_that_pyvlm_was_wrong(self, monkeypatch, tmp_path):
        bad = tuple(Provider(p.name, slightly_off) for p in OPERATION.providers)
        monkeypatch.setattr("benchmarks.attention.OPERATION", replace(OPERATION, providers=bad))
        files = ["--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png")]
        assert main(["--quick", "--case", "mmca", "--dtype", "fp32", *files]) == 1


class TestUsefulFlops:
    def test_flops_of_the_causal_mask(self):
        case = BY_NAME["causal"]
        costs = workload(case, CPU, torch.float32).costs
        pairs = case.length * (case.length + 1) // 2
        assert costs[FORWARD].flops == 4 * case.head_dim * case.heads * pairs
        assert costs[TRAINING].flops == 3.5 * costs[FORWARD].flops

    def test_decode_reads_its_keys_and_values_and_is_bound_by_them(self):
        work = workload(BY_NAME["decode-4k-b1"].reduced(), CPU, torch.bfloat16)
        q, k, _ = work.inputs
        assert work.costs.keys() == {FORWARD}
        assert work.costs[FORWARD].bytes == 2 * k.nbytes + 2 * q.nbytes
        assert work.cold


class TestPyvlm:
    @pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: case.name)
    def test_every_benchmark_case_is_right_at_reduced_size(self, case):
        (work,) = OPERATION.workloads(CPU, [torch.bfloat16], [case.name], quick=True)
        for record in measure(OPERATION, work, OPERATION.providers[:1], QUICK):
            assert record["providers"]["pyvlm"]["status"] == TIMED, record["providers"]


class TestPeers:
    """The peers on every kind of spans; FlexAttention uncompiled, since compiling takes many seconds."""

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    @pytest.mark.parametrize(
        "name", ["mmca", "mmca-image", "mmca-joint", "all-images", "grouped-heads", "decode"]
    )
    @pytest.mark.parametrize("provider", OPERATION.providers[1:], ids=lambda provider: provider.name)
    def test_peer_computes_the_same(self, provider, name, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        record = run(provider, case=name)[FORWARD]
        assert record["providers"][provider.name]["status"] == TIMED, record["providers"]


class TestMeasuring:
    def test_rounds_run_all_calls_and_rotate(self):
        order = []
        calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
        sweeps = []
        samples = interleave(calls, CPU, budget_s=0.0, min_rounds=3, sweep=lambda: sweeps.append(len(order)))
        assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3, "c": 3}
        measured = order[6:]  # two warm-up calls each come first
        assert measured == list("abcbcacab")
        assert sweeps == list(range(6, 15))

    def test_summary(self):
        assert summary([3.0, 1.0, 2.0, 5.0, 4.0]) == {
            "median_s": 3.0,
            "q1_s": 2.0,
            "q3_s": 4.0,
            "min_s": 1.0,
            "samples": 5,
        }
        assert summary([2.0])["q3_s"] == 2.0

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
    def test_peak_memory_counts_what_is_freed_within_the_call(self):
        mebibyte = 2**20

        def call():
            torch.ones(64 * mebibyte, dtype=torch.uint8)
            return torch.ones(16 * mebibyte, dtype=torch.uint8)

        for _ in range(2):  # the second call would reuse memory that malloc kept
            assert 62 * mebibyte < peak_memory(call, CPU) < 80 * mebibyte

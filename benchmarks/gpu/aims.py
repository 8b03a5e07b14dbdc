"""What pyvlm is to reach on a GPU, and whether a run shows it: "met", "missed" or "not measured"."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.workload import FORWARD, TRAINING

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
BACKWARD = "backward"  # alone
OWN = "pyvlm"


class Results:
    """The records of a run, by op, case and pass. What was not measured is None."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.records = {
            (record["op"], record["case"], record.get("pass")): record
            for part in document["parts"].values()
            for record in part.get("records", ())
        }

    def seconds(self, op: str, case: str, of_pass: str, provider: str = OWN) -> float | None:
        if of_pass == BACKWARD:  # what is measured is both, and the forward alone
            both, forward = (self.seconds(op, case, name, provider) for name in (TRAINING, FORWARD))
            return None if both is None or forward is None or both <= forward else both - forward
        record = self.records.get((op, case, of_pass), {})
        return record.get("providers", {}).get(provider, {}).get("median_s")

    def best_peer(self, op: str, case: str, of_pass: str, *peers: str) -> float | None:
        """Seconds of the fastest; None unless all were timed, for the one that is missing may be it."""
        times = [self.seconds(op, case, of_pass, peer) for peer in peers]
        return None if None in times else min(times)

    def tflops(self, case: str, of_pass: str, provider: str = OWN) -> float | None:
        """Useful ones of attention."""
        passes = (TRAINING, FORWARD) if of_pass == BACKWARD else (of_pass,)
        flops = [self.records.get(("attention", case, name), {}).get("useful_flops") for name in passes]
        seconds = self.seconds("attention", case, of_pass, provider)
        return None if seconds is None else 1e-12 * (flops[0] - sum(flops[1:])) / seconds

    def speed_up(self, op: str, case: str, of_pass: str, *peers: str) -> float | None:
        """How many times as long the fastest of the peers takes."""
        return ratio(self.best_peer(op, case, of_pass, *peers), self.seconds(op, case, of_pass))

    def of_copy(self, op: str, case: str, of_pass: str) -> float | None:
        """Of the copy bandwidth, on the fewest bytes."""
        record = self.records.get((op, case, of_pass), {})
        seconds = self.seconds(op, case, of_pass)
        if seconds is None:
            return None
        return record["least_bytes"] / seconds / (1e9 * record["limits"]["copy"]["gbytes_per_s"])

    def of_cublas(self, case: str, of_pass: str) -> float | None:
        record = self.records.get(("moe", case, of_pass), {})
        return ratio(record.get("cublas_s"), self.seconds("moe", case, of_pass))

    def peak_ratio(self, op: str, case: str, of_pass: str, peer: str) -> float | None:
        providers = self.records.get((op, case, of_pass), {}).get("providers", {})
        peaks = [providers.get(name, {}).get("peak_bytes") for name in (peer, OWN)]
        return ratio(*peaks)


def ratio(a: float | None, b: float | None, factor: float = 1.0) -> float | None:
    return None if a is None or not b else factor * a / b


@dataclass(frozen=True)
class Aim:
    name: str
    value: Callable[[Results], float | None]
    bound: float
    at_most: bool = False

    def judged(self, results: Results) -> dict[str, Any]:
        value = self.value(results)
        if value is None:
            verdict = NOT_MEASURED
        else:
            verdict = MET if (value <= self.bound if self.at_most else value >= self.bound) else MISSED
        sign = "at most" if self.at_most else "at least"
        return {"aim": self.name, "bound": f"{sign} {self.bound:g}", "value": value, "verdict": verdict}


def _of_long_rows() -> list[Aim]:
    aims = []
    for tokens in ("8k", "16k"):
        plain = f"causal-{tokens}"
        for rule in (f"bidirectional-image-{tokens}", f"causal-packed-{tokens}"):
            for of_pass, bound in ((FORWARD, 450), (BACKWARD, 350)):
                aims.append(
                    Aim(
                        f"{rule} D128 {of_pass}, useful TFLOP/s",
                        lambda r, rule=rule, of_pass=of_pass: r.tflops(rule, of_pass),
                        bound,
                    )
                )
            for of_pass in (FORWARD, BACKWARD, TRAINING):
                aims.append(
                    Aim(
                        f"{rule} {of_pass}, times as fast as FlexAttention",
                        lambda r, rule=rule, p=of_pass: r.speed_up("attention", rule, p, "flex"),
                        1.6,
                    )
                )
                aims.append(
                    Aim(
                        f"{rule} {of_pass}, of cuDNN's rate on the plain causal mask",
                        lambda r, rule=rule, plain=plain, p=of_pass: ratio(
                            r.tflops(rule, p), r.tflops(plain, p, "cudnn")
                        ),
                        0.75,
                    )
                )
    return aims


def _of_mmca() -> list[Aim]:
    aims = []
    for of_pass in (FORWARD, TRAINING):
        aims.append(
            Aim(
                f"mmca-8k {of_pass}, times as fast as two FlexAttention calls summed",
                lambda r, p=of_pass: r.speed_up("attention", "mmca-8k", p, "flex"),
                3.0,
            )
        )
        aims.append(
            Aim(
                f"mmca-8k {of_pass}, times as long as its joint twin",
                lambda r, p=of_pass: ratio(
                    r.seconds("attention", "mmca-8k", p), r.seconds("attention", "mmca-joint-8k", p)
                ),
                1.15,
                at_most=True,
            )
        )
    return aims


def _of_short_rows_and_decoding() -> list[Aim]:
    decoding = ("decode-8k", "decode-mmca-8k", "decode-one-8k")
    cases = [(name, p) for name in ("short-1k", "short-mmca-1k", "short-2k") for p in (FORWARD, TRAINING)]
    aims = [
        Aim(
            f"{case} {of_pass}, times as fast as the better of FlexAttention and SDPA with a mask",
            lambda r, case=case, p=of_pass: r.speed_up("attention", case, p, "flex", "sdpa"),
            1.0,
        )
        for case, of_pass in [*cases, *((name, FORWARD) for name in decoding)]
    ]
    aims += [
        Aim(f"{case}, of copy bandwidth", lambda r, case=case: r.of_copy("attention", case, FORWARD), 0.7)
        for case in decoding
    ]
    return aims


def _of_experts() -> list[Aim]:
    aims = []
    for case in ("moe-llava", "eight-experts", "fine-grained-e64", "fine-grained-e128"):
        for of_pass, bound in ((FORWARD, 0.85), (TRAINING, 0.75)):
            aims.append(
                Aim(
                    f"experts {case} {of_pass}, of cuBLAS on the same products",
                    lambda r, case=case, p=of_pass: r.of_cublas(case, p),
                    bound,
                )
            )
            aims.append(
                Aim(
                    f"experts {case} {of_pass}, times as fast as the best with grouped_mm",
                    lambda r, case=case, p=of_pass: r.speed_up(
                        "moe", case, p, "glue", "compile", "grouped_mm", "compile grouped_mm"
                    ),
                    1.0,
                )
            )
    for case in ("expert-choice", "expert-choice-images", "expert-choice-e64"):
        for of_pass in (FORWARD, TRAINING):
            aims.append(
                Aim(
                    f"{case} {of_pass}, of the time of its layer",
                    lambda r, case=case, p=of_pass: ratio(
                        r.seconds("routing", case, p), r.seconds("moe", case, p)
                    ),
                    0.01,
                    at_most=True,
                )
            )
    return aims


def _of_memory_bound_ops() -> list[Aim]:
    cases = (
        ("fusion", "comm-clip-l", "merge_levels"),
        ("placement", "place", "place_image_tokens"),
        ("placement", "place-tiles", "place_image_tokens of tiles"),
        ("placement", "add", "add_at_image_tokens"),
        ("norm", "llama-7b", "rms_norm"),
        ("gating", "llama-7b", "gated_activation"),
    )
    return [
        Aim(
            f"{name} {of_pass}, of copy bandwidth on the fewest bytes",
            lambda r, op=op, case=case, p=of_pass: r.of_copy(op, case, p),
            0.8,
        )
        for op, case, name in cases
        for of_pass in (FORWARD, TRAINING)
    ]


def _of_steps() -> list[Aim]:
    steps = (
        ("llava-mmca", "a LLaVA with MMCA", ("sdpa", "flex")),
        ("moe-llava", "MoE-LLaVA", ("sdpa",)),
        ("llava-mmca-compiled", "a LLaVA with MMCA, both compiled", ("compile",)),
        ("moe-llava-compiled", "MoE-LLaVA, both compiled", ("compile",)),
    )
    return [
        Aim(
            f"step of {name}, times as fast as transformers' best",
            lambda r, case=case, peers=peers: r.speed_up("step", case, TRAINING, *peers),
            1.3,
        )
        for case, name, peers in steps
    ]


AIMS = (
    *_of_long_rows(),
    *_of_mmca(),
    *_of_short_rows_and_decoding(),
    *_of_experts(),
    *_of_memory_bound_ops(),
    Aim(
        "linear_cross_entropy at 15 %, times as fast as Liger",
        lambda r: r.speed_up("loss", "15-percent", TRAINING, "liger"),
        1.0,
    ),
    Aim(
        "linear_cross_entropy at 15 %, Liger's peak memory over ours",
        lambda r: r.peak_ratio("loss", "15-percent", TRAINING, "liger"),
        1.0,
    ),
    *_of_steps(),
)


def judge(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdict on every aim. A dry run measures none."""
    results = Results({"parts": {}} if document["dry_run"] else document)
    return [aim.judged(results) for aim in AIMS]

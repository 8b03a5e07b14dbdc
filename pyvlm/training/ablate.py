"""`pyvlm ablate`: variants of a recipe at equal compute, with several seeds, and what can be said of them.

Every run is a folder of its own. A finished one is not run again, and an interrupted one goes on from its
last checkpoint, so that the same command ends what was cut off, or adds seeds.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyvlm.models.checkpoint import read_file, write_file
from pyvlm.training.ablation_chart import Curve, write_png
from pyvlm.training.ablation_plan import Variant, plan_variants
from pyvlm.training.budget_table import align, human
from pyvlm.training.bundled import bundled_dialogues
from pyvlm.training.evaluate import evaluate
from pyvlm.training.recipe import Recipe
from pyvlm.training.runfolder import RunFolder
from pyvlm.training.trainer import train

OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Run:
    """What came of one seed.

    Attributes:
        accuracy: of the final evaluation, over `questions`.
        curve: training FLOPs and held-out accuracy of each look on the way.
    """

    seed: int
    accuracy: float
    questions: int
    curve: list[tuple[int, float]]


@dataclass(frozen=True)
class Outcome:
    """A variant and its runs, one a seed."""

    variant: Variant
    runs: list[Run]

    @property
    def accuracies(self) -> list[float]:
        return [run.accuracy for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def sd(self) -> float | None:
        """Of the sample; None of one run, which has no spread."""
        return statistics.stdev(self.accuracies) if len(self.runs) > 1 else None

    def overlaps(self, other: "Outcome") -> bool:
        """Whether the ranges of their runs have an accuracy in common."""
        a, b = self.accuracies, other.accuracies
        return max(min(a), min(b)) <= min(max(a), max(b))


def ablate(
    recipe: Recipe,
    vary: Mapping[str, Sequence[Any]],
    out: str | os.PathLike[str],
    *,
    budget: float | None = None,
    seeds: int = 3,
    looks: int = 8,
    tell: Callable[[str], None] = print,
    progress: bool = True,
) -> list[Outcome]:
    """Trains every variant with every seed and writes results.json, results.md and accuracy.png into `out`.

    Args:
        vary, budget, looks: see `pyvlm.training.ablation_plan.plan_variants`.
        seeds: how many, counted from the recipe's own.

    Raises:
        ValueError: a value that does not fit, or a run folder of another plan.
    """
    out = Path(out)
    variants = plan_variants(recipe, vary, budget, looks)
    tell(_plan_table(variants))
    runs: dict[str, list[Run]] = {variant.name: [] for variant in variants}
    count = len(variants) * seeds
    # Seed by seed, so that what is there at any time compares all variants.
    order = [(recipe.seed + i, variant) for i in range(seeds) for variant in variants]
    for number, (seed, variant) in enumerate(order, start=1):
        folder = out / "runs" / f"{variant.folder}-seed{seed}"
        tell(f"[{number}/{count}] {variant.name}, seed {seed}: {folder}")
        run = _run(variant, seed, folder, progress)
        tell(f"[{number}/{count}] accuracy {run.accuracy:.1%}")
        runs[variant.name].append(run)
        done = [Outcome(variant, runs[variant.name]) for variant in variants if runs[variant.name]]
        write_results(out, done)
    tell(format_results(done))
    return done


def _run(variant: Variant, seed: int, folder: Path, progress: bool) -> Run:
    """Trains and evaluates; of a finished run, what it gave."""
    recipe = variant.recipe.model_copy(update={"seed": seed})
    with RunFolder(folder, recipe):  # refuses a folder of another recipe
        path = folder / OUTCOME
        if path.exists():
            content = json.loads(read_file(path))
            return Run(**content | {"curve": [(flops, accuracy) for flops, accuracy in content["curve"]]})
    trained = train(recipe, folder, progress=progress)
    settings = recipe.evaluation
    held_out = bundled_dialogues("test", recipe.bundled_held_out(), seed).batch(0, range(settings.dialogues))
    result = evaluate(trained.model, trained.processor, held_out, settings.batch_size)
    with RunFolder(folder, recipe) as run_folder:
        looked = [line for line in run_folder.read_metrics() if "held_out_accuracy" in line]
        curve = [(variant.flops_at(line["step"]), line["held_out_accuracy"]) for line in looked]
        run = Run(seed, result.accuracy, len(result.asked), curve)
        write_file(path, json.dumps(vars(run)).encode())
    return run


def write_results(out: Path, outcomes: Sequence[Outcome]) -> None:
    """Everything so far: numbers, the table, the picture."""
    content = [
        {
            "variant": outcome.variant.name,
            "choices": outcome.variant.choices,
            "parameters": outcome.variant.parameters,
            "stages": {
                name: {"steps": stage.steps, "flops_per_step": each}
                for (name, stage), each in zip(
                    outcome.variant.recipe.stages.items(), outcome.variant.step_flops, strict=True
                )
            },
            "flops": outcome.variant.flops,
            "mean": outcome.mean,
            "sd": outcome.sd,
            "runs": [vars(run) for run in outcome.runs],
        }
        for outcome in outcomes
    ]
    write_file(out / "results.json", json.dumps(content, indent=2).encode())
    write_file(out / "results.md", format_markdown(outcomes).encode())
    curves = [
        Curve(
            outcome.variant.name,
            [flops for flops, _ in outcome.runs[0].curve],
            [[accuracy for _, accuracy in run.curve] for run in outcome.runs],
            outcome.variant.flops,
            outcome.accuracies,
        )
        for outcome in outcomes
    ]
    write_png(out / "accuracy.png", curves)


def conclude(outcomes: Sequence[Outcome]) -> list[str]:
    """In sentences, what the numbers allow to be said."""
    if len(outcomes) < 2:
        return []
    best, *others = sorted(outcomes, key=lambda outcome: -outcome.mean)
    if min(len(outcome.runs) for outcome in outcomes) < 2:
        return ["One seed has no spread: no difference here can be told from chance."]
    within = [other.variant.name for other in others if other.overlaps(best)]
    apart = [other.variant.name for other in others if not other.overlaps(best)]
    said = [f"Highest mean: {best.variant.name}."]
    if within:
        said.append(
            "Within the spread of it (the ranges of their seeds overlap), so not told apart: "
            f"{'; '.join(within)}."
        )
    if apart:
        n = min(len(outcome.runs) for outcome in outcomes)
        said.append(
            f"Below it with every seed: {'; '.join(apart)}. Of two equal variants, {n} seeds each fall apart "
            f"like this in {2 / math.comb(2 * n, n):.2g} of all cases."
        )
    return said


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    questions = min(run.questions for outcome in outcomes for run in outcome.runs)
    spent = [outcome.variant.flops for outcome in outcomes]
    return [
        *conclude(outcomes),
        f"Mean and sample standard deviation over n seeds, and their range. Compute: training FLOPs by pyvlm "
        f"budget, {human(min(spent))} to {human(max(spent))} a run, equal but for rounding to whole steps. "
        f"A run answered {questions:,} held-out questions, which alone is a standard error of up to "
        f"{0.5 / questions**0.5:.1%}.",
    ]


def format_results(outcomes: Sequence[Outcome]) -> str:
    """For a terminal."""
    return "\n".join([align([HEADER, *_rows(outcomes)]), "", *_notes(outcomes)])


def format_markdown(outcomes: Sequence[Outcome]) -> str:
    """The same as a Markdown file."""
    rows = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *_rows(outcomes)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([table, "![accuracy against training FLOPs](accuracy.png)", *_notes(outcomes)]) + "\n"


HEADER = ["variant", "accuracy", "range", "n", "parameters", "FLOPs a step", "steps", "FLOPs"]


def _rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    rows = []
    for outcome in sorted(outcomes, key=lambda outcome: -outcome.mean):
        spread = "" if outcome.sd is None else f" ± {outcome.sd:.1%}"
        rows.append(
            [
                outcome.variant.name,
                f"{outcome.mean:.1%}{spread}",
                f"{min(outcome.accuracies):.1%} to {max(outcome.accuracies):.1%}",
                str(len(outcome.runs)),
                *_cost(outcome.variant),
            ]
        )
    return rows


def _cost(variant: Variant) -> list[str]:
    steps = variant.recipe.total_steps
    return [human(variant.parameters), human(variant.flops / steps), f"{steps:,}", human(variant.flops)]


def _plan_table(variants: Sequence[Variant]) -> str:
    header = ["variant", "parameters", "FLOPs a step", "steps", "FLOPs"]
    return align([header, *([variant.name, *_cost(variant)] for variant in variants)])

"""`pyvlm demo`: train, evaluate, ask aloud, report, and leave pictures to chat about."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyvlm.training.bundled import bundled_dialogues
from pyvlm.training.digits import load_split
from pyvlm.training.evaluate import Transcript, accuracy_table, commonest_answers, evaluate, expert_load
from pyvlm.training.pictures import write_pictures
from pyvlm.training.recipe import Recipe
from pyvlm.training.report import Findings, write_report
from pyvlm.training.runfolder import RunFolder
from pyvlm.training.sources import make_source
from pyvlm.training.steptime import compare_backends
from pyvlm.training.trainer import make_batches, train

SHOWN_DIALOGUES = 6
SPOKEN_DIALOGUES = 2
PICTURES = 10

Row = dict[str, Any]


def run_demo(
    recipe: Recipe,
    run_dir: str | os.PathLike[str],
    tell: Callable[[str], None] = print,
    progress: bool = True,
) -> list[Row]:
    """Trains `recipe` in `run_dir` and shows what came of it, on the screen and in `run_dir`/report.html.

    Returns:
        The accuracy table, see `pyvlm.training.evaluate.accuracy_table`.

    Raises:
        ValueError: as `pyvlm.training.trainer.train`.
    """
    start, folder = time.perf_counter(), Path(run_dir)
    trained = train(recipe, folder, progress=progress)
    model, processor = trained.model, trained.processor

    settings, stage = recipe.evaluation, list(recipe.stages.values())[-1]
    data = recipe.bundled_held_out()
    held_out = bundled_dialogues("test", data, recipe.seed).batch(0, range(settings.dialogues))
    result = evaluate(model, processor, held_out, settings.batch_size)
    table = accuracy_table(result, commonest_answers(data, recipe.seed))
    tell(format_table(table))
    for transcript in result.transcripts[:SPOKEN_DIALOGUES]:
        tell(format_transcript(transcript))

    source = make_source(stage.data, "train", recipe.seed, processor, batch_size=stage.batch_size)
    findings = Findings(
        recipe=recipe,
        model=model,
        metrics=RunFolder(folder, recipe).read_metrics(),
        table=table,
        transcripts=result.transcripts[:SHOWN_DIALOGUES],
        expert_load=expert_load(model, processor, held_out[: settings.batch_size]),
        step_times=compare_backends(model, make_batches(processor, source, 0, range(stage.batch_size))[0]),
    )
    write_report(folder / "report.html", findings)
    tell(f"report         {folder / 'report.html'}")
    tell(f"whole run      {time.perf_counter() - start:.0f} s")
    pictures = " ".join(f"--image {path}" for path in leave_pictures(folder / "images")[:3])
    tell(f'now ask it     pyvlm chat {folder} {pictures} "which digit is in image 2?"')
    return table


def leave_pictures(folder: Path) -> list[Path]:
    """Writes the first held-out digits as PNG files, named by what they show."""
    images, labels = (part[:PICTURES] for part in load_split("test"))
    names = [f"{number:02d}_shows_{label}.png" for number, label in enumerate(labels, start=1)]
    return write_pictures(list(images), names, folder)


def format_table(table: Sequence[Row]) -> str:
    """The accuracy table for a terminal."""
    lines = [f"\n{'question':<10}{'asked':>7}{'right':>9}{'baseline':>10}"]
    lines += [
        f"{row['kind']:<10}{row['questions']:>7}{row['accuracy']:>9.1%}{row['baseline']:>10.1%}"
        for row in table
    ]
    return "\n".join(lines) + "\n"


def format_transcript(transcript: Transcript) -> str:
    """A dialogue for a terminal, with the true answer where the model was wrong."""
    digits = transcript.dialogue.shown
    lines = [f"held-out images of {', '.join(map(str, digits[:-1]))} and {digits[-1]}"]
    for asked in transcript.rounds:
        mark = "" if asked.right else f"   wrong, it is {asked.expected}"
        lines.append(f"  {asked.question:<40} {asked.given}{mark}")
    return "\n".join(lines) + "\n"

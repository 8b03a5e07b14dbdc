"""report.html: one file that shows a run, with nothing to load from anywhere."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyvlm._build_info import build_info
from pyvlm.models.checkpoint import write_file
from pyvlm.models.vlm import VLM
from pyvlm.training.charts import SECOND, Line, line_chart, smooth
from pyvlm.training.evaluate import Transcript
from pyvlm.training.recipe import Recipe
from pyvlm.training.steptime import StepTime

KINDS = {
    "which": "Which digit is in image i?",
    "sum": "What is the sum of images i and j?",
    "largest": "Which image shows the largest digit?",
    "count": "How many images show a d?",
    "all": "All questions",
}


@dataclass(frozen=True)
class Findings:
    """What a report tells; see `pyvlm.training.evaluate` for the tables' rows."""

    recipe: Recipe
    model: VLM
    metrics: Sequence[dict[str, Any]]
    table: Sequence[dict[str, Any]]
    transcripts: Sequence[Transcript]
    expert_load: Sequence[dict[str, list[float]]]
    step_times: Sequence[StepTime]


def write_report(path: Path, findings: Findings) -> None:
    """Renders the findings into `path`, replacing it in one step."""
    write_file(path, render_report(findings).encode())


def render_report(findings: Findings) -> str:
    """The page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pyvlm.training", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    own, reference = findings.step_times
    return environment.get_template("report.html.jinja").render(
        recipe=findings.recipe,
        overall=findings.table[-1],
        rows=[{**row, "label": KINDS[row["kind"]]} for row in findings.table],
        charts=_charts(findings),
        dialogues=[_dialogue(transcript) for transcript in findings.transcripts],
        expert_layers=_expert_layers(findings),
        step_times=findings.step_times,
        speedup=reference.median / own.median,
        facts=_facts(findings),
        resolved=json.dumps(findings.recipe.model_dump(mode="json"), indent=2),
    )


def picture_source(image: np.ndarray) -> str:
    """A data URI of a grey image [h, w] in [0, 1], at its own size: the page magnifies it."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.round(255 * image).astype(np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _charts(findings: Findings) -> list[dict[str, str]]:
    steps = [line for line in findings.metrics if "loss" in line]
    x, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    starts: dict[str, int] = {}
    for line in steps:
        starts.setdefault(line["stage"], line["step"])
    marks = [(step, stage) for stage, step in starts.items()]
    loss = [Line("loss", x, losses, faint=True), Line("loss, smoothed", x, smooth(losses))]
    rates: dict[str, list[float]] = {}
    for part in dict.fromkeys(part for line in steps for part in line["lr"]):
        rates[part] = [line["lr"].get(part, 0.0) for line in steps]
    groups: dict[tuple[float, ...], list[str]] = {}
    for part, values in rates.items():
        groups.setdefault(tuple(values), []).append(part)
    colors = ["#3b7dd8", SECOND, "#3ba57d", "#a55bb8", "#888888"]
    rate_lines = [
        Line(", ".join(parts), x, values, colors[i]) for i, (values, parts) in enumerate(groups.items())
    ]
    charts = [
        {"title": "Training loss", "svg": line_chart(loss, y_label="loss", marks=marks)},
        {"title": "Learning rate", "svg": line_chart(rate_lines, y_label="rate", marks=marks)},
    ]
    if looks := [line for line in findings.metrics if "held_out_accuracy" in line]:
        accuracy = Line(
            "held out", [a["step"] for a in looks], [100 * a["held_out_accuracy"] for a in looks], dots=True
        )
        svg = line_chart([accuracy], y_label="%", marks=marks, y_limits=(0, 100))
        charts.insert(1, {"title": "Held-out accuracy on the way, first questions", "svg": svg})
    return charts


def _dialogue(transcript: Transcript) -> dict[str, Any]:
    return {
        "images": [picture_source(image) for image in transcript.dialogue.images],
        "shown": transcript.dialogue.shown,
        "rounds": transcript.rounds,
    }


def _expert_layers(findings: Findings) -> list[dict[str, Any]]:
    layers = findings.recipe.model.language.moe_layers
    return [{"layer": layer, "load": load} for layer, load in zip(layers, findings.expert_load, strict=True)]


def _facts(findings: Findings) -> dict[str, str]:
    steps = [line for line in findings.metrics if "loss" in line]
    minutes, seconds = divmod(round(sum(line["seconds"] for line in steps)), 60)
    device = next(findings.model.parameters()).device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else build_info()["cpu"]["name"]
    parameters = sum(parameter.numel() for parameter in findings.model.parameters())
    return {
        "Parameters": f"{parameters:,}",
        "Steps": f"{len(steps):,}",
        "Tokens read": f"{sum(line['tokens'] for line in steps):,}",
        "Training time": f"{minutes} min {seconds:02d} s",
        "Seed": str(findings.recipe.seed),
        "Machine": f"{machine}, {torch.get_num_threads()} threads",
        "Torch": torch.__version__,
        "Date": f"{datetime.now():%Y-%m-%d}",
    }

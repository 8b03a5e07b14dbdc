import json
import re

import numpy as np
import pytest

from pyvlm.models.vlm import VLM
from pyvlm.training.charts import Line, line_chart, smooth
from pyvlm.training.digits import DigitDialogues, DigitsConfig
from pyvlm.training.evaluate import Asked, Evaluation, Transcript, accuracy_table
from pyvlm.training.report import Findings, write_report
from pyvlm.training.sources import make_source
from pyvlm.training.steptime import StepTime, compare_backends
from pyvlm.training.trainer import make_batches


@pytest.fixture
def findings(small_recipe):
    recipe = small_recipe()
    dialogue = DigitDialogues("test", DigitsConfig(images=(3, 3)), 0).batch(0, [0])[0]
    asked = [
        Asked("which", "q <1>?", "4", "4"),
        Asked("sum", "q2?", "12", "13"),
        Asked("count", "q3?", "0", ""),
    ]
    transcript = Transcript(dialogue, asked)
    metrics = [
        {
            "step": i,
            "stage": "one" if i < 6 else "two",
            "loss": 1 / i,
            "lr": {"vision": 0.1, "moe": 0.2},
            "tokens": 7,
            "seconds": 9.0,
        }
        for i in range(1, 10)
    ]
    return Findings(
        recipe=recipe,
        model=VLM(recipe.model),
        metrics=[*metrics, {"step": 3, "held_out_accuracy": 0.25}],
        table=accuracy_table(Evaluation([transcript]), {"which": "4"}),
        transcripts=[transcript],
        expert_load=[{"text": [0.125, 0.875], "image": [0.5, 0.5]}],
        step_times=[StepTime("auto", 10.0, 9.0, 11.0), StepTime("reference", 25.0, 24.0, 26.0)],
    )


def test_report_holds_all_findings_and_loads_nothing(tmp_path, findings):
    path = tmp_path / "report.html"
    write_report(path, findings)
    page = path.read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert page.count("<svg") == 3
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "q &lt;1&gt;?" in page
    assert page.count("✓") == 1
    assert page.count("✗") == 2
    assert "it is 12" in page
    for shown in ("33.3 %", "12.5 %", "10.0 ms", "2.50", "1 min 21 s", "small"):
        assert shown in page, shown
    assert json.dumps(findings.recipe.name) in page.replace("&#34;", '"')


def test_charts_take_their_text_colour_from_the_page():
    svg = line_chart([Line("a", [1, 2], [3, 4])], y_label="y", marks=[(1, "here")])
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")
    assert "currentColor" in svg
    assert "#000000" not in svg
    assert ">here<" in svg


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert smooth([5.0, 5.0, 5.0]) == pytest.approx([5.0] * 3)
    assert smooth([1.0, 3.0], weight=0.5) == pytest.approx([1.0, 7 / 3])


def test_step_times_are_of_both_backends_and_leave_the_model_alone(small_recipe):
    recipe = small_recipe()
    model = VLM(recipe.model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    processor = recipe.processor()
    source = make_source(DigitsConfig(), "train", 0, processor, batch_size=2)
    times = compare_backends(model, make_batches(processor, source, 0, range(2))[0], 3, 1)
    assert [time.backend for time in times] == ["auto", "reference"]
    assert all(0 < time.low <= time.median <= time.high for time in times)
    assert all(np.array_equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())

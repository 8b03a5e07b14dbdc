"""`pyvlm ablate`: the plan, equal compute, runs that are not run again, and what is said of their spread."""

import json

import pytest
import yaml

from pyvlm.cli import main
from pyvlm.training import ablate as ablation
from pyvlm.training.ablate import Outcome, Run, ablate, conclude, format_markdown
from pyvlm.training.ablation_chart import Curve, draw_curves
from pyvlm.training.ablation_plan import Variant, connector_preset, parse_vary, plan_variants
from pyvlm.training.flops import StepCosts, total
from pyvlm.training.recipe import Recipe

# One look on the way and three questions: training is what is tested elsewhere.
QUICK = {
    "stages": {"one": {"steps": 4, "warmup": 2}, "two": {"steps": 2, "warmup": 0}},
    "evaluation": {"dialogues": 2, "quick_dialogues": 2},
}


def test_vary_is_a_key_and_yaml_values():
    given = ["mask=causal,mmca", "connector={type: resampler, queries: 4},linear", "seed=1,2"]
    assert parse_vary(given) == {
        "mask": ["causal", "mmca"],
        "connector": [{"type": "resampler", "queries": 4}, "linear"],
        "seed": [1, 2],
    }


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["mask"], "expected KEY=VALUE,VALUE"),
        (["mask="], "expected KEY=VALUE,VALUE"),
        (["=causal"], "expected KEY=VALUE,VALUE"),
        (["mask=[causal"], "are not YAML"),
        (["mask=causal,causal"], "name each key and each of its values once"),
        (["mask=causal", "mask=mmca"], "name each key and each of its values once"),
    ],
)
def test_a_vary_that_says_nothing(texts, said):
    with pytest.raises(ValueError, match=said):
        parse_vary(texts)


def test_all_combinations_and_their_recipes(small_recipe):
    vary = {
        "mask": ["causal", "mmca"],
        "tower": ["vit", "vit+conv"],
        "model.vision_towers.0.hidden_size": [16, 32],
        "stages.one.lr": [0.1],
    }
    variants = plan_variants(small_recipe(), vary)
    assert len(variants) == len({variant.name for variant in variants}) == 8
    assert len({variant.folder for variant in variants}) == 8
    last = variants[-1]
    assert last.name == "mask=mmca, tower=vit+conv, model.vision_towers.0.hidden_size=32, stages.one.lr=0.1"
    assert last.recipe.model.language.attention_rule == "mmca"
    assert [tower.name for tower in last.recipe.model.vision_towers] == ["vit", "conv"]
    assert last.recipe.model.vision_towers[0].hidden_size == 32
    assert last.recipe.stages["one"].lr == 0.1
    assert len(variants[0].recipe.model.vision_towers) == 1


@pytest.mark.parametrize("budget", [None, 4e8])
def test_compute_is_equal_to_half_a_step(small_recipe, budget):
    """The wide decoder gets fewer steps; of both stages, by one factor."""
    base = small_recipe(stages={"one": {"steps": 200, "warmup": 20}, "two": {"steps": 100}})
    vary = {"model.language.intermediate_size": [32, 512]}
    narrow, wide = plan_variants(base, vary, budget)
    wanted = narrow.flops if budget is None else budget
    for variant in (narrow, wide):
        assert abs(variant.flops - wanted) <= max(variant.step_flops) / 2
        one, two = variant.recipe.stages.values()
        assert one.steps == pytest.approx(2 * two.steps, abs=2.5)
        assert one.warmup == pytest.approx(one.steps / 10, abs=0.55)
        assert 7 <= variant.recipe.total_steps // variant.recipe.evaluation.every <= 8
    assert wide.recipe.total_steps < narrow.recipe.total_steps
    if budget is None:
        assert narrow.recipe.stages["one"].steps == 200


def test_flops_are_those_of_the_budget(small_recipe):
    (variant,) = plan_variants(small_recipe(), {"mask": ["causal"]})
    assert variant.flops_at(0) == 0
    assert variant.flops_at(3) == 3 * variant.step_flops[0]
    assert variant.flops_at(7) == 5 * variant.step_flops[0] + 2 * variant.step_flops[1]
    assert variant.flops == variant.flops_at(9)
    stage = variant.recipe.stages["one"]
    assert (
        total(StepCosts(variant.recipe.model, stage.train).one_image.values()).total < variant.step_flops[0]
    )


@pytest.mark.parametrize(
    ("vary", "budget", "said"),
    [
        ({"mask": ["casual"]}, None, "variant mask=casual is not a valid recipe.*attention_rule 'casual'"),
        ({"tower": ["sam"]}, None, "no tower 'sam'; it has vit, conv"),
        (
            {"stages.none.lr": [1]},
            None,
            "is not a valid recipe: stages.none.batch_size",
        ),
        ({"model.colour": [1]}, None, "model.colour is unknown"),
        ({"model.vision_towers.7.levels": [[0]]}, None, "there is no model.vision_towers.7 in the recipe"),
        ({"mask": ["causal"]}, 10.0, "a budget of 10 FLOPs is less than one step of each stage"),
    ],
)
def test_a_plan_that_does_not_fit(small_recipe, vary, budget, said):
    with pytest.raises(ValueError, match=said):
        plan_variants(small_recipe(), vary, budget)


def test_connectors_by_name_read_as_many_tokens_as_the_recipe_has(small_recipe):
    model = small_recipe().model
    assert connector_preset("linear", model) == "linear"
    assert connector_preset({"type": "qformer"}, model) == {"type": "qformer"}
    for name in ("resampler", "qformer", "sva"):
        preset = connector_preset(name, model)
        assert (preset["type"], preset["queries"], preset["num_heads"]) == (name, 4, 2)


@pytest.fixture
def quick_recipe(small_recipe):
    return small_recipe(**QUICK)


def test_runs_once_and_goes_on(tmp_path, quick_recipe, monkeypatch):
    """Cut off in the third of four runs; the same command trains that one and the last, and no other."""
    trained = []

    def train_until(limit):
        def train(recipe, folder, **options):
            if len(trained) == limit:
                raise KeyboardInterrupt
            trained.append(folder.name)
            return real_train(recipe, folder, **options)

        return train

    real_train = ablation.train
    vary, lines = {"mask": ["causal", "mmca"]}, []
    options = {"seeds": 2, "looks": 2, "progress": False, "tell": lines.append}
    monkeypatch.setattr(ablation, "train", train_until(2))
    with pytest.raises(KeyboardInterrupt):
        ablate(quick_recipe, vary, tmp_path, **options)
    partial = json.loads((tmp_path / "results.json").read_text())
    assert [len(variant["runs"]) for variant in partial] == [1, 1]

    monkeypatch.setattr(ablation, "train", train_until(99))
    outcomes = ablate(quick_recipe, vary, tmp_path, **options)
    assert len(trained) == len(set(trained)) == 4
    assert [[run.seed for run in outcome.runs] for outcome in outcomes] == [[0, 1], [0, 1]]
    again = ablate(quick_recipe, vary, tmp_path, **options)
    assert len(trained) == 4
    assert [outcome.runs for outcome in again] == [outcome.runs for outcome in outcomes]

    content = json.loads((tmp_path / "results.json").read_text())
    for variant, outcome in zip(content, outcomes, strict=True):
        assert variant["mean"] == pytest.approx(sum(run["accuracy"] for run in variant["runs"]) / 2)
        assert variant["flops"] == outcome.variant.flops
        assert [flops for flops, _ in variant["runs"][0]["curve"]] == [
            outcome.variant.flops_at(3),
            outcome.variant.flops_at(6),
        ]
    assert "| mask=causal |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert any("[4/4] mask=mmca, seed 1" in line for line in lines)

    with pytest.raises(ValueError, match="holds a run of another recipe"):
        ablate(quick_recipe, vary, tmp_path, budget=2 * outcomes[0].variant.flops, **options)


def outcome(name, *accuracies):
    return Outcome(
        Variant({"mask": name}, Recipe.model_validate(BARE), 10, [5]),
        [Run(seed, accuracy, 400, [(1, accuracy)]) for seed, accuracy in enumerate(accuracies)],
    )


BARE = {
    "name": "bare",
    "model": {
        "image": {"size": 8, "channels": 1},
        "vision_towers": [{"name": "conv", "type": "conv", "channels": [4], "blocks": [1]}],
        "fusion": {"hidden_size": 4},
        "language": {"hidden_size": 4, "num_layers": 1, "num_heads": 1, "intermediate_size": 4},
    },
    "stages": {"one": {"steps": 1, "batch_size": 1, "lr": 0.1}},
}


def test_what_lies_within_the_spread_is_said_to():
    best, close, worse = outcome("a", 0.8, 0.9), outcome("b", 0.7, 0.81), outcome("c", 0.5, 0.79)
    said = conclude([worse, close, best])
    assert said[0] == "Highest mean: mask=a."
    assert "not told apart: mask=b." in said[1]
    assert said[2].startswith("Below it with every seed: mask=c. Of two equal variants, 2 seeds each")
    assert "0.33 of all cases" in said[2]  # two of the six orders of four numbers
    assert conclude([best]) == []
    assert "no difference here can be told from chance" in conclude([outcome("a", 0.9), outcome("b", 0.1)])[0]


def test_the_table_has_mean_spread_and_cost():
    table = format_markdown([outcome("a", 0.8, 0.9), outcome("b", 0.5)])
    assert "| mask=a | 85.0% ± 7.1% | 80.0% to 90.0% | 2 | 10  | 5  | 1 | 5  |" in table
    assert "| mask=b | 50.0% | 50.0% to 50.0% | 1 |" in table
    assert "standard error of up to 2.5%" in table


def test_the_command(tmp_path, small_recipe, capsys):
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(small_recipe(**QUICK).model_dump(mode="json")))
    command = ["ablate", str(path), "--vary", "mask=causal,mmca", "--seeds", "1", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "One seed has no spread" in printed
    assert f"results: {out / 'results.md'}" in printed
    assert main([*command[:2], "--vary", "mask=none", "--out", str(out)]) == 2
    assert "variant mask=none is not a valid recipe" in capsys.readouterr().err


def test_variants_share_colours_and_kinds_of_line() -> None:
    """Two things varied: the first is told by the colour, the other by the line."""
    labels = [f"connector={a}, mask={b}" for a in ("linear", "resampler") for b in ("causal", "mmca")]
    figure = draw_curves(
        [Curve(label, [1e9, 2e9], [[0.1, 0.5], [0.2, 0.6]], 3e9, [0.5, 0.7]) for label in labels]
    )
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines if line.get_label() in labels}
    assert list(lines) == labels
    colours = [line.get_color() for line in lines.values()]
    kinds = [line.get_linestyle() for line in lines.values()]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
    figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1  # beside the curves

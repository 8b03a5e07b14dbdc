"""Which parameters learn, how fast, and when."""

import pytest
import torch
from torch import nn

from pyvlm.models.vlm import VLM
from pyvlm.training.optimization import check_parts, layer_scales, make_optimizer, rate_factor
from pyvlm.training.recipe import PARTS, Stage


def stage_of(**changes):
    return Stage(**({"steps": 10, "batch_size": 1, "lr": 1.0} | changes))


@pytest.mark.parametrize("names", [{"train": ["eyes"]}, {"layer_decay": {"eyes": 0.9}}])
def test_unknown_parts_are_named_with_the_known_ones(small_recipe, names):
    model = VLM(small_recipe().model)
    with pytest.raises(ValueError, match=r"stage 'two' names the part 'eyes'.*vision, fusion, connector"):
        check_parts(model, [("one", stage_of()), ("two", stage_of(**names))])


def test_a_piece_of_a_part_learns_alone(small_recipe):
    model = VLM(small_recipe().model)
    stage = stage_of(train=["vision.conv", "language.embeddings"])
    check_parts(model, [("one", stage)])
    groups = make_optimizer(model, stage).param_groups
    learn = {parameter for group in groups for parameter in group["params"]}
    assert learn == {*model.vision_towers["conv"].parameters(), model.language.embed_tokens.weight}
    assert {parameter for parameter in model.parameters() if parameter.requires_grad} == learn
    with pytest.raises(ValueError, match=r"stage 'one': part 'vision.eye' is unknown.*vision.conv"):
        check_parts(model, [("one", stage_of(train=["vision.eye"]))])


def test_what_one_stage_freezes_the_next_one_frees(small_recipe):
    model = VLM(small_recipe().model)
    for part in ("connector", "vision", "connector"):
        make_optimizer(model, stage_of(train=[part]))
        learn = {parameter for parameter in model.parameters() if parameter.requires_grad}
        assert learn == set(model.parts()[part])


def test_every_parameter_that_learns_is_in_one_group(small_recipe):
    model = VLM(small_recipe().model)
    stage = stage_of(train=["vision", "moe"], layer_decay={"vision": 0.5})
    groups = make_optimizer(model, stage).param_groups
    members = [id(parameter) for group in groups for parameter in group["params"]]
    parts = model.parts()
    assert len(set(members)) == len(members)
    assert set(members) == {id(parameter) for part in stage.train for parameter in parts[part]}
    for group in groups:
        matrices = [parameter.dim() >= 2 for parameter in group["params"]]
        assert set(matrices) == {group["weight_decay"] > 0}
    assert [p.requires_grad for p in parts["language"]] == [False] * len(parts["language"])
    assert all(p.requires_grad for p in parts["moe"])


def test_adamw_has_the_moments_and_the_eps_of_the_stage(small_recipe):
    model = VLM(small_recipe().model)
    for stage in (stage_of(betas=(0.8, 0.9), eps=1e-3), stage_of()):
        for group in make_optimizer(model, stage).param_groups:
            assert (group["betas"], group["eps"]) == (stage.betas, stage.eps)
    assert stage_of().eps == 1e-8


def test_rates_decay_from_layer_to_layer(small_recipe):
    tower = {"num_layers": 3, "levels": [-1]}
    recipe = small_recipe()
    towers = [recipe.model.vision_towers[0].model_dump() | tower, recipe.model.vision_towers[1].model_dump()]
    model = VLM(small_recipe(model={"vision_towers": towers}).model)
    scales = layer_scales(model, stage_of(layer_decay={"vision": 0.5, "language": 0.1}))
    vit = model.vision_towers["vit"]
    assert scales[vit.position] == scales[vit.patch_embed.weight] == 0.5**4
    assert [scales[block.mlp[0].weight] for block in vit.blocks] == [0.5**3, 0.5**2, 0.5]
    conv = model.vision_towers["conv"]  # a stack of its own, of one layer
    assert scales[conv.stem.weight] == 0.5**2
    language = model.language
    assert scales[language.embed_tokens.weight] == pytest.approx(0.1**3)
    assert [scales[layer.attention.o_proj.weight] for layer in language.layers] == pytest.approx([0.01, 0.1])
    assert scales[language.norm.weight] == 1.0
    others = set(scales) - {*vit.parameters(), *conv.parameters(), *language.parameters()}
    assert not others
    assert not any(parameter in scales for parameter in model.parts()["moe"])


def test_a_stack_without_layers_has_no_scales():
    from pyvlm.training.optimization import _depths

    depths, top = _depths(nn.Linear(2, 2))
    assert set(depths.values()) == {0}
    assert top == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "linear"}, [1.0, 0.9, 0.8, 0.7]),
        ({"schedule": "constant", "final_lr": 0.5}, [1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "final_lr": 0.5}, [1.0, 0.95, 0.9, 0.85]),
        ({"schedule": "linear", "warmup": 2}, [0.5, 1.0, 1.0, 0.875]),
        ({"schedule": "linear", "warmup": 0.11}, [0.5, 1.0, 1.0, 0.875]),  # 1.1 steps: 2
    ],
)
def test_schedules(changes, expected):
    stage = stage_of(**changes)
    assert [rate_factor(stage, step, 10) for step in range(4)] == pytest.approx(expected)


def test_epochs_are_counted_in_steps():
    stage = Stage(epochs=1.5, batch_size=4, lr=1.0)
    assert stage.count_steps(10) == 4  # 15 samples
    with pytest.raises(ValueError, match="no end; give steps, or samples"):
        stage.count_steps(None)


def test_one_step_of_each_group_follows_its_scale(small_recipe):
    """The first step of AdamW without decay moves every weight by its rate."""
    from pyvlm.training.optimization import set_learning_rate

    model = VLM(small_recipe().model)
    rates = dict.fromkeys(PARTS, 1e-3) | {"vision": 2e-3}
    stage = stage_of(lr=rates, layer_decay={"vision": 0.5}, weight_decay=0.0, schedule="constant")
    optimizer = make_optimizer(model, stage)
    set_learning_rate(optimizer, stage, 0, 10)
    vit = model.vision_towers["vit"]
    watched = {
        vit.position: 2e-3 * 0.25,
        vit.blocks[0].mlp[0].weight: 2e-3 * 0.5,
        model.language.norm.weight: 1e-3,
    }
    before = {parameter: parameter.detach().clone() for parameter in watched}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, rate in watched.items():
        torch.testing.assert_close(before[parameter] - parameter.detach(), torch.full_like(parameter, rate))

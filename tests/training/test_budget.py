"""`pyvlm budget`: counts against torch's own counter on the real model, pair by pair, and by hand."""

import json
import math
import re

import numpy as np
import pytest
import torch
from models.tiny_vlm import IMAGE_ID, batch, pictures, tiny_config, tiny_vlm, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyvlm.cli import main
from pyvlm.layout import TokenLayout
from pyvlm.models import VLMConfig
from pyvlm.models.vlm import VLM
from pyvlm.training.budget import make_budget
from pyvlm.training.budget_table import align, format_budget, human
from pyvlm.training.flops import StepCosts, Workload, expected_slots, moe_layers, skeleton, total
from pyvlm.training.recipe import load_recipe

PARTS = ["vision", "fusion", "connector", "language", "moe"]


def linear_flops(x, weight, *_, out_shape=None, **__):
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def linear_backward_flops(grad, x, weight, needs, *_, out_shape=None, **__):
    return sum(needs[:2]) * linear_flops(x, weight)


# The projectors' own op; all others run as plain torch under backend "reference".
OWN_OPS = {
    torch.ops.pyvlm.linear: linear_flops,
    torch.ops.pyvlm.linear_backward: linear_backward_flops,
}


def tiny_batch(**more):
    """Two rows of different lengths with three images, labels on some of the text."""
    torch.manual_seed(0)
    ids, mask = batch(tokens(1, "image", 7, "image", 5), tokens(2, "image", 9), side="right")
    labels = ids.clone()
    labels[:, :6] = -100
    labels[(ids == IMAGE_ID) | (mask == 0)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": pictures(3, torch.float32)}


def freeze(model, train):
    for part, parameters in model.parts().items():
        for parameter in parameters:
            parameter.requires_grad_(part in train)


def count(run):
    with FlopCounterMode(display=False, custom_mapping=OWN_OPS) as counter:
        result = run()
    return result, counter


# All; the first and second stage of LLaVA; what lies at the bottom, in the middle and at the top alone.
LEARNING = [PARTS, ["connector"], ["connector", "language"], ["vision"], ["fusion"], ["moe"], ["language"]]
DENSE = {"attention_rule": "causal", "tie_embeddings": False, "moe": None}


@pytest.mark.parametrize(
    ("train", "language"), [*((train, {}) for train in LEARNING), (PARTS, DENSE), (["connector"], DENSE)]
)
def test_a_step_is_what_torch_counts(train, language):
    """Every product exactly; but of attention torch computes all pairs, not those of the rule alone."""
    model = tiny_vlm(torch.float32, "reference", **language).train()
    given = tiny_batch()
    freeze(model, train)
    workload = Workload.of_batch(model.config, given)
    walked = StepCosts(model.config, train).of(workload)
    loss, forward = count(lambda: model(**given).loss)
    _, backward = count(loss.backward)

    everything = total(walked.values())
    config = model.config.language
    pairs = workload.tokens * workload.layout.length * config.num_layers
    dense = 4 * pairs * config.num_heads * config.head_size
    of_attention = walked["attention"]
    assert forward.get_total_flops() == everything.forward - of_attention.forward + dense
    # Through the layers above the lowest that learns: experts are in the second of three.
    layers = 1 if train == ["moe"] else 3
    assert of_attention.backward == 2 * of_attention.forward * layers // 3
    assert backward.get_total_flops() == everything.backward - of_attention.backward + 2 * dense * layers // 3

    of_module = {name: sum(ops.values()) for name, ops in forward.get_flop_counts().items()}
    for name in model.vision_towers:
        assert walked[f"vision.{name}"].forward == of_module[f"VLM.vision_towers.{name}"]
    assert walked["fusion"].forward == of_module["VLM.fusion"]
    assert walked["connector"].forward == of_module["VLM.connector"]
    inside = sum(walked[name].forward for name in ("projections", "mlp", "experts") if name in walked)
    assert inside + dense == of_module["VLM.language"]


ENCODERS = {
    "clip": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
    "siglip": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
    "dinov2": {"model_type": "dinov2", "image_size": 28, "patch_size": 7, "mlp_ratio": 2},
    "convnext": {
        "model_type": "convnext",
        "image_size": 64,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1] * 4,
    },
    "layoutlmv3": {
        "model_type": "layoutlmv3",
        "input_size": 32,
        "patch_size": 8,
        "coordinate_size": 4,
        "shape_size": 8,
    },
}
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def with_encoder(name):
    encoder = ENCODERS[name] | ({} if name == "convnext" else VIT)
    tower = {"type": "transformers", "name": name, "encoder": encoder}
    config = tiny_config().model_dump() | {"image": {"size": 32, "channels": 3}, "vision_towers": [tower]}
    return VLMConfig.model_validate(config | {"fusion": {}})


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_transformers_are_what_torch_counts(name):
    config = with_encoder(name)
    model = VLM(config, "reference").train()
    freeze(model, PARTS)
    images = torch.randn(5, 3, 32, 32)
    costs = StepCosts(config).of(Workload(TokenLayout(torch.ones(1, 1, dtype=torch.uint8)), 1, len(images)))
    with sdpa_kernel(SDPBackend.MATH):  # of the fused one on CPU torch has no formula
        features, forward = count(lambda: model.vision_towers[name](images)[0])
        _, backward = count(features.sum().backward)
    assert costs[f"vision.{name}"].forward == forward.get_total_flops()
    if name != "convnext":  # torch's formula for the gradient of depthwise convolutions forgets their groups
        assert costs[f"vision.{name}"].backward == backward.get_total_flops()


def test_a_depthwise_convolution_costs_twice_its_forward():
    cost = StepCosts(with_encoder("convnext")).one_image["vision.convnext"]
    stem = 2 * 16 * 16 * 8 * 3 * 4 * 4  # whose pixels need no gradient; its image is resized to 64
    assert cost.backward == 2 * cost.forward - stem


@pytest.mark.parametrize("language", [{}, {"moe": None, "attention_rule": "causal"}])
@pytest.mark.parametrize("train", [PARTS, ["connector"]])
def test_activations_are_what_autograd_keeps(train, language):
    """Of the decoder, to the number where it has no experts, and to 1 % where routings come on top."""
    model = tiny_vlm(torch.float32, **language).train()
    freeze(model, train)
    workload = Workload.of_batch(model.config, tiny_batch())
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage._cdata not in known:
            known.add(storage._cdata)
            kept.append(tensor)
        return tensor

    embeds = torch.randn(*workload.layout.kind.shape, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.language(embeds, workload.layout)
    elements = sum(x.untyped_storage().nbytes() // x.element_size() for x in kept)
    walk = StepCosts(model.config, train).walk(workload)
    predicted = total(walk.costs.values()).saved - workload.tokens * 16  # the head's input
    assert predicted == pytest.approx(elements, rel=0.01 if model.config.language.moe else 0)


# Expert choice with an image of 4 tokens on 3 experts, token choice for all, and with a capacity of one each.
@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"image_router": "token_choice", "top_k": 1},
        {"image_router": "token_choice", "image_experts": 1, "top_k": 1},
        {"capacity_factor": 2.5},
    ],
)
def test_slots_are_those_of_the_routers(moe):
    options = {"layers": [1], "num_experts": 3, "intermediate_size": 8} | moe
    model = tiny_vlm(torch.float32, moe=options).train()
    given = tiny_batch()
    output = model(**given)
    workload = Workload.of_batch(model.config, given)
    (layer,) = moe_layers(model)
    assert (
        sum(expected_slots(layer.options, workload.layout).values()) == output.moe_stats[0].dispatched.sum()
    )


def test_parameters_are_those_of_the_model(small_recipe):
    recipe = small_recipe()
    budget = make_budget(recipe, rate=1e9)
    model = VLM(recipe.model)
    parts = {name: sum(p.numel() for p in parameters) for name, parameters in model.parts().items()}
    held = {name: part.total for name, part in budget.parameters.items()}
    assert sum(held.values()) == sum(p.numel() for p in model.parameters()) == budget.total_parameters
    assert held["vision.vit"] + held["vision.conv"] == parts["vision"]
    assert all(held[name] == parts[name] for name in ("fusion", "connector", "language", "moe"))
    moe = recipe.model.language.moe
    experts = parts["moe"] - 16 * moe.num_experts
    # Two of two experts for text, and one on average for a token of an image.
    assert budget.parameters["moe"].text_token == parts["moe"]
    assert budget.parameters["moe"].image_token == 16 * moe.num_experts + experts / 2


def test_shown_is_the_model_that_the_last_stage_leaves():
    """Experts made of MLPs on the way: all of them take memory, and a token passes some."""
    recipe = load_recipe("moe-llava", "tiny")
    budget = make_budget(recipe, rate=1e9)
    assert recipe.model.language.moe is None
    (upcycled,) = [stage.upcycle for stage in recipe.stages.values() if stage.upcycle is not None]
    experts = budget.parameters["moe"]
    assert upcycled.num_experts == 4
    assert experts.total / 2 < experts.text_token < experts.total * 0.51  # two of four, and the routers
    assert budget.total_parameters == budget.stages[-1].memory[0].weights // 4
    assert budget.forward["experts"].forward > 0
    assert "the model as the last stage leaves it" in format_budget(budget)
    assert "as the last stage" not in format_budget(make_budget(load_recipe("llava-1.5", "tiny"), rate=1e9))


def test_stages_of_unknown_length_have_costs_a_step_alone(capsys):
    assert main(["budget", "deepspeed-visualchat", "--flops-per-second", "1e12"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^steps +\?$", printed, re.MULTILINE)
    assert "all stages" not in printed
    hint = "--set stages.chat.samples=1280"
    assert hint.split("=")[0] in printed
    assert main(["budget", "deepspeed-visualchat", "--flops-per-second", "1e12", *hint.split()]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^steps +60$", printed, re.MULTILINE)  # 6 epochs in batches of 128
    assert "all stages" in printed


def test_frozen_parts_take_no_gradient_and_no_moments(small_recipe):
    recipe = small_recipe(stages={"one": {"train": ["connector"]}})
    one, two = make_budget(recipe, rate=1e9).stages
    connector = sum(p.numel() for p in skeleton(recipe.model).parts()["connector"])
    everything = sum(p.numel() for p in skeleton(recipe.model).parameters())
    assert one.trainable == connector
    assert [m.total for m in one.memory] == [
        4 * (everything + 3 * connector),
        2 * (everything + 3 * connector),
    ]
    assert [m.total for m in two.memory] == [16 * everything, 8 * everything]
    assert one.step["vision.vit"].backward == one.step["fusion"].backward == 0
    assert one.step["mlp"].backward == one.step["mlp"].forward
    assert two.step["mlp"].backward == 2 * two.step["mlp"].forward
    assert one.activations.plain < two.activations.plain
    assert two.activations.checkpointed < two.activations.plain


def test_hours_and_price_follow_from_the_rate(small_recipe):
    budget = make_budget(small_recipe(), rate=1e6, price_per_hour=3.0)
    for stage in budget.stages:
        assert stage.flops == stage.steps * total(stage.step.values()).total
        assert stage.hours == pytest.approx(stage.flops / 1e6 / 3600)
        assert stage.price == pytest.approx(3 * stage.hours)


def test_given_rows_are_those_of_the_stages(small_recipe):
    budget = make_budget(small_recipe(), length=40, images=2, rate=1e9)
    assert [(stage.tokens, stage.images) for stage in budget.stages] == [(160, 8)] * 2
    own = make_budget(small_recipe(), rate=1e9)
    assert own.stages[0].images >= 8  # two to four an dialogue, of which there are four
    with pytest.raises(ValueError, match="length 9 has no room for 2 images of 4 tokens"):
        make_budget(small_recipe(), length=9, images=2, rate=1e9)


def test_accumulation_changes_what_is_kept_and_not_what_is_learned(small_recipe):
    at_once, in_two = (
        make_budget(small_recipe(stages={"one": {"accumulation": n}}), length=40, images=1, rate=1e9).stages[
            0
        ]
        for n in (1, 2)
    )
    assert in_two.activations.plain < at_once.activations.plain
    assert in_two.tokens == at_once.tokens
    assert in_two.step["mlp"].total == at_once.step["mlp"].total


def test_decoding_reads_weights_once_and_its_cache(small_recipe):
    budget = make_budget(small_recipe(model={"language": {"moe": None}}), length=40, images=0, rate=1e9)
    language = skeleton(small_recipe(model={"language": {"moe": None}}).model).language
    matrices = sum(p.numel() for p in language.layers.parameters() if p.dim() == 2)
    head = language.head_weight.numel()
    assert budget.decoding.flops == 2 * (matrices + head) + 4 * 41 * 16 * 2
    assert budget.decoding.cache_bytes == 4 * 2 * 41 * 16 * 2
    assert budget.cache_bytes == 4 * 2 * 40 * 16 * 2


def test_no_such_part():
    with pytest.raises(ValueError, match="no part 'visoin' to train; it has vision, fusion"):
        StepCosts(tiny_config(), ["visoin"])


def test_human_and_align():
    shown = [human(x) for x in (0, 7, 999, 999.6, 1234, 6_740_000_000, 4.2e18, 3e21, 0.5)]
    assert shown == ["0 ", "7 ", "999 ", "1 K", "1.23 K", "6.74 G", "4.2 E", "3e+03 E", "0.5 "]
    assert align([("a", "bb"), ("ccc", "1")]) == "a    bb\n-------\nccc   1"


def test_the_table_and_the_json_agree(tmp_path, capsys):
    path = tmp_path / "budget.json"
    arguments = [
        "budget",
        "demo",
        "--variant",
        "quick",
        "--flops-per-second",
        "1e10",
        "--price-per-hour",
        "2",
    ]
    assert main([*arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(path.read_text())
    recipe = load_recipe("demo", "quick")
    assert content["total_parameters"] == sum(p.numel() for p in VLM(recipe.model).parameters())
    assert [stage["name"] for stage in content["stages"]] == ["read", "talk", "settle"]
    flops = sum(stage["flops"] for stage in content["stages"])
    assert f"all stages: {human(flops)}FLOPs" in printed
    assert re.search(r"^vision\.vit +\d", printed, re.MULTILINE)
    assert "pairs of query and key" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["demo", "--length", "3"], "length 3 has no room for 1 images"),
        (["demo", "--json", "no/folder/x.json"], "there is no folder no/folder"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    assert main(["budget", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_rate_is_what_utilisation_is_measured_against(small_recipe, monkeypatch):
    asked = []
    monkeypatch.setattr("pyvlm.training.budget.measured_limit", lambda *given: asked.append(given) or 5e9)
    made = make_budget(small_recipe(precision="bf16"))
    assert made.rate == 5e9
    assert made.rate_source == "torch.mm in bf16, measured here"
    assert [precision for _, precision in asked] == ["bf16"]


def test_a_rate_is_a_number_above_zero(capsys):
    with pytest.raises(SystemExit):
        main(["budget", "demo", "--flops-per-second", "fast"])
    assert "expected a number above 0, got 'fast'" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(480, 640), (100, 300), (64, 64), (31, 90)])
def test_tiled_images_are_counted_by_their_size(size):
    recipe = load_recipe("llava-1.6", "tiny")
    processor = recipe.processor()
    picture = np.zeros((*size, 3), dtype=np.uint8)
    sample = processor.encode([{"role": "user", "content": [{"type": "image", "image": picture}]}])
    real = Workload.of_batch(recipe.model, processor.collate([sample]))
    assumed = Workload.of_shape(recipe.model, 2, 200, 1, size)
    assert assumed.image_tokens == 2 * real.image_tokens
    assert assumed.images == 2 * real.images
    budget = make_budget(recipe, rate=1e12, image_size=size)
    assert (budget.tokens_per_image, budget.maps_per_image) == (real.image_tokens, real.images)
    assert budget.length == real.image_tokens + 1 + 128
    costs = StepCosts(recipe.model)
    assert budget.forward["vision.clip"].forward == costs.of(real)["vision.clip"].forward


def test_the_assumed_size_is_told_and_reaches_stages_of_files(capsys):
    few_layers = ["model.language.num_layers=1", "model.vision_towers.0.encoder.num_hidden_layers=2"]
    settings = [argument for setting in few_layers for argument in ("--set", setting)]
    assert main(["budget", "llava-1.6", "--flops-per-second", "1e15", *settings]) == 0
    head = capsys.readouterr().out.splitlines()[1]
    assert "taken to be 480 pixels high and 640 wide, which makes 5 maps of it" in head
    recipe = load_recipe("llava-1.6", settings=few_layers)
    small, large = (make_budget(recipe, rate=1e15, image_size=size) for size in ((336, 1008), (672, 672)))
    assert (small.maps_per_image, large.maps_per_image) == (4, 5)
    assert small.stages[0].images == 256 * 4
    assert small.stages[0].tokens < large.stages[0].tokens
    assert main(["budget", "llava-1.5", "--tiny", "--image-size", "480x640"]) == 2
    assert "every image is made 32 by 32 pixels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["budget", "llava-1.6", "--image-size", "480"])
    assert "such as 480x640, got '480'" in capsys.readouterr().err

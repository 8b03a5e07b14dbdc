"""Connectors that read image features into tokens of their own, in whole models and alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_vlm_forward import labelled
from tiny_vlm import IMAGE_ID, batch, pictures, tiny_config, tokens
from tolerance import assert_conforms

from pyvlm.models import VLM, VLMConfig
from pyvlm.models.inputs import default_layout
from pyvlm.models.language import slice_layout
from pyvlm.nn import LocalCrossAttention, SpatialVisionAggregator

RULES = ["causal", "mmca", "bidirectional_image"]
# All take four tokens an image, as `tokens` writes them; the towers' maps are of 2 × 2 and 4 × 4.
CONNECTORS: dict[str, dict[str, Any]] = {
    "resampler": {"connector": {"type": "resampler", "queries": 4, "num_heads": 2}},
    "resampler of a finer map": {
        "connector": {"type": "resampler", "queries": 4, "num_heads": 2},
        "fusion": {"hidden_size": 10, "grid": 3},
    },
    "qformer": {"connector": {"type": "qformer", "queries": 4, "hidden_dim": 8, "num_heads": 2}},
    "qformer of a sequence": {
        "connector": {"type": "qformer", "queries": 4, "hidden_dim": 8, "num_heads": 2},
        "fusion": {"method": "sequence", "hidden_size": 6},
    },
    "sva": {
        "connector": {"type": "sva", "queries": 4, "hidden_dim": 8, "num_heads": 2, "num_layers": 2},
        "fusion": {},
    },
    "sva, resized and separate": {
        "connector": {
            "type": "sva",
            "queries": 4,
            "hidden_dim": 8,
            "num_heads": 2,
            "windows": [2, 3],
            "separate": True,
        },
        "fusion": {},
    },
}


def config_of(name: str, **language: Any) -> VLMConfig:
    return VLMConfig.model_validate(tiny_config(**language).model_dump() | CONNECTORS[name])


def model_of(name: str, backend: str | None = None, **language: Any) -> VLM:
    """In float64, with weights so large that rows differ."""
    torch.manual_seed(7)
    model = VLM(config_of(name, **language), backend).double().eval()
    with torch.no_grad():
        for part in (model.language, model.connector):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)
    return model


def with_one_tower(name: str) -> VLM:
    config = config_of(name).model_dump()
    if config["connector"].get("windows"):
        config["connector"]["windows"] = [2]
    return VLM(VLMConfig.model_validate(config | {"vision_towers": config["vision_towers"][1:]}))


@pytest.mark.parametrize("name", CONNECTORS)
def test_shapes_and_grids(name: str) -> None:
    model = model_of(name)
    assert model.config.tokens_per_image == 4
    assert model.config.token_grids == (((1, 4),) if "qformer" in name else ((2, 2),))
    images = pictures(3)
    features = model.image_features(images)
    assert features.shape == (3, 4, 16)
    assert_conforms(features[1:2], model.image_features(images[1:2]))
    assert not torch.isclose(features[0], features[1]).all(1).any()
    assert with_one_tower(name).image_features(pictures(2, torch.float32)).shape == (2, 4, 16)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CONNECTORS)
def test_gradients_reach_every_parameter_and_backends_agree(name: str, rule: str) -> None:
    input_ids, real = batch(tokens(2, "image", 9), tokens(1, "image", "image", 6))
    images, labels = pictures(3), labelled(input_ids, real)
    results = []
    for backend in ("auto", "reference"):
        model = model_of(name, backend, attention_rule=rule, tie_embeddings=False).train()
        loss = model(input_ids, images, real, labels).loss
        loss.backward()
        dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert dead == []
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for auto, reference in zip(*results, strict=True):
        assert_conforms(auto, reference, gradient=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CONNECTORS)
def test_generation_equals_the_full_pass(name: str, rule: str) -> None:
    model = model_of(name, attention_rule=rule)
    input_ids, real = batch(tokens(2, "image", 3, "image", 2), tokens(1, "image"), tokens(3))
    images = pictures(3)
    answer = model.generate(input_ids, images, real, max_new_tokens=3)
    whole = torch.cat([input_ids, answer], dim=1)
    layout = default_layout(model.config, whole, torch.cat([real, torch.ones_like(answer)], dim=1))
    logits = model(whole, images, layout=layout).logits[:, input_ids.shape[1] - 1 : -1]
    logits[..., IMAGE_ID] = -torch.inf
    assert torch.equal(logits.argmax(-1), answer)
    # The cache holds the same rows as the full pass.
    cache = model.new_cache(whole.shape[1])
    start = input_ids.shape[1]
    model(input_ids, images, layout=slice_layout(layout, 0, start), cache=cache)
    last = model(whole[:, start:], layout=layout, cache=cache).logits[:, -1]
    assert_conforms(last, model(whole, images, layout=layout).logits[:, -1])


@pytest.mark.parametrize("name", CONNECTORS)
def test_saved_and_reloaded(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path / "model")
    again = VLM.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in ours.items())
    input_ids, real = batch(tokens(2, "image", 3), tokens(4))
    images = pictures(1)
    # Not bit by bit: sums may depend on how memory is aligned, and the file's is another.
    assert_conforms(again(input_ids, images, real).logits, model(input_ids, images, real).logits)


def test_the_numbers_reach_the_modules() -> None:
    sva = {"type": "sva", "queries": 4, "hidden_dim": 12, "num_heads": 3, "num_layers": 1, "separate": True}
    config = config_of("sva").model_dump()
    aggregators = [
        VLM(VLMConfig.model_validate(config | {"connector": sva | windows})).connector[0]
        for windows in ({}, {"windows": [3, 1]})
    ]
    assert [a.targets for a in aggregators] == [[(2, 2), (4, 4)], [(6, 6), (2, 2)]]
    assert [a.layers[0].window_sides for a in aggregators] == [(1, 2), (3, 1)]
    assert (len(aggregators[0].layers), aggregators[0].layers[0].num_heads) == (1, 3)
    assert aggregators[0].layers[0].separate

    options = {"hidden_dim": 12, "num_layers": 3, "num_heads": 3, "intermediate_dim": 7}
    options |= {"cross_attention_frequency": 3, "type": "qformer", "queries": 5}
    qformer, projection = VLM(VLMConfig.model_validate(config | {"connector": options})).connector
    assert qformer.queries.shape == (5, 12)
    assert [layer.cross_attention is None for layer in qformer.layers] == [False, True, True]
    assert qformer.layers[0].mlp[0].out_features == 7
    assert qformer.layers[0].attention.num_heads == 3
    assert projection.weight.shape == (16, 12)


def test_parts_hold_the_connector_once() -> None:
    for name in CONNECTORS:
        model = model_of(name)
        ids = [id(p) for parameters in model.parts().values() for p in parameters]
        assert len(ids) == len(set(ids)) == len(list(model.parameters()))
        assert len(model.parts()["connector"]) == len(list(model.connector.parameters()))


@pytest.mark.parametrize("name", ["resampler of a finer map", "sva"])
def test_grids_of_queries_have_rows_for_position_schemes(name: str) -> None:
    config = config_of(name).model_dump() | {"position_scheme": "share-by-row-and-column"}
    model = VLM(VLMConfig.model_validate(config))
    assert model.column_embedding.num_embeddings == 2
    row = torch.tensor([tokens(1, "image", 2)])
    assert model(row, pictures(1, torch.float32)).logits.shape == (1, 7, 23)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("resampler", {"connector": {"type": "resampler", "queries": 5}}, "must be a square, such as 4 or 9"),
        (
            "resampler",
            {"connector": {"type": "resampler", "queries": 4, "num_heads": 3}},
            "hidden_size 16 of the language model must be a multiple of 4 and of num_heads 3",
        ),
        (
            "resampler",
            {"fusion": {"method": "sequence", "hidden_size": 6}},
            "expected fusion.method \"channel_concat\", got 'sequence'",
        ),
        ("qformer", {"connector": {"type": "qformer", "hidden_dim": 8}}, "num_heads 12 does not divide"),
        ("qformer", {"position_scheme": "share-by-row"}, "queries of a Q-Former have none"),
        ("sva", {"fusion": {"hidden_size": 6}}, "leave out fusion.hidden_size"),
        ("sva", {"fusion": {"method": "qformer", "hidden_size": 6}}, "leave out fusion.hidden_size"),
        ("sva", {"connector": {"type": "sva", "windows": [1]}}, "1 windows for 2 towers; give one a tower"),
        ("sva", {"connector": {"type": "sva", "hidden_dim": 40}}, "num_heads 16 does not divide"),
        ("sva", {"connector": {"type": "sva", "querys": 4}}, "connector.sva.querys"),
        ("sva", {"connector": {"type": "svd"}}, "expected a projector's name, or a mapping whose type is"),
        ("sva", {"connector": {"queries": 4}}, "expected a projector's name, or a mapping whose type is"),
        ("sva", {"connector": "mlp"}, "'linear', 'linear_layernorm', 'mlp2x_gelu'"),
        ("sva", {"connector": 3}, "'linear', 'linear_layernorm', 'mlp2x_gelu'"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VLMConfig.model_validate(config_of(name).model_dump() | changes)


def test_the_full_size_follows_from_few_words() -> None:
    """Qwen-VL's: 32 × 32 patches of 1664 channels read into 256 tokens of 4096."""
    config = tiny_config(hidden_size=4096, num_heads=32, num_kv_heads=32, head_dim=None).model_dump()
    config |= {"connector": {"type": "resampler"}, "fusion": {"hidden_size": 1664, "grid": 32}}
    config = VLMConfig.model_validate(config)
    assert config.tokens_per_image == 256
    with torch.device("meta"):
        resampler = VLM(config).connector[0]
    assert resampler.attn.num_heads == 32
    assert resampler.kv_proj.weight.shape == (4096, 1664)


def aggregator(**options: Any) -> SpatialVisionAggregator:
    return SpatialVisionAggregator(
        [3, 5], [(2, 2), (6, 6)], (2, 2), [1, 3], hidden_dim=8, num_heads=2, **options
    ).double()


@pytest.mark.parametrize("separate", [False, True])
def test_a_query_sees_its_own_window_of_each_map(separate: bool) -> None:
    module = aggregator(separate=separate)
    maps = [torch.randn(1, 4, 3).double(), torch.randn(1, 36, 5).double()]
    before = module(maps)
    for cell, query in ((0, 0), (5, 1), (2 * 6 + 2, 0), (3 * 6 + 2, 2), (35, 3)):
        changed = maps[1].clone()
        changed[:, cell] += 1
        differs = (module([maps[0], changed]) - before).abs().amax(-1)[0] > 1e-9
        assert differs.nonzero().flatten().tolist() == [query]


def test_one_layer_is_local_cross_attention_with_the_first_maps_mean_as_context() -> None:
    module = aggregator(num_layers=1)
    maps = [torch.randn(2, 4, 3).double(), torch.randn(2, 36, 5).double()]
    projected = [project(x) for project, x in zip(module.projections, maps, strict=True)]
    layer = module.layers[0]
    assert isinstance(layer, LocalCrossAttention)
    context = projected[0].mean(1)[:, None].repeat(1, 4, 1)
    expected = layer(module.query.repeat(2, 4, 1), context, projected, (2, 2))
    assert_conforms(module(maps), expected)


def test_maps_are_resized_to_whole_windows() -> None:
    """A map of 4 × 4 for windows of 3 on a 2 × 2 grid is read as bilinear interpolation makes it 6 × 6."""
    torch.manual_seed(1)
    fine = SpatialVisionAggregator([3], [(6, 6)], (2, 2), [3], 8, 1, 2).double()
    coarse = SpatialVisionAggregator([3], [(4, 4)], (2, 2), [3], 8, 1, 2).double()
    coarse.load_state_dict(fine.state_dict())
    x = torch.randn(1, 16, 3).double()
    grid = x.transpose(1, 2).unflatten(2, (4, 4))
    resized = torch.nn.functional.interpolate(grid, (6, 6), mode="bilinear").flatten(2).transpose(1, 2)
    assert_conforms(coarse([x]), fine([resized]))


def test_wrong_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 maps, expected 2"):
        aggregator()([torch.randn(1, 4, 3).double()])
    with pytest.raises(ValueError, match="2 channels, 1 grids and 1 window_sides; give one an encoder"):
        SpatialVisionAggregator([3, 4], [(2, 2)], (2, 2), [1])

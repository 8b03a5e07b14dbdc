"""Q-Former fusion: BLIP-2's Q-Former bit by bit, one an expert, its tokens in the experts' order."""

from typing import Any

import pytest
import torch
from tolerance import assert_conforms
from torch import Tensor, nn

from pyvlm.models import VLM, VLMConfig
from pyvlm.nn import FeatureFusion, QFormer, QFormerFusion

VIT = {"channels": 4, "grid": (2, 3), "queries": 2}
CNN = {"channels": 6, "grid": (4, 5), "queries": 3}
SMALL = {"hidden_dim": 8, "num_layers": 3, "num_heads": 2, "intermediate_dim": 12}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def randomize(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def features(images: int = 2) -> dict[str, list[Tensor]]:
    return {"vit": [randn(images, 6, 4)], "cnn": [randn(images, 20, 6)]}


def blip2_name(name: str) -> str:
    """The name of a weight of `QFormer` in transformers' Blip2QFormerModel."""
    if name.startswith("norm."):
        return f"layernorm.{name.removeprefix('norm.')}"
    _, layer, *rest = name.split(".")
    path = ".".join(rest)
    for mine, theirs in (
        ("cross_attention.out", "crossattention.output.dense"),
        ("cross_attention.norm", "crossattention.output.LayerNorm"),
        ("cross_attention.", "crossattention.attention."),
        ("attention.out", "attention.output.dense"),
        ("attention.norm", "attention.output.LayerNorm"),
        ("attention.", "attention.attention."),
        ("mlp.0", "intermediate_query.dense"),
        ("mlp.2", "output_query.dense"),
        ("norm", "output_query.LayerNorm"),
    ):
        if path.startswith(mine):
            return f"encoder.layer.{layer}.{theirs}{path.removeprefix(mine)}"
    raise AssertionError(name)


def test_it_is_the_q_former_of_blip2() -> None:
    transformers = pytest.importorskip("transformers")
    original = transformers.Blip2QFormerModel(
        transformers.Blip2QFormerConfig(
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=12,
            encoder_hidden_size=6,
            use_qformer_text_input=False,
        )
    )
    randomize(original.eval())
    mine = randomize(QFormer(5, 8, 6, 3, 2, 12))
    weights = original.state_dict()
    names = {name: blip2_name(name) for name in mine.state_dict() if name != "queries"}
    assert set(names.values()) == set(weights)
    mine.load_state_dict({"queries": mine.queries.data} | {name: weights[of] for name, of in names.items()})
    image_map = randn(2, 7, 6)
    expected = original(mine.queries.expand(2, -1, -1), encoder_hidden_states=image_map).last_hidden_state
    assert_conforms(mine(image_map), expected)


def test_each_expert_has_its_queries_and_its_place() -> None:
    fusion = randomize(FeatureFusion({"vit": VIT, "cnn": CNN}, 7, method="qformer", qformer=SMALL))
    given = features()
    tokens = fusion(given)
    assert tokens.shape == (2, fusion.num_tokens, fusion.out_dim) == (2, 5, 7)
    own = fusion.to_tokens.experts
    each = [own[0](given["vit"][0]), own[1](given["cnn"][0])]
    assert_conforms(tokens, fusion.to_tokens.projection(torch.cat(each, dim=1)))

    given["cnn"] = [x + 1 for x in given["cnn"]]
    assert (fusion(given) != tokens).any(-1).any(0).tolist() == [False] * 2 + [True] * 3
    tokens.square().sum().backward()
    # A key's bias adds the same to all scores of a query, and so has no gradient but rounding.
    dead = [name for name, p in fusion.named_parameters() if not p.grad.abs().max() > 1e-9]
    assert all(name.endswith("key.bias") for name in dead)


def test_the_order_of_experts_is_that_of_the_configuration() -> None:
    one = randomize(FeatureFusion({"vit": VIT, "cnn": CNN}, 7, method="qformer", qformer=SMALL))
    other = FeatureFusion({"cnn": CNN, "vit": VIT}, 7, method="qformer", qformer=SMALL).double()
    for i in (0, 1):
        other.to_tokens.experts[1 - i].load_state_dict(one.to_tokens.experts[i].state_dict())
    other.to_tokens.projection.load_state_dict(one.to_tokens.projection.state_dict())
    given = features()
    assert_conforms(other(given), one(given).roll(3, dims=1))


def test_the_map_is_a_set_and_the_queries_are_not() -> None:
    fusion = randomize(QFormerFusion([4], 7, [3], **SMALL))
    image_map = randn(2, 6, 4)
    tokens = fusion([image_map])
    assert_conforms(fusion([image_map[:, torch.randperm(6)]]), tokens)
    assert not torch.isclose(tokens[:, 0], tokens[:, 1]).all()


def test_only_every_second_layer_reads_the_map() -> None:
    layers = QFormer(2, 8, 4, num_layers=5, num_heads=2, cross_attention_frequency=2).layers
    assert [layer.cross_attention is not None for layer in layers] == [True, False, True, False, True]


@pytest.mark.parametrize("images", [0, 1])
def test_few_images(images: int) -> None:
    fusion = FeatureFusion({"vit": VIT, "cnn": CNN}, 7, method="qformer", qformer=SMALL).double()
    assert fusion(features(images)).shape == (images, 5, 7)


# ---- in a model


def config(**changes: Any) -> dict[str, Any]:
    vit = {"type": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    return {
        "image": {"size": 12},
        "vision_towers": [vit | {"name": "one", "queries": 2}, vit | {"name": "two", "queries": 3}],
        "fusion": {"method": "qformer", "hidden_size": 10, "qformer": SMALL},
        "connector": "linear",
        "language": {
            "vocab_size": 23,
            "hidden_size": 16,
            "num_layers": 1,
            "num_heads": 2,
            "intermediate_size": 8,
        },
        "image_token_id": 2,
        "position_scheme": "share-all",
    } | changes


def test_a_model_by_configuration() -> None:
    model = VLM(VLMConfig.model_validate(config()))
    assert model.config.tokens_per_image == 5
    images = torch.randn(1, 3, 12, 12)
    tokens = model.image_features(images)
    assert tokens.shape == (1, 5, 16)
    levels = {name: tower(images) for name, tower in model.vision_towers.items()}
    assert torch.equal(tokens, model.connector(model.fusion(levels)))
    input_ids = torch.tensor([[5, 2, 2, 2, 2, 2, 7, 8]])
    assert model(input_ids, images, labels=input_ids.masked_fill(input_ids == 2, -100)).loss.isfinite()
    assert model.generate(input_ids, images, max_new_tokens=2).shape == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_scheme": "share-by-row"}, "needs rows, and queries of a Q-Former have none"),
        ({"fusion": {"method": "qformer"}}, "hidden_size is missing"),
        ({"fusion": {"hidden_size": 4, "qformer": SMALL}}, 'fusion.qformer belongs to method "qformer"'),
        (
            {"fusion": {"method": "qformer", "hidden_size": 4, "qformer": SMALL | {"num_heads": 3}}},
            "num_heads 3 does not divide hidden_dim 8",
        ),
        ({"fusion": {"method": "qformer", "hidden_size": 4, "grid": 2}}, "fusion.grid belongs to"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMConfig.model_validate(config(**changes))


def test_bad_modules() -> None:
    with pytest.raises(ValueError, match="num_heads 3 does not divide hidden_dim 8"):
        QFormer(2, 8, 4, 1, 3)
    with pytest.raises(ValueError, match='method "qformer" needs an out_dim'):
        FeatureFusion({"vit": VIT}, method="qformer")
    with pytest.raises(ValueError, match="queries is 0"):
        FeatureFusion({"vit": VIT | {"queries": 0}}, 7, method="qformer")

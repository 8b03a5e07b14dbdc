"""Fusions of published systems, each built by configuration alone and held to its formula written out."""

from collections.abc import Mapping
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_conforms
from torch import Tensor, nn

from pyvlm.models import VLM, VLMConfig
from pyvlm.nn import FeatureFusion, build_projector
from pyvlm.nn.projector import Projector

VIT = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 12}
CLIP = {"model_type": "clip_vision_model", **VIT, "image_size": 12, "patch_size": 4}
SIGLIP = {"model_type": "siglip_vision_model", **VIT, "image_size": 12, "patch_size": 4}
DINO = {"model_type": "dinov2", **VIT, "hidden_size": 6, "image_size": 12, "patch_size": 4}
CONVNEXT = {
    "model_type": "convnext",
    "depths": [1, 1],
    "hidden_sizes": [4, 10],
    "num_stages": 2,
    "patch_size": 2,
    "image_size": 24,
}
SAM = {
    "model_type": "sam_vision_model",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "output_channels": 4,
    "mlp_dim": 12,
    "image_size": 40,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1],
}
LANGUAGE = {"vocab_size": 23, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}


def tower(name: str, encoder: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    return {"type": "transformers", "name": name, "encoder": encoder} | options


def build(towers: list[dict[str, Any]], fusion: dict[str, Any], connector: str) -> VLM:
    """A model of the configuration, every parameter away from its start."""
    pytest.importorskip("transformers")
    config = {
        "image": {"size": 12},
        "vision_towers": towers,
        "fusion": fusion,
        "connector": connector,
        "language": LANGUAGE,
        "image_token_id": 2,
    }
    torch.manual_seed(3)
    model = VLM(VLMConfig.model_validate(config)).double().eval()
    for part in (model.fusion, model.connector):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def levels_and_tokens(model: VLM) -> tuple[dict[str, list[Tensor]], Tensor]:
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    levels = {name: module(images) for name, module in model.vision_towers.items()}
    tokens = model.image_features(images)
    assert tokens.shape == (2, model.config.tokens_per_image, 16)
    return levels, tokens


def test_eagle() -> None:
    """Every map bilinearly on one grid with align_corners, channels side by side, then mlp2x_gelu."""
    model = build(
        [tower("clip", CLIP, levels=[-2]), tower("convnext", CONVNEXT)],
        {"align_corners": True},
        "mlp2x_gelu",
    )
    levels, tokens = levels_and_tokens(model)
    wide = levels["convnext"][0].transpose(1, 2).unflatten(2, (6, 6))
    small = F.interpolate(wide, size=(3, 3), mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)
    fused = torch.cat([levels["clip"][0], small], dim=-1)
    first, _, second = model.connector
    assert_conforms(tokens, second(F.gelu(first(fused))))


def test_prismatic() -> None:
    """DINOv2's and SigLIP's last level but one side by side, then three layers with GELU between."""
    model = build(
        [tower("dino", DINO, levels=[-2]), tower("siglip", SIGLIP, levels=[-2])],
        {"projector": "prismatic", "hidden_size": 16},
        "none",
    )
    levels, tokens = levels_and_tokens(model)
    x = torch.cat([levels["dino"][0], levels["siglip"][0]], dim=-1)
    first, _, second, _, third = model.fusion.projection
    assert first.out_features == 4 * (6 + 8)
    assert_conforms(tokens, third(F.gelu(second(F.gelu(first(x))))))


def test_vip_llava() -> None:
    """Several levels of one CLIP side by side, LayerNorm, and two layers."""
    projector = pytest.importorskip(
        "transformers.models.vipllava.modeling_vipllava"
    ).VipLlavaMultiModalProjector
    from transformers import VipLlavaConfig

    model = build(
        [tower("clip", CLIP, levels=[-2, -3, 1, 0], merge="concat")],
        {"norm": "layernorm"},
        "mlp2x_gelu",
    )
    levels, tokens = levels_and_tokens(model)
    norm, (first, _, second) = model.fusion.norm, model.connector
    x = F.layer_norm(torch.cat(levels["clip"], dim=-1), (32,), norm.weight, norm.bias)
    assert_conforms(tokens, second(F.gelu(first(x))))

    text = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 2}
    original = projector(
        VipLlavaConfig(
            vision_config=CLIP,
            text_config=text | {"model_type": "llama"},
            vision_feature_layers=[-2, -3, 1, 0],
        )
    ).double()
    original.projector_layernorm.load_state_dict(norm.state_dict())
    original.linear_1.load_state_dict(first.state_dict())
    original.linear_2.load_state_dict(second.state_dict())
    assert_conforms(tokens, original(torch.cat(levels["clip"], dim=-1)))


def test_deepseek_vl_hybrid() -> None:
    """SAM's last level and its first global one, each through a neck, are summed by a gate and brought to
    SigLIP's grid by two convolutions; a linear layer for each encoder; GELU and a linear layer for both."""
    model = build(
        [
            tower(
                "sam",
                SAM,
                levels=[-1, 2],
                last_norm=True,
                merge="gated",
                downsample=2,
                align_dim=8,
                align="linear",
            ),
            tower("siglip", SIGLIP, last_norm=True, align_dim=8, align="linear"),
        ],
        {"grid": 3},
        "gelu_linear",
    )
    levels, tokens = levels_and_tokens(model)
    last, first_global = (x.transpose(1, 2).unflatten(2, (10, 10)) for x in levels["sam"])
    fusion = model.fusion
    conv1, conv2 = fusion.downsamples["sam"].convs

    def project(x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(12, 12), mode="bilinear", align_corners=False)
        x = F.conv2d(x, conv1.weight, stride=2, padding=1)
        return F.conv2d(x, conv2.weight, stride=2, padding=1)

    high = (project(last) + project(first_global) * fusion.merges["sam"].alpha).flatten(2).transpose(1, 2)
    both = torch.cat([fusion.aligns["sam"](high), fusion.aligns["siglip"](levels["siglip"][0])], dim=-1)
    assert_conforms(tokens, model.connector[1](F.gelu(both)))

    deepseek = pytest.importorskip("transformers.models.deepseek_vl_hybrid.modeling_deepseek_vl_hybrid")
    from transformers import SamVisionConfig

    original = deepseek.DeepseekVLSamVisionProj(SamVisionConfig(output_channels=4), output_size=3).double()
    original.conv1.load_state_dict(conv1.state_dict())
    original.conv2.load_state_dict(conv2.state_dict())
    expected = original(last) + original(first_global) * fusion.merges["sam"].alpha
    assert_conforms(high, expected.flatten(2).transpose(1, 2))


def test_comm() -> None:
    """All levels of CLIP, the upper ones of DINOv2, each a weighted sum of projected norms; DINOv2 through an
    MLP; channels side by side; one linear layer."""
    model = build(
        [
            tower("clip", CLIP, levels=[1, 2, 3, 4]),
            tower("dino", DINO, levels=[3, 4], align_dim=8, align="mlp2x_gelu"),
        ],
        {"hidden_size": 16},
        "none",
    )
    levels, tokens = levels_and_tokens(model)

    def merged(name: str) -> Tensor:
        merge = model.fusion.merges[name]
        alpha = merge.level_weights.softmax(0)
        norms = [F.layer_norm(x, x.shape[-1:], merge.ln_weight, merge.ln_bias) for x in levels[name]]
        return sum(a * F.linear(x, merge.weight, merge.bias) for a, x in zip(alpha, norms, strict=True))

    first, _, second = model.fusion.aligns["dino"]
    both = torch.cat([merged("clip"), second(F.gelu(first(merged("dino"))))], dim=-1)
    assert_conforms(tokens, model.fusion.projection(both))


def test_mousi_mlp() -> None:
    """Each expert's patches, joined, through a layer of its own and one that all share; tokens in a row."""
    model = build(
        [tower("clip", CLIP, levels=[-2]), tower("convnext", CONVNEXT, patches=2)],
        {"method": "sequence", "hidden_size": 10},
        "gelu_linear",
    )
    levels, tokens = levels_and_tokens(model)
    own = model.fusion.to_tokens.experts
    pairs = levels["convnext"][0].reshape(2, 18, 20)
    expected = torch.cat([own[0](levels["clip"][0]), own[1](pairs)], dim=1)
    assert_conforms(tokens, model.connector[1](F.gelu(expected)))
    assert model.config.token_grids == ((3, 3), (6, 3))


# ---- the parts of their own


def test_the_gate_starts_closed() -> None:
    fusion = FeatureFusion({"sam": {"channels": 4, "grid": (2, 2), "levels": 3, "merge": "gated"}})
    levels = [torch.randn(2, 4, 4) for _ in range(3)]
    assert torch.equal(fusion({"sam": levels}), levels[0])
    fusion({"sam": levels}).sum().backward()
    assert (fusion.merges["sam"].alpha.grad != 0).all()


@pytest.mark.parametrize("norm", ["none", "layernorm"])
@pytest.mark.parametrize("kind", get_args(Projector))
def test_projectors_are_what_they_say(kind: str, norm: str) -> None:
    """The first layer is fused into the op where it can be, and the result is that of the modules."""
    maps = {"one": {"channels": 3, "grid": (2, 2)}, "two": {"channels": 4, "grid": (3, 3)}}
    fusion = FeatureFusion(maps, 5, norm=norm, projector=kind).double()
    for parameter in fusion.parameters():
        nn.init.normal_(parameter)
    plain = FeatureFusion(maps).double()
    given = {"one": [torch.randn(2, 4, 3).double()], "two": [torch.randn(2, 9, 4).double()]}
    fused = plain(given)
    if norm == "layernorm":
        fused = fusion.norm(fused)
    assert_conforms(fusion(given), fusion.projection(fused))
    fusion(given).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in fusion.parameters())


def test_bad_options_of_the_forms() -> None:
    one = {"one": {"channels": 3, "grid": (2, 2)}}
    with pytest.raises(ValueError, match="projector 'mlp' is unknown; expected one of linear, "):
        build_projector("mlp", 3, 4)
    with pytest.raises(ValueError, match='belong to method "channel_concat"'):
        FeatureFusion(one, 4, method="sequence", projector="mlp2x_gelu")
    with pytest.raises(ValueError, match='belong to method "channel_concat"'):
        FeatureFusion({"one": {**one["one"], "downsample": 1}}, 4, method="sequence")
    with pytest.raises(ValueError, match="downsample is -1"):
        FeatureFusion({"one": {**one["one"], "downsample": -1}}, 4)


@pytest.mark.parametrize(
    ("fusion", "connector", "message"),
    [
        ({"method": "sequence"}, "linear", "hidden_size is missing"),
        ({"method": "sequence", "hidden_size": 4, "norm": "layernorm"}, "linear", "fusion.norm belongs to"),
        ({"mode": "area", "align_corners": True}, "linear", 'align_corners needs mode "bilinear"'),
        ({"hidden_size": 4}, "none", "needs fusion.hidden_size 4 to be that of the language model, 16"),
        ({}, "none", "needs fusion.hidden_size None"),
    ],
)
def test_bad_configurations_of_the_forms(fusion: dict[str, Any], connector: str, message: str) -> None:
    vit = {"type": "vit", "name": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        build([vit], fusion, connector)

"""The fusion modules: what they compose, what they learn, and what they refuse."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_conforms
from torch import Tensor, nn

from pyvlm.nn import (
    EncoderFeatures,
    FeatureFusion,
    LocalCrossAttention,
    MergeLevels,
    PartialLoRALinear,
    PatchesToToken,
    Resampler,
)
from pyvlm.ops.fusion import merge_levels
from pyvlm.ops.grids import fuse_grids
from pyvlm.reference.cross_attention import to_windows


def randomize(module: nn.Module) -> nn.Module:
    """Every parameter away from its start, so that none can hide behind a 0 or a 1."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- MergeLevels


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weights", ["softmax", "free", "fixed"])
def test_merge_levels_learns_its_weights_as_told(weights: str, shared: bool) -> None:
    merge = MergeLevels(3, 4, 5, weights=weights, shared_projection=shared)
    assert_conforms(merge.alpha.detach(), torch.full((3,), 1 / 3), "the start is the mean")
    learned = dict(merge.named_parameters())
    assert ("level_weights" in learned) == (weights != "fixed")
    assert "level_weights" in merge.state_dict()
    assert merge.weight.shape == ((5, 4) if shared else (3, 5, 4))

    randomize(merge)
    levels = randn(3, 2, 6, 4)
    merged = merge(levels)
    alpha = merge.level_weights.softmax(0) if weights == "softmax" else merge.level_weights
    expected = merge_levels(levels, alpha, merge.weight, merge.bias, merge.ln_weight, merge.ln_bias)
    assert_conforms(merged, expected)
    merged.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in learned.values())


def test_merge_levels_starts_from_given_weights() -> None:
    assert MergeLevels(2, 4, 5, weights="fixed", alpha=[0.25, 0.75]).alpha.tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="unknown"):
        MergeLevels(2, 4, 5, weights="learned")
    with pytest.raises(ValueError, match="alpha takes 2 numbers"):
        MergeLevels(2, 4, 5, weights="free", alpha=[1.0])
    with pytest.raises(ValueError, match="got 2 numbers with weights='softmax'"):
        MergeLevels(2, 4, 5, alpha=[0.5, 0.5])


# ---- FeatureFusion

VIT = {"channels": 4, "grid": (2, 3), "levels": 3}
CNN = {"channels": 2, "grid": (4, 6)}


def features(images: int = 2) -> dict[str, list[Tensor]]:
    return {"vit": [randn(images, 6, 4) for _ in range(3)], "cnn": [randn(images, 24, 2)]}


def test_channel_concat_merges_aligns_resizes_and_projects() -> None:
    """COMM: levels merged, the second encoder aligned by an MLP, channels side by side, one projection."""
    fusion = randomize(FeatureFusion({"vit": VIT, "cnn": {**CNN, "align_dim": 5}}, 7))
    given = features()
    align = fusion.aligns["cnn"]
    aligned = align[2](F.gelu(align[0](given["cnn"][0])))
    maps = [fusion.merges["vit"](given["vit"]), aligned]
    projection = fusion.projection
    expected = fuse_grids(maps, [(2, 3), (4, 6)], (2, 3), projection.weight, projection.bias)
    assert_conforms(fusion(given), expected)
    assert (fusion.num_tokens, fusion.out_dim) == (6, 7)
    assert set(fusion.merges) == {"vit"}, "a single level passes as it is"
    fusion(given).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in fusion.parameters())


def test_channel_concat_on_a_grid_of_its_own() -> None:
    fusion = randomize(FeatureFusion({"vit": VIT, "cnn": CNN}, 7, grid=(3, 3), mode="area"))
    assert fusion(features()).shape == (2, fusion.num_tokens, 7)
    assert fusion.num_tokens == 9


def test_levels_side_by_side() -> None:
    """ViP-LLaVA: the levels are not summed but concatenated."""
    fusion = FeatureFusion({"vit": {**VIT, "merge": "concat"}})
    given = {"vit": features()["vit"]}
    assert torch.equal(fusion(given), torch.cat(given["vit"], dim=-1))
    assert fusion.out_dim == 12
    assert not list(fusion.parameters())


def test_maps_of_a_convolution() -> None:
    fusion = randomize(FeatureFusion({"vit": VIT, "cnn": CNN}, 7))
    given = features()
    as_maps = dict(given, cnn=[x.transpose(1, 2).unflatten(2, (4, 6)) for x in given["cnn"]])
    assert_conforms(fusion(as_maps), fusion(given))


def test_the_order_of_encoders_is_the_order_of_channels_and_tokens() -> None:
    given = features()
    one, other = FeatureFusion({"vit": VIT, "cnn": CNN}), FeatureFusion({"cnn": CNN, "vit": VIT}, grid=(2, 3))
    one.double(), other.double()
    other.merges.load_state_dict(one.merges.state_dict())
    assert torch.equal(one(given), other(given).roll(4, dims=-1))

    sequence = randomize(FeatureFusion({"vit": VIT, "cnn": {**CNN, "patches": 4}}, 5, method="sequence"))
    tokens = sequence(given)
    assert tokens.shape == (2, sequence.num_tokens, 5)
    assert sequence.num_tokens == 6 + 24 // 4
    given["cnn"] = [x + 1 for x in given["cnn"]]
    changed = (sequence(given) != tokens).any(-1).any(0)
    assert changed.tolist() == [False] * 6 + [True] * 6


def test_fusion_comes_back_from_its_state() -> None:
    encoders = {"vit": EncoderFeatures(**VIT), "cnn": {**CNN, "align_dim": 5}}
    fusion, other = randomize(FeatureFusion(encoders, 7)), FeatureFusion(encoders, 7).double()
    other.load_state_dict(fusion.state_dict())
    given = features()
    assert torch.equal(fusion(given), other(given))


@pytest.mark.parametrize("images", [0, 1])
def test_fusion_of_few_images(images: int) -> None:
    for method in ("channel_concat", "sequence"):
        fusion = FeatureFusion({"vit": VIT, "cnn": CNN}, 7, method=method).double()
        assert fusion(features(images)).shape == (images, fusion.num_tokens, 7)


# ---- PatchesToToken


def test_patches_to_token_shares_the_second_layer() -> None:
    module = randomize(PatchesToToken([3, 2], 5, [2, 1], hidden_dim=4))
    one, two = randn(2, 4, 3), randn(2, 3, 2)
    first = [module.experts[0](one.reshape(2, 2, 6)), module.experts[1](two)]
    assert_conforms(module([one, two]), module.shared(F.gelu(torch.cat(first, dim=1))))
    single = randomize(PatchesToToken([3, 2], 5, [2, 1]))
    first = [single.experts[0](one.reshape(2, 2, 6)), single.experts[1](two)]
    assert_conforms(single([one, two]), torch.cat(first, dim=1))


# ---- Resampler


def test_resampler_takes_any_grid() -> None:
    resampler = randomize(Resampler(3, 8, 2, kv_dim=5))
    wide = randn(2, 8, 5)
    assert resampler(wide, (2, 4)).shape == (2, 9, 8)
    assert not torch.equal(resampler(wide, (2, 4)), resampler(wide, (4, 2))), "positions follow the grid"
    square = randn(2, 16, 5)
    assert torch.equal(resampler(square), resampler(square, (4, 4)))
    with pytest.raises(ValueError, match=r"8 tokens, but the grid \(2, 2\) has 4"):
        resampler(wide)


# ---- LocalCrossAttention


@pytest.mark.parametrize("separate", [False, True])
def test_a_grid_of_queries_is_the_same_as_each_query_with_its_windows(separate: bool) -> None:
    sides, grid = [1, 2, 3], (2, 3)
    layer = randomize(LocalCrossAttention(4, 5, [6, 8, 8], sides, 8, 2, separate))
    query, context = randn(2, 6, 4), randn(2, 6, 5)
    maps = [randn(2, 6 * side**2, dim) for side, dim in zip(sides, [6, 8, 8], strict=True)]
    masks = [torch.rand(2, x.shape[1]) < 0.7 for x in maps]
    out = layer(query, context, maps, grid, masks)

    windows = [to_windows(x, grid).flatten(0, 1) for x in maps]
    window_masks = [to_windows(mask, grid).flatten(0, 1) for mask in masks]
    alone = layer(query.view(12, 1, 4), context.view(12, 1, 5), windows, (1, 1), window_masks)
    assert_conforms(out, alone.view(2, 6, 4))


def test_one_encoder_apart_needs_no_weights() -> None:
    layer = randomize(LocalCrossAttention(4, 5, [8], [2], 8, 2, separate=True))
    assert layer.encoder_weights is None
    joint = randomize(LocalCrossAttention(4, 5, [8], [2], 8, 2))
    rename = {name: name.replace("attention.", "attentions.0.") for name in joint.state_dict()}
    layer.load_state_dict({rename[name]: value for name, value in joint.state_dict().items()})
    arguments = randn(1, 4, 4), randn(1, 4, 5), [randn(1, 16, 8)], (2, 2)
    assert_conforms(layer(*arguments), joint(*arguments))


# ---- PartialLoRALinear


def test_partial_lora_starts_as_the_linear_layer_it_replaces() -> None:
    linear = nn.Linear(4, 6)
    layer = PartialLoRALinear(4, 6, rank=2)
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert set(missing) == {"lora_a.weight", "lora_b.weight"}
    assert not unexpected
    x, mask = torch.randn(2, 5, 4), torch.rand(2, 5) < 0.5
    assert torch.equal(layer(x, mask), linear(x))


def test_partial_lora_touches_image_tokens_only() -> None:
    layer = randomize(PartialLoRALinear(4, 6, rank=2, alpha=3.0))
    x, mask = randn(2, 5, 4), torch.rand(2, 5) < 0.5
    plain = F.linear(x, layer.weight, layer.bias)
    update = 1.5 * x @ layer.lora_a.weight.T @ layer.lora_b.weight.T
    out = layer(x, mask)
    assert_conforms(out, torch.where(mask[..., None], plain + update, plain))
    assert torch.equal(out, layer(x, mask, num_image_tokens=int(mask.sum())))
    with pytest.raises(ValueError, match="image placeholders, but"):
        layer(x, mask, num_image_tokens=int(mask.sum()) - 1)
    everything_text = torch.zeros_like(mask)
    assert torch.equal(layer(x, everything_text), plain)
    layer(x, everything_text).sum().backward()
    assert torch.equal(layer.lora_a.weight.grad, torch.zeros_like(layer.lora_a.weight))


def test_partial_lora_takes_the_place_of_a_layer_and_its_very_tensors() -> None:
    linear = nn.Linear(4, 6).bfloat16().eval()
    state = torch.get_rng_state()
    layer = PartialLoRALinear.from_linear(linear, rank=2, alpha=3.0, dropout=0.5)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.scaling, layer.dropout.p, layer.training) == (1.5, 0.5, False)
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in layer.parameters())
    torch.set_rng_state(state)
    assert torch.equal(layer.lora_a.weight, nn.Linear(4, 2, bias=False, dtype=torch.bfloat16).weight)
    assert not layer.lora_b.weight.any()
    x, mask = torch.randn(2, 5, 4).bfloat16(), torch.rand(2, 5) < 0.5
    assert torch.equal(layer(x, mask), linear(x))
    nn.init.ones_(layer.lora_b.weight)
    assert torch.equal(layer(x), linear(x)), "without a mask nothing is an image token"
    assert not torch.equal(layer(x, mask), linear(x))
    assert PartialLoRALinear.from_linear(nn.Linear(4, 6, bias=False), rank=2).bias is None


def test_partial_lora_drops_out_of_the_update_only() -> None:
    layer = randomize(PartialLoRALinear(4, 6, rank=2, dropout=1.0))
    x, mask = randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    plain = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer.train()(x, mask), plain)
    assert not torch.equal(layer.eval()(x, mask), plain)


# ---- bad input

ONE = FeatureFusion({"vit": VIT, "cnn": CNN}, 7).double()
BAD = {
    "no encoder": (lambda: FeatureFusion({}), "encoders is empty"),
    "unknown key": (
        lambda: FeatureFusion({"vit": {**VIT, "layers": 3}}, 7),
        r"encoder 'vit' has unknown keys \['layers'\]",
    ),
    "no channels": (lambda: FeatureFusion({"vit": {"grid": (2, 3)}}, 7), r"lacks \['channels'\]"),
    "unknown merge": (
        lambda: FeatureFusion({"vit": {**VIT, "merge": "mean"}}, 7),
        "encoder 'vit': merge='mean' is unknown",
    ),
    "no level": (lambda: FeatureFusion({"vit": {**VIT, "levels": 0}}, 7), "encoder 'vit': levels is 0"),
    "unknown method": (lambda: FeatureFusion({"vit": VIT}, 7, method="add"), "method='add' is unknown"),
    "tokens of no width": (
        lambda: FeatureFusion({"vit": VIT}, method="sequence"),
        '"sequence" needs an out_dim',
    ),
    "patches that leave a rest": (
        lambda: FeatureFusion({"vit": {**VIT, "patches": 4}}, 7, method="sequence"),
        "encoder 'vit' has 6 tokens, which 4 patches a token do not divide",
    ),
    "encoder missing": (lambda: ONE({"vit": features()["vit"]}), r"features are of \['vit'\], expected"),
    "level missing": (
        lambda: ONE(dict(features(), vit=features()["vit"][:2])),
        "vit gave 2 levels, expected 3",
    ),
    "with CLS": (
        lambda: ONE(dict(features(), cnn=[randn(2, 25, 2)])),
        r"level 0 of cnn has shape \[2, 25, 2\], expected \[N, 24, 2\] for its grid \(4, 6\)",
    ),
    "map of another grid": (
        lambda: ONE(dict(features(), cnn=[randn(2, 2, 6, 4)])),
        r"level 0 of cnn has shape \[2, 2, 6, 4\], expected \[N, 2, 4, 6\]",
    ),
    "heads that do not divide": (
        lambda: LocalCrossAttention(4, 4, [8], [1], 8, 3),
        "num_heads 3 does not divide hidden_dim 8",
    ),
    "map that has no room for positions": (
        lambda: LocalCrossAttention(4, 4, [6], [2], 8, 2),
        "windows of side 2 has 6 channels, expected hidden_dim = 8",
    ),
    "map of another window": (
        lambda: LocalCrossAttention(4, 4, [8], [2], 8, 2)(
            torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), [torch.zeros(1, 4, 8)], (2, 2)
        ),
        r"maps\[0\] has 4 tokens, expected 16",
    ),
    "too few maps": (
        lambda: LocalCrossAttention(4, 4, [8, 8], [1, 2], 8, 2)(
            torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), [torch.zeros(1, 4, 8)], (2, 2)
        ),
        "got 1 maps, expected 2",
    ),
    "no rank": (lambda: PartialLoRALinear(4, 4, rank=0), "rank is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    call: Callable[[], object]
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()

"""Fusion against outputs and gradients of the original authors' code, in float32 and float64 where stored."""

from collections.abc import Callable

import pytest
import torch
from conformance import Case, cases
from tolerance import assert_conforms
from torch import Tensor, nn

from pyvlm.nn.anyres import AnyResPacker
from pyvlm.nn.cross_attention import LocalCrossAttention, Resampler
from pyvlm.nn.fusion import FeatureFusion
from pyvlm.nn.partial_lora import PartialLoRALinear
from pyvlm.ops.cross_attention import resample, resize_positions, sincos_positions
from pyvlm.ops.grids import fuse_grids
from pyvlm.ops.placement import pack_image_tokens, place_image_tokens
from pyvlm.ops.tiling import (
    anyres_grid,
    anyres_index,
    letterbox_masks,
    pixel_shuffle_index,
    pixel_unshuffle_index,
)
from pyvlm.reference.cross_attention import to_windows

Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def check(case: Case, run: Run, outputs: list[str], bits: str = "") -> None:
    """Runs a case and compares outputs and gradients; `bits` "64" takes the stored float64 run.

    `run` takes the floating inputs and parameters by their stored names, less the prefix, and gives named
    outputs.
    """
    dtype = torch.float64 if bits else torch.float32
    leaves = {
        name.split(".", 1)[1]: tensor.to(dtype, copy=True).requires_grad_()
        for name, tensor in case.tensors.items()
        if name.startswith(("input.", "param.")) and tensor.is_floating_point()
    }
    actual = run(leaves)
    for name in outputs:
        assert_conforms(actual[name], case[f"output{bits}.{name}"], name)
    gradients = {
        name.split(".", 1)[1]: tensor
        for name, tensor in case.tensors.items()
        if name.startswith(f"grad{bits}.")
    }
    torch.autograd.backward([actual[n] for n in outputs], [case[f"cotangent.{n}"].to(dtype) for n in outputs])
    for name, expected in gradients.items():
        assert_conforms(leaves[name].grad, expected, f"gradient of {name}", gradient=True)


def both_precisions(case: Case, run: Run) -> None:
    check(case, run, ["y"])
    check(case, run, ["y"], bits="64")


def functional(module: nn.Module, parameters: dict[str, Tensor], *args: object) -> Tensor:
    """The module run on the case's own leaves, so that gradients reach them; all parameters must be given."""
    assert parameters.keys() == dict(module.named_parameters()).keys()
    return torch.func.functional_call(module.to(next(iter(parameters.values())).dtype), parameters, args)


def maps(leaves: dict[str, Tensor], prefix: str) -> list[Tensor]:
    return [leaves[f"{prefix}.{i}"] for i in range(sum(name.startswith(f"{prefix}.") for name in leaves))]


@pytest.mark.parametrize("case", cases("fusion/eagle_channel_concat"))
def test_eagle_channel_concat(case: Case) -> None:
    towers, side = case.settings["towers"], case.settings["grid_size"]

    def by_op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        features = [
            x.flatten(2).transpose(1, 2) if tower["layout"] == "bchw" else x
            for x, tower in zip(maps(leaves, "feature"), towers, strict=True)
        ]
        grids = [(tower["h"], tower["w"]) for tower in towers]
        return {"y": fuse_grids(features, grids, (side, side), align_corners=True)}

    def by_module(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        encoders = {
            str(i): {"channels": t["channels"], "grid": (t["h"], t["w"])} for i, t in enumerate(towers)
        }
        fusion = FeatureFusion(encoders, grid=(side, side), align_corners=True)
        return {"y": fusion({str(i): [x] for i, x in enumerate(maps(leaves, "feature"))})}

    check(case, by_op, ["y"])
    check(case, by_module, ["y"])


@pytest.mark.parametrize("case", cases("fusion/cambrian_sva"))
def test_cambrian_spatial_vision_aggregator(case: Case) -> None:
    settings = case.settings
    sides = settings["kv_sizes"]
    layer = LocalCrossAttention(
        settings["q_dim"],
        settings["context_dim"],
        settings["kv_dims"],
        sides,
        settings["hidden"],
        settings["heads"],
        separate=settings["layer_type"] == "sep",
    )
    masks = [case[f"input.mask.{i}"] for i in range(len(sides))]

    def name_here(name: str) -> str:
        name = name.removeprefix("layers.0.")
        for i in range(len(sides)):
            name = name.replace(f"aggregate_{i}.attention_layer.", f"attentions.{i}.")
            for part in ("k_proj", "v_proj"):
                name = name.replace(f"cross_attn.{part}_{i}.", f"attention.{part}.{i}.")
            name = name.replace(f"pos_embed_{i}", f"pos_embed.{i}")
        if name.startswith("attentions."):
            name = name.replace("k_proj.", "k_proj.0.").replace("v_proj.", "v_proj.0.")
        name = name.replace("cross_attn.", "attention.").replace("weight_mlp.", "encoder_weights.")
        return name.replace("linear_1.", "0.").replace("linear_2.", "2.")

    def run(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = {name_here(name): leaf for name, leaf in leaves.items() if name.startswith("layers.")}
        y = functional(
            layer, parameters, leaves["queries"], leaves["context"], maps(leaves, "latent"), (1, 1), masks
        )
        return {"y": y}

    both_precisions(case, run)


@pytest.mark.parametrize("case", cases("fusion/cambrian_windows"))
def test_cambrian_windows(case: Case) -> None:
    side, factors = case.settings["query_side"], case.settings["reduce_factors"]

    def run(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        windows = [to_windows(x, (side, side)).flatten(0, 1) for x in maps(leaves, "feature")]
        return {f"windows.{i}": w for i, w in enumerate(windows)}

    check(case, run, [f"windows.{i}" for i in range(len(factors))])
    sizes_hw = case["input.image_sizes_wh"].flip(1).tolist()
    for i, mask in enumerate(letterbox_masks(sizes_hw, side, factors)):
        assert_conforms(to_windows(mask, (side, side)).flatten(0, 1), case[f"output.mask.{i}"], f"mask {i}")


@pytest.mark.parametrize("case", cases("fusion/qwen_resampler"))
def test_qwen_resampler(case: Case) -> None:
    settings = case.settings
    grid, source = settings["grid_size"], settings["source_side"]
    resampler = Resampler(grid, settings["embed_dim"], settings["heads"], settings["kv_dim"])
    assert_conforms(resampler.pos_embed, case["param.pos_embed"], "position table")
    keys = resize_positions(resampler.pos_embed, (grid, grid), (source, source))
    assert_conforms(keys, case["output.pos_embed_keys"], "resized position table")

    def run(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = {name: leaf for name, leaf in leaves.items() if name not in ("x", "pos_embed")}
        return {"y": functional(resampler, parameters, leaves["x"])}

    def run_on_stored_positions(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        # The original resizes its table in float32 also where it computes in float64.
        x, width = leaves["x"], (settings["embed_dim"],)
        z = x if "kv_proj.weight" not in leaves else x @ leaves["kv_proj.weight"].T
        z = nn.functional.layer_norm(z, width, leaves["ln_kv.weight"], leaves["ln_kv.bias"], 1e-6)
        q = nn.functional.layer_norm(leaves["query"], width, leaves["ln_q.weight"], leaves["ln_q.bias"], 1e-6)
        y = resample(
            z,
            q,
            case["param.pos_embed"].double(),
            case["output.pos_embed_keys"].double(),
            leaves["attn.in_proj_weight"],
            leaves["attn.out_proj.weight"],
            settings["heads"],
            leaves["attn.in_proj_bias"],
            leaves["attn.out_proj.bias"],
        )
        return {"y": y}

    check(case, run, ["y"])
    check(case, run_on_stored_positions, ["y"], bits="64")


def test_position_table_encodes_the_column_first() -> None:
    table = sincos_positions((2, 3), 8).view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert not torch.equal(table[0, 0, 4:], table[1, 0, 4:])


@pytest.mark.parametrize("case", cases("fusion/llava_next_anyres"))
def test_llava_next_anyres(case: Case) -> None:
    settings = case.settings
    sizes, pinpoints = case["input.image_sizes_hw"].tolist(), case["input.grid_pinpoints_hw"].tolist()
    for size, grid in zip(sizes, case["output.grid_hw"].tolist(), strict=True):
        if grid != [0, 0]:  # stored for an image that came without tiles
            assert list(anyres_grid(size, pinpoints, settings["image_size"])) == grid
    tile, side, newline = settings["image_size"], settings["tile_side_tokens"], settings["newline"]
    num_maps = [case[f"input.features.{i}"].shape[0] for i in range(len(sizes))]
    index, lengths = anyres_index(sizes, pinpoints, tile, side, newline, num_maps)
    assert_conforms(torch.tensor(lengths), case["output.lengths"], "lengths")

    def rows(leaves: dict[str, Tensor]) -> Tensor:
        return torch.cat([x.flatten(0, 1) for x in maps(leaves, "features")])

    def packed(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = pack_image_tokens(rows(leaves), index, leaves.get("image_newline"))
        return {f"packed.{i}": x for i, x in enumerate(tokens.split(lengths))}

    def placed(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same, packed on the way into a text that has two tokens before each image."""
        mask = torch.cat([torch.tensor([False] * 2 + [True] * n) for n in lengths])[None]
        text = torch.randn(1, mask.shape[1], index_width(leaves))
        merged = place_image_tokens(text, rows(leaves), mask, index, leaves.get("image_newline"))
        assert torch.equal(merged[~mask], text[~mask])
        return {f"packed.{i}": x for i, x in enumerate(merged[mask].split(lengths))}

    def index_width(leaves: dict[str, Tensor]) -> int:
        return leaves["features.0"].shape[-1]

    def by_module(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        module = AnyResPacker(index_width(leaves), pinpoints, tile, side, newline=newline)
        learned = {"newline": leaves["image_newline"]} if newline else {}
        features = torch.cat(maps(leaves, "features"))
        tokens, _ = torch.func.functional_call(module, learned, (features, sizes, num_maps))
        return {f"packed.{i}": x for i, x in enumerate(tokens.split(lengths))}

    names = [f"packed.{i}" for i in range(len(sizes))]
    check(case, packed, names)
    check(case, placed, names)
    check(case, by_module, names)


@pytest.mark.parametrize("case", cases("fusion/pixel_shuffle"))
def test_pixel_shuffle(case: Case) -> None:
    side, factor = case.settings["side"], case.settings["factor"]
    images, _, channels = case["input.x"].shape

    def shuffled(x: Tensor) -> Tensor:
        index = pixel_shuffle_index((side, side), factor, images)
        return pack_image_tokens(x.flatten(0, 1), index).view(images, -1, channels * factor**2)

    def run(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": nn.functional.linear(shuffled(leaves["x"]), leaves["weight"])}

    assert_conforms(shuffled(case["input.x"]), case["output.shuffled"], "shuffled")
    both_precisions(case, run)

    inverse = pixel_unshuffle_index((side, side), factor, images)
    unshuffled = pack_image_tokens(case["output.shuffled"].reshape(-1, channels), inverse)
    assert torch.equal(unshuffled.view_as(case["input.x"]), case["input.x"])


@pytest.mark.parametrize("case", cases("fusion/plora"))
def test_partial_lora(case: Case) -> None:
    settings = case.settings
    layer = PartialLoRALinear(
        settings["in"], settings["out"], settings["bias"], rank=settings["rank"], alpha=settings["alpha"]
    )

    def run(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {"Plora_A.weight": "lora_a.weight", "Plora_B.weight": "lora_b.weight"}
        parameters = {names.get(name, name): leaf for name, leaf in leaves.items() if name != "x"}
        return {"y": functional(layer, parameters, leaves["x"], case["input.im_mask"])}

    both_precisions(case, run)

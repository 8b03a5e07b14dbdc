"""Connectors of transformers' models on pyvlm's ops: what they compute, and how they come and go."""

import copy
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace as Config
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")

import transformers
from integrations.transformers_models import FAMILIES, Family
from tolerance import assert_close
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector, Mistral3PatchMerger
from transformers.monkey_patching import clear_patch_mapping, get_patch_mapping, register_patch_mapping

from pyvlm.integrations.transformers import connectors

PATCH = 14
GRIDS = {
    "one": [(4, 6)],
    "alike": [(4, 4), (4, 4), (4, 4)],
    "of all sizes": [(4, 6), (2, 2), (6, 2), (8, 10)],
    "odd": [(5, 7), (4, 3), (7, 4)],  # the last row or column belongs to no block
}


def merger(side: int = 2, original: type = Mistral3PatchMerger) -> nn.Module:
    vision = Config(hidden_size=12, patch_size=PATCH)
    return original(Config(vision_config=vision, spatial_merge_size=side))


def projector(
    side: int = 6, tokens_per_side: int = 3, original: type = Gemma3MultiModalProjector
) -> nn.Module:
    vision = Config(hidden_size=12, image_size=side * PATCH, patch_size=PATCH, layer_norm_eps=1e-6)
    config = Config(
        vision_config=vision,
        text_config=Config(hidden_size=10),
        mm_tokens_per_image=tokens_per_side**2,
    )
    made = original(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def pixels(grids: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(grids) * PATCH


def gemma3() -> Family:
    """The small Gemma 3 with something to pool: 4 patches to 1 token."""

    def config() -> Any:
        made = FAMILIES["gemma3"].config()
        made.mm_tokens_per_image = 1
        return made

    return replace(FAMILIES["gemma3"], config=config)


MODELS = {"mistral3": FAMILIES["mistral3"], "gemma3": gemma3()}


def served(module: nn.Module) -> nn.Module:
    """A copy of a module on pyvlm's connectors."""
    module = copy.deepcopy(module)
    assert any(change.kernel for change in connectors.apply(module))
    return module


def results(module: nn.Module, x: Tensor, *args: Any) -> dict[str, Tensor]:
    """The output, and the gradients of a sum of it that weighs all values differently."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x, *args)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "of x": x.grad} | gradients


def assert_alike(original: nn.Module, dtype: torch.dtype, x: Tensor, *args: Any) -> None:
    original, x = original.to(dtype), x.to(dtype)
    plain = results(original, x, *args)
    actual = results(served(original), x, *args)
    expected = results(copy.deepcopy(original).double(), x.double(), *args)
    assert actual.keys() == expected.keys()
    assert len(actual) > 2
    for name in expected:
        assert_close(actual[name], expected[name], plain[name], name)


@pytest.fixture
def registered() -> Iterator[None]:
    assert get_patch_mapping() == {}  # the import registered nothing
    try:
        connectors.register()
    except ImportError as error:
        pytest.skip(str(error))
    yield
    clear_patch_mapping()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("side", [2, 3])
def test_the_merger_gives_the_bits_of_the_original(
    side: int, grids: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    grids = [(max(rows, side), max(columns, side)) for rows, columns in grids]
    original = merger(side=side)
    x = torch.randn(sum(rows * columns for rows, columns in grids), 12)
    assert_alike(original, dtype, x, pixels(grids))
    x = x.to(dtype)
    expected = original(x, pixels(grids))
    assert len(expected) == sum((rows // side) * (columns // side) for rows, columns in grids)
    assert torch.equal(served(original)(x, pixels(grids)), expected)
    assert torch.equal(served(original)(x, pixels(grids).tolist()), expected)  # sizes as a list will do


def test_the_merger_refuses_sizes_of_other_images() -> None:
    with pytest.raises(ValueError, match="has 10 patches, but image_sizes stand for 8"):
        served(merger())(torch.randn(10, 12), pixels([(2, 4)]))


def test_the_whole_projector_around_the_merger_agrees() -> None:
    vision = Config(hidden_size=12, patch_size=PATCH)
    text = Config(hidden_size=20, rms_norm_eps=1e-5)
    config = Config(
        vision_config=vision,
        text_config=text,
        spatial_merge_size=2,
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
    )
    grids = GRIDS["of all sizes"]
    x = torch.randn(sum(rows * columns for rows, columns in grids), 12)
    assert_alike(Mistral3MultiModalProjector(config), torch.float32, x, pixels(grids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # its norm is float32, always
@pytest.mark.parametrize(("side", "tokens"), [(6, 3), (9, 3), (4, 4), (5, 1), (14, 7)])
@pytest.mark.parametrize("images", [1, 3])
def test_the_pooling_projector_agrees(images: int, side: int, tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(images, side * side, 12)
    assert_alike(projector(side, tokens), dtype, x)
    assert_alike(
        projector(side, tokens), dtype, torch.randn(images, side * side + 1, 12)[:, 1:]
    )  # CLS cut off


def test_a_window_that_leaves_a_rest_stays_with_the_original() -> None:
    original = projector(side=7, tokens_per_side=3)  # the seventh row and column are dropped
    model = nn.Sequential(copy.deepcopy(original))
    (change,) = connectors.apply(model)
    assert (change.module, change.kernel, change.undo) == ("0", None, None)
    assert "windows of 2 leave a rest of its 7 patches" in change.reason
    assert type(model[0]) is Gemma3MultiModalProjector
    made = copy.deepcopy(original)
    made.__class__ = connectors.Gemma3MultiModalProjector  # as a registered mapping would make it
    x = torch.randn(2, 49, 12)
    assert torch.equal(made(x), original(x))


@pytest.mark.parametrize("name", sorted(connectors.SERVED))
def test_every_served_class_computes_what_it_did(name: str) -> None:
    """Mergers and projectors are each one code in many models; a release may change one of them."""
    home = pytest.importorskip(connectors._home(name), reason=f"this transformers has no {name}")
    merges = connectors.SERVED[name][0] not in ("gemma3", "t5gemma2")
    module = merger(original=getattr(home, name)) if merges else projector(original=getattr(home, name))
    assert type(module) is getattr(home, name)
    if merges:
        assert_alike(module, torch.float32, torch.randn(24 + 35, 12), pixels([(4, 6), (5, 7)]))
    else:
        assert_alike(module, torch.float32, torch.randn(2, 36, 12))


@pytest.mark.parametrize("name", MODELS)
def test_models_give_their_own_logits_and_undo_is_exact(name: str) -> None:
    model = MODELS[name].model()
    batch = MODELS[name].batch(model)
    classes = [type(module) for module in model.modules()]
    state, parameters = model.state_dict(), list(model.parameters())
    expected = model(**batch).logits
    (change,) = connectors.apply(model)
    assert change.part == "connector"
    assert change.kernel is not None
    replaced = model.get_submodule(change.module)
    assert type(replaced).__module__ == connectors.__name__
    assert [n for n, m in model.named_modules() if type(m).__module__ == connectors.__name__] == [
        change.module
    ]
    exact = copy.deepcopy(model).double()(**{k: widened(v) for k, v in batch.items()}).logits
    assert_close(model(**batch).logits, exact, expected, "logits")
    assert list(model.state_dict()) == list(state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    change.undo()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(**batch).logits, expected)


def widened(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - MODELS.keys()))
def test_other_models_stay_as_they_are(name: str) -> None:
    if not hasattr(transformers, FAMILIES[name].architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = FAMILIES[name].model()
    classes = [type(module) for module in model.modules()]
    assert connectors.apply(model) == []
    assert [type(module) for module in model.modules()] == classes


def test_every_served_class_of_this_transformers_is_replaced_as_a_subclass() -> None:
    found = {key.strip("^$"): made for key, made in connectors._mapping().items()}
    assert {"Mistral3PatchMerger", "LightOnOcrPatchMerger", "Gemma3MultiModalProjector"} <= found.keys()
    for name, made in found.items():
        original = getattr(sys.modules[connectors._home(name)], name)
        assert issubclass(made, original)
        assert made.__name__ == name
        assert made.forward is not original.forward


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_makes_them_while_they_are_registered(name: str, tmp_path: Path) -> None:
    family = MODELS[name]
    model = family.model()
    batch = family.batch(model)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    connectors.register()  # again is no harm
    loaded = type(model).from_pretrained(tmp_path).eval()
    connectors.unregister()
    assert get_patch_mapping() == {}
    changes = connectors.apply(loaded)
    assert [(change.reason, change.undo) for change in changes] == [("by the registered mapping", None)]
    torch.testing.assert_close(loaded(**batch).logits, expected)
    assert list(loaded.state_dict()) == list(model.state_dict())
    later = type(model).from_pretrained(tmp_path)
    assert not any(type(module).__module__ == connectors.__name__ for module in later.modules())


@pytest.mark.usefixtures("registered")
def test_a_model_made_from_a_config_starts_as_the_original_does() -> None:
    """Gemma 3 starts its projector's weight at zero, whatever class it is of."""
    config = MODELS["gemma3"].config()
    model = transformers.Gemma3ForConditionalGeneration._from_config(config)
    made = model.model.multi_modal_projector
    assert type(made) is connectors.Gemma3MultiModalProjector
    assert made.mm_input_projection_weight.abs().max() == 0


def test_a_transformers_that_cannot_apply_a_mapping_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """5.17 has modules whose listing imports torchvision; every from_pretrained would fail then."""

    def listing() -> list[str]:
        raise ModuleNotFoundError("No module named 'torchvision'")

    lazy = ModuleType("transformers.lazy")
    lazy.__dir__ = listing
    monkeypatch.setitem(sys.modules, "transformers.lazy", lazy)
    with pytest.raises(ImportError, match=r"cannot apply a patch mapping here \(No module named"):
        connectors.register()
    assert get_patch_mapping() == {}


@pytest.mark.usefixtures("registered")
def test_replacements_of_others_are_respected() -> None:
    connectors.unregister()

    class Other(nn.Module):
        pass

    key = "^Gemma3MultiModalProjector$"
    register_patch_mapping({key: Other})
    with pytest.raises(
        ValueError, match=r"other than pyvlm's is registered for \^Gemma3MultiModalProjector\$"
    ):
        connectors.register()
    assert get_patch_mapping() == {key: Other}  # none was registered
    connectors.unregister()
    assert get_patch_mapping() == {key: Other}


def test_modules_of_others_by_the_same_name_are_left() -> None:
    class Mistral3PatchMerger(nn.Module):
        pass

    assert connectors.apply(nn.Sequential(Mistral3PatchMerger())) == []


def test_a_forward_that_a_hook_replaced_is_left() -> None:
    model = nn.Sequential(merger())
    model[0].forward = model[0].forward  # as accelerate's hooks for offloaded modules do
    (change,) = connectors.apply(model)
    assert change.kernel is None
    assert "hook" in change.reason
    assert type(model[0]) is Mistral3PatchMerger


@pytest.mark.parametrize("make", [merger, projector])
def test_replaced_modules_are_pickled(make: Callable[[], nn.Module]) -> None:
    module = served(make())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(module)
    assert all(map(torch.equal, loaded.parameters(), module.parameters()))


def test_nothing_else_is_found_by_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Idefics3Connector'"):
        _ = connectors.Idefics3Connector


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_they_agree() -> None:
    pooling, x = served(projector()), torch.randn(2, 36, 12)
    torch.testing.assert_close(torch.compile(pooling, backend="aot_eager", fullgraph=True)(x), pooling(x))
    merging, grids = served(merger()), GRIDS["of all sizes"]
    x, sizes = torch.randn(sum(rows * columns for rows, columns in grids), 12), pixels(grids)
    torch.testing.assert_close(torch.compile(merging, backend="aot_eager")(x, sizes), merging(x, sizes))
    whole = torch.compile(merging, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x, sizes.tolist()), merging(x, sizes))

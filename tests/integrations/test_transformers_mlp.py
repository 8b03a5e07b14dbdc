"""MLPs of transformers on pyvlm: every served class, gradients, what is left alone, and undoing it."""

import copy
import inspect
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")

from integrations.transformers_models import FAMILIES
from tolerance import assert_close
from transformers.activations import ACT2FN
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from pyvlm.integrations.transformers import mlp
from pyvlm.integrations.transformers.mlp import MLPS, PIECE
from pyvlm.integrations.transformers.replacement import home_of

Make = Callable[..., nn.Module]


def make(activation: str = "silu") -> LlamaMLP:
    torch.manual_seed(3)
    return LlamaMLP(
        LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=4, hidden_act=activation)
    )


def make_plain(activation: str = "quick_gelu") -> CLIPMLP:
    torch.manual_seed(3)
    return CLIPMLP(
        CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_attention_heads=4, hidden_act=activation)
    )


both = pytest.mark.parametrize("make", [make, make_plain], ids=["gated", "plain"])


def like(original: type[nn.Module]) -> nn.Module:
    """A module of a served class, whatever its config is called: forward reads no more than this."""
    module = original.__new__(original)
    nn.Module.__init__(module)
    torch.manual_seed(4)
    source = inspect.getsource(original.forward)
    for name in re.findall(r"self\.(\w*(?:proj|fc1|fc2))\(", source):
        sizes = (40, 24) if name in ("down_proj", "fc2", "linear_fc2") else (24, 40)
        module.add_module(name, nn.Linear(*sizes))
    (name,) = re.findall(r"self\.(act\w*)\(", source)
    gated = "gate_proj" in source
    setattr(
        module,
        name,
        ACT2FN["gelu_pytorch_tanh" if "Gemma" in original.__name__ else "silu"] if gated else nn.GELU(),
    )
    return module


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    leaves = {"x": x, **dict(module.named_parameters())}
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y.square().sum(), list(leaves.values())), strict=True)
    )


def assert_alike(module: nn.Module, dtype: torch.dtype) -> None:
    module, x = module.to(dtype), torch.randn(3, 7, 24).to(dtype)
    plain = results(module, x)
    expected = results(copy.deepcopy(module).double(), x.double())
    (change,) = MLPS.apply(module)
    assert change.kernel == "pyvlm.ops.gated_activation"
    for name, result in results(module, x).items():
        assert_close(result, expected[name], plain[name], name)
    with torch.no_grad():  # written over the gate
        assert_close(module(x), expected["y"], plain["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "activation", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "relu", "relu2"]
)
@both
def test_every_activation(make: Make, activation: str, dtype: torch.dtype) -> None:
    assert_alike(make(activation), dtype)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_torchs_own_gelu(approximate: str) -> None:
    module = make_plain()
    module.activation_fn = nn.GELU(approximate)
    assert_alike(module, torch.float32)


@pytest.mark.parametrize("name", MLPS.folders)
def test_every_served_class_computes_what_it_did(name: str) -> None:
    home = pytest.importorskip(home_of(MLPS.folders[name]), reason=f"this transformers has no {name}")
    assert_alike(like(getattr(home, name)), torch.float32)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "llama4"])
def test_models_give_their_own_logits_and_undo_is_exact(name: str) -> None:
    model = FAMILIES[name].model()
    batch = FAMILIES[name].batch(model)
    classes = [type(module) for module in model.modules()]
    expected = model(**batch).logits
    changes = MLPS.apply(model)
    assert changes
    assert all(change.kernel for change in changes)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert MLPS.apply(model) == []  # they are served already
    for change in changes:
        change.undo()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize(
    ("make", "before", "after"),
    [
        (make, 4, 3),  # gate, its activation, up, and their product for the last projection
        (make_plain, 3, 2),  # what the activation is given, its sigmoid, what it gives
    ],
    ids=["gated", "plain"],
)
def test_training_keeps_one_tensor_less(make: Make, before: int, after: int) -> None:
    def kept(module: nn.Module) -> int:
        wide = set()

        def pack(x: Tensor) -> Tensor:
            if x.numel() == 2 * 5 * 40:
                wide.add(x.data_ptr())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            module(torch.randn(2, 5, 24))
        return len(wide)

    module = make()
    assert kept(module) == before
    MLPS.apply(module)
    assert kept(module) == after


@both
def test_what_a_hook_saw_is_not_overwritten(make: Make) -> None:
    module, seen = make(), []
    MLPS.apply(module)
    first = next(layer for layer in module.children() if isinstance(layer, nn.Linear))
    first.register_forward_hook(lambda module, given, out: seen.append(out))
    x = torch.randn(2, 24)
    with torch.no_grad():
        module(x)
        assert torch.equal(seen[0], nn.functional.linear(x, first.weight, first.bias))


@both
@pytest.mark.parametrize("shape", [(0, 24), (2 * PIECE + 1, 24), (3, PIECE, 24)])
def test_without_gradients_tokens_go_through_in_pieces(make: Make, shape: tuple[int, ...]) -> None:
    module, x = make(), torch.randn(shape)
    expected = module(x).detach()
    MLPS.apply(module)
    sizes: list[int] = []
    project = module._project
    module._project = lambda x, *layers: sizes.append(x.shape[0]) or project(x, *layers)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
    assert sum(sizes) == x.numel() // 24
    assert all(size <= PIECE for size in sizes)
    sizes.clear()
    module(x)
    assert len(sizes) == 1  # for a gradient all is kept anyway


@both
def test_elsewhere_than_on_the_cpu_all_tokens_go_through_at_once(make: Make) -> None:
    module = make()
    MLPS.apply(module)
    module.to("meta")
    sizes: list[int] = []
    project = module._project
    module._project = lambda x, *layers: sizes.append(x.shape[0]) or project(x, *layers)
    with torch.no_grad():
        module(torch.empty(2 * PIECE + 1, 24, device="meta"))
    assert sizes == [2 * PIECE + 1]


@pytest.mark.parametrize(("make", "name"), [(make, "up_proj"), (make_plain, "fc1")], ids=["gated", "plain"])
@pytest.mark.parametrize("watch", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_projection_that_is_watched_is_called_once(watch: str, make: Make, name: str) -> None:
    module, calls = make(), []
    MLPS.apply(module)
    getattr(module.get_submodule(name), watch)(lambda module, *seen: calls.append(seen[0][0].shape))
    with torch.no_grad():
        module(torch.randn(2 * PIECE, 24))
    assert calls == [(2 * PIECE, 24)]


@both
def test_an_activation_that_is_watched_is_called(make: Make) -> None:
    module, seen = make(), []
    MLPS.apply(module)
    function = module.act_fn if hasattr(module, "act_fn") else module.activation_fn
    function.register_forward_hook(lambda module, given, out: seen.append(out))
    x = torch.randn(2, 24)
    torch.testing.assert_close(module(x), make()(x))
    assert [out.shape for out in seen] == [(2, 40)]


@both
def test_frozen_projections_are_not_overwritten_where_the_input_learns(make: Make) -> None:
    module = make().requires_grad_(False)
    x = torch.randn(2, 24, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    MLPS.apply(module)
    (actual,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(actual, expected)


@both
def test_autocast(make: Make) -> None:
    module, x = make(), torch.randn(2, 3, 24)
    expected = module(x)
    MLPS.apply(module)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.01)


def unknown(module: LlamaMLP) -> Any:
    module.act_fn = nn.Tanh()


def hooked(module: LlamaMLP) -> Any:
    module.forward = module.forward


def elsewhere(module: LlamaMLP) -> Any:
    module.to("meta")


@pytest.mark.parametrize(
    ("change", "reason"),
    [(unknown, "activation Tanh"), (hooked, "a hook has taken"), (elsewhere, "no kernel on meta")],
)
def test_what_is_left_says_why(change: Any, reason: str) -> None:
    module = make()
    change(module)
    (made,) = MLPS.apply(module)
    assert made.kernel is None
    assert reason in made.reason
    assert type(module) is LlamaMLP


def test_modules_of_others_by_the_same_name_are_left() -> None:
    class LlamaMLP(nn.Module):
        pass

    assert MLPS.apply(LlamaMLP()) == []


@both
def test_replaced_modules_are_pickled(make: Make) -> None:
    module = make()
    MLPS.apply(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(module)
    x = torch.randn(2, 24)
    assert torch.equal(loaded(x), module(x))
    with pytest.raises(AttributeError, match="has no attribute 'OtherMLP'"):
        _ = mlp.OtherMLP


@both
def test_compiled_they_agree(make: Make, fresh_compiler: None) -> None:
    module, x = make(), torch.randn(2, 3, 24)
    MLPS.apply(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))

"""RMSNorms of transformers on pyvlm: every served class, gradients, mixed dtypes, memory, and undoing it."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers, an optional package, is not installed")

from tolerance import assert_close

from pyvlm.integrations.transformers import norms
from pyvlm.integrations.transformers.replacement import home_of

FOLDERS = norms.NORMS.folders | norms.UNIT_OFFSET_NORMS.folders


def make(name: str, eps: float = 1e-3) -> nn.Module:
    home = pytest.importorskip(home_of(FOLDERS[name]), reason=f"this transformers has no {name}")
    if not hasattr(home, name):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(3)
    module = getattr(home, name)(24, eps=eps)
    with torch.no_grad():
        module.weight += torch.randn(24) / 4
    return module


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    grads = torch.autograd.grad(y.square().sum(), (x, module.weight))
    return {"y": y.detach()} | dict(zip(("x", "weight"), grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FOLDERS)
def test_every_served_class_computes_what_it_did(name: str, dtype: torch.dtype) -> None:
    module = make(name).to(dtype)
    x = torch.randn(2, 7, 3, 24).to(dtype).transpose(1, 2)
    plain = results(module, x)
    wide = copy.deepcopy(module).double()
    (change,) = norms.apply(module)
    assert change.kernel == "pyvlm.ops.rms_norm"
    expected = results(exact(wide, name), x.double())
    for what, result in results(module, x).items():
        assert result.dtype == plain[what].dtype
        assert_close(result, expected[what], plain[what], what)


def exact(module: nn.Module, name: str) -> nn.Module:
    """The norm in float64, where transformers' own falls back to float32."""

    class Exact(nn.Module):
        weight = module.weight

        def forward(self, x: Tensor) -> Tensor:
            eps = getattr(module, "eps", None) or module.variance_epsilon
            scale = module.weight + (name in norms.UNIT_OFFSET_NORMS.folders)
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale

    return Exact()


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "Llama4TextRMSNorm", "Gemma3RMSNorm"])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_mixed_dtypes_give_the_dtype_they_gave(name: str, of_weight: torch.dtype) -> None:
    other = torch.bfloat16 if of_weight == torch.float32 else torch.float32
    module, x = make(name).to(of_weight), torch.randn(5, 24).to(other)
    expected = results(module, x)
    norms.apply(module)
    for what, result in results(module, x).items():
        assert result.dtype == expected[what].dtype
        torch.testing.assert_close(result, expected[what], rtol=2e-2, atol=2e-2)


def test_undo_is_exact() -> None:
    module, x = make("Gemma3RMSNorm"), torch.randn(5, 24)
    original, expected = type(module), module(x)
    (change,) = norms.apply(module)
    assert norms.apply(module) == []  # it is served already
    change.undo()
    assert type(module) is original
    assert torch.equal(module(x), expected)


def test_training_keeps_no_float32_copies() -> None:
    def kept(module: nn.Module) -> int:
        tensors = {}

        def pack(x: Tensor) -> Tensor:
            tensors[x.data_ptr()] = x
            return x

        x = torch.randn(50, 24, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            module(x)
        return sum(x.nbytes for x in tensors.values())

    module = make("Gemma3RMSNorm").bfloat16()
    assert kept(module) > 2 * 50 * 24 * 4
    norms.apply(module)
    assert kept(module) == 50 * 24 * 2 + 50 * 4 + 24 * 2


@pytest.mark.parametrize("name", ["Qwen2RMSNorm", "Gemma3RMSNorm"])
def test_replaced_modules_are_pickled(name: str) -> None:
    module = make(name)
    norms.apply(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(module)
    x = torch.randn(2, 24)
    assert torch.equal(loaded(x), module(x))


def test_what_is_unknown_is_an_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'OtherRMSNorm'"):
        _ = norms.OtherRMSNorm


def hooked(module: nn.Module) -> Any:
    module.forward = module.forward


@pytest.mark.parametrize(
    ("change", "reason"),
    [(hooked, "a hook has taken"), (lambda module: module.to("meta"), "no kernel on meta")],
)
def test_what_is_left_says_why(change: Any, reason: str) -> None:
    module = make("Qwen2RMSNorm")
    original = type(module)
    change(module)
    (made,) = norms.apply(module)
    assert made.kernel is None
    assert reason in made.reason
    assert type(module) is original


def test_compiled_they_agree(fresh_compiler: None) -> None:
    module, x = make("Gemma3RMSNorm"), torch.randn(2, 3, 24)
    norms.apply(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))

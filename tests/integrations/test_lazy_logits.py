"""Lazy logits are a tensor as any other to those who use them, and cost nothing to those who do not."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvlm.integrations.transformers.lazy_logits import LazyLogits, lazy_logits

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def inputs() -> Inputs:
    return tuple(torch.randn(shape, requires_grad=True) for shape in ((2, 4, 3), (5, 3), (5,)))  # type: ignore


def written(x: Tensor) -> Tensor:
    x[:, 0] = 3.0
    return x


def written_through_a_view(x: Tensor) -> Tensor:
    view, before = x[:, 0], x.bfloat16() * 2
    view.zero_()
    return before + x + x * 2


def derived_before_a_write(x: Tensor) -> Tensor:
    doubled = x * 2
    x.mul_(3.0)
    return doubled + x


def write_into_the_derived(x: Tensor) -> Tensor:
    doubled = x * 2
    doubled.mul_(3.0)
    return doubled + x


def write_into_an_alias(x: Tensor) -> Tensor:
    x.detach().zero_()
    return x * 2


def out_argument(x: Tensor) -> Tensor:
    out = torch.empty(x.shape)
    torch.add(x.detach(), 1, out=out)
    return out


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x * 1,
    "softcap": lambda x: torch.tanh(x / 3.0) * 3.0,
    "float64": lambda x: x.double() / 2,
    "bfloat16": lambda x: x.bfloat16().float() * 0.5,
    "last token": lambda x: x[:, -1],
    "cross-entropy": lambda x: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, 5), torch.arange(6) % 5),
    "log_softmax": lambda x: x.log_softmax(-1),
    "sum of two": lambda x: torch.cat([x, x * 2]),
    "iteration": lambda x: torch.stack([row.max() for row in x]),
    "masked": lambda x: x.masked_fill(x > 0, -1.0),
    "where": lambda x: torch.where(x > 0, x, -x),
    "copied into another": lambda x: torch.zeros(2, 4, 5).copy_(x),
    "times a tensor": lambda x: x * torch.tensor(2.0),
    "argmax": lambda x: x.argmax(-1),
    "checkpointed": lambda x: torch.utils.checkpoint.checkpoint(torch.exp, x, use_reentrant=False),
    "written": written,
    "written through a view": written_through_a_view,
    "derived before a write": derived_before_a_write,
    "write into the derived": write_into_the_derived,
    "write into an alias": write_into_an_alias,
    "out argument": out_argument,
}


@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients(op: str, inputs: Inputs) -> None:
    results = []
    for head in (F.linear, lazy_logits):
        y = OPS[op](head(*inputs))
        grads = torch.autograd.grad(y.float().square().sum(), inputs) if y.requires_grad else ()
        results.append((y.detach().clone(), *grads))
    for mine, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine + 0, plain + 0)


LAZY = ("itself", "softcap", "float64", "bfloat16")


@pytest.mark.parametrize("op", LAZY)
def test_what_stays_lazy(op: str, inputs: Inputs) -> None:
    logits = lazy_logits(*inputs)
    y = OPS[op](logits)
    described = (
        y.shape,
        y.dtype,
        y.device,
        y.stride(),
        y.is_contiguous(),
        y.requires_grad,
        y.is_leaf,
        len(y),
    )
    plain = OPS[op](F.linear(*inputs))
    assert isinstance(y, LazyLogits)
    assert isinstance(y, Tensor)
    assert described == (
        *(plain.shape, plain.dtype, plain.device, plain.stride(), plain.is_contiguous()),
        *(plain.requires_grad, plain.is_leaf, len(plain)),
    )
    assert y.grad_fn is not None
    assert (y.behind.computed, logits.behind.computed) == (None, None)


def test_source_is_what_the_logits_are_made_of(inputs: Inputs) -> None:
    for op in (*LAZY, "granite, then gemma"):
        y = (
            (torch.tanh(lazy_logits(*inputs) * 6.0 / 3.0) * 3.0)
            if "gemma" in op
            else OPS[op](lazy_logits(*inputs))
        )
        source = y.source
        assert source.hidden is inputs[0]
        z = F.linear(source.hidden, source.weight, source.bias) * source.scale
        if source.softcap is not None:
            z = source.softcap * torch.tanh(z / source.softcap)
        torch.testing.assert_close(y + 0, z.to(y.dtype), rtol=1e-2 if op == "bfloat16" else 1e-6, atol=1e-6)
    assert (torch.tanh(lazy_logits(*inputs) / 30.0) * 30.0).source.scale == 1.0
    detached = lazy_logits(*inputs).detach().source
    assert not any(x.requires_grad for x in (detached.hidden, detached.weight, detached.bias))


@pytest.mark.parametrize(
    "op",
    [
        lambda x: torch.tanh(torch.tanh(x)),
        lambda x: torch.tanh(x) * -1.0,
        lambda x: x * torch.tensor(2.0),
        lambda x: x[:, 1:],
        lambda x: x.to(torch.int64),
        written,
    ],
)
def test_other_ops_have_no_source(op: Callable[[Tensor], Tensor], inputs: Inputs) -> None:
    logits = lazy_logits(*inputs)
    y = op(logits)
    assert logits.behind.computed is not None
    assert not isinstance(y, LazyLogits) or y.source is None


def test_the_product_is_made_once(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(args) or linear(*args))
    logits = lazy_logits(*inputs)
    both = logits.double() + logits.exp() + logits.sum()
    assert both.isfinite().all()
    assert len(calls) == 1


def test_autocast(inputs: Inputs) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        lazy, plain = lazy_logits(*inputs), F.linear(*inputs)
    assert lazy.dtype == torch.bfloat16
    assert torch.equal(lazy.view(lazy.shape), plain)
    for mine, theirs in zip(
        torch.autograd.grad(lazy.float().sum(), inputs),
        torch.autograd.grad(plain.float().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_autocast_at_reading_changes_nothing(inputs: Inputs) -> None:
    lazy = lazy_logits(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        read = lazy + 0
    assert torch.equal(read, F.linear(*inputs))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any], inputs: Inputs) -> None:
    with mode():
        lazy = lazy_logits(*inputs)
        assert not lazy.requires_grad
        assert torch.equal(lazy.float() * 2, F.linear(*inputs) * 2)


def test_first_and_second_derivatives(inputs: Inputs) -> None:
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(lambda *x: lazy_logits(*x).exp(), exact)
    assert torch.autograd.gradgradcheck(lambda *x: lazy_logits(*x).exp(), exact)


def test_memory_is_there_where_it_is_asked_for(inputs: Inputs) -> None:
    plain = F.linear(*inputs).detach()

    def lazy() -> Tensor:
        return lazy_logits(*inputs).detach()

    def same(x: Tensor) -> bool:
        return type(x) is Tensor and torch.equal(x, plain)

    assert np.array_equal(lazy().numpy(), plain.numpy())
    assert np.array_equal(np.array(lazy()), plain.numpy())
    assert lazy().tolist() == plain.tolist()
    assert lazy()[0, 0, 0].item() == plain[0, 0, 0].item()
    assert repr(lazy()) == repr(plain)
    assert f"{lazy()}" == f"{plain}"
    assert same(copy.deepcopy(lazy()))
    assert same(pickle.loads(pickle.dumps(lazy())))
    assert same(torch.from_dlpack(lazy()))
    assert same(lazy().cpu().view(2, 4, 5))
    assert lazy().untyped_storage().size() == plain.untyped_storage().size()
    assert lazy().data_ptr() != 0
    file = io.BytesIO()
    torch.save({"logits": lazy_logits(*inputs).detach()}, file)
    file.seek(0)
    assert same(torch.load(file)["logits"])


def test_what_a_plain_tensor_refuses_is_refused(inputs: Inputs) -> None:
    with pytest.raises(RuntimeError, match="requires grad"):
        lazy_logits(*inputs).numpy()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(lazy_logits(*inputs))


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_reading_after_a_change_is_refused(changed: int, inputs: Inputs) -> None:
    lazy, read = lazy_logits(*inputs), lazy_logits(*inputs)
    assert read.sum().isfinite()
    with torch.no_grad():
        inputs[changed].add_(1)
    with pytest.raises(RuntimeError, match=r"before optimizer\.step"):
        lazy.sum()
    assert read.sum().isfinite()


def test_hooks_see_who_reads_and_retain_grad_is_refused(inputs: Inputs) -> None:
    lazy, seen = lazy_logits(*inputs), []
    lazy.register_hook(seen.append)
    assert lazy.behind.computed is None
    lazy.sum().backward()
    assert torch.equal(seen[0], torch.ones(2, 4, 5))
    with pytest.raises(RuntimeError, match="retain_grad: the loss is computed without"):
        lazy_logits(*inputs).retain_grad()


def test_compiled_functions_take_them(inputs: Inputs, fresh_compiler: None) -> None:
    compiled = torch.compile(lambda x: x.log_softmax(-1).sum(), backend="aot_eager")
    y = compiled(lazy_logits(*inputs))
    torch.testing.assert_close(y, F.linear(*inputs).log_softmax(-1).sum())

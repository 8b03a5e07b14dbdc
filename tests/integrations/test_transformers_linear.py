"""Linear layers that are swapped where they measure faster, and put back."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_causal_models import batch, build
from torch import Tensor, nn

from pyvlm.integrations.transformers import linear as integration
from pyvlm.integrations.transformers import loss
from pyvlm.integrations.transformers.linear import apply, decodes_faster_on, faster_on
from pyvlm.nn.linear import DecodingLinear, Linear
from pyvlm.ops import _backends

NATIVE = _backends.why_unavailable("linear", "native", torch.device("cpu")) is None
needs_native = pytest.mark.skipif(not NATIVE, reason="the native extension is not built")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, int], torch.dtype]]:
    """The measurement answers 2 for wide outputs and 1.05 for others, and notes what it was asked.

    Of a single token it answers 1.3 for narrow outputs and 1.06 for others.
    """
    asked: list[tuple[tuple[int, int], torch.dtype]] = []

    def faster(shape: tuple[int, int], dtype: torch.dtype) -> float:
        asked.append((shape, dtype))
        return 2.0 if shape[0] > 32 else 1.05

    monkeypatch.setattr(integration, "faster_on", faster)
    monkeypatch.setattr(integration, "decodes_faster_on", lambda shape, dtype: 1.3 if shape[0] < 32 else 1.06)
    return asked


@needs_native
def test_layers_that_measure_faster_are_swapped(measured: list[object]) -> None:
    model = build("llama")
    keys, identity = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    changes = {change.module: change for change in apply(model)}
    swapped = {name for name, change in changes.items() if change.kernel == "pyvlm.ops.linear"}
    wide = {n for n, m in model.named_modules() if type(m) is Linear}
    assert wide == {"lm_head", *(f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up"))}
    narrow = {n for n, m in model.named_modules() if type(m) is DecodingLinear}
    assert narrow == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in ("k", "v")}
    assert swapped == wide | narrow
    assert changes["model.layers.0.self_attn.k_proj"].reason == (
        "1.05 times as fast as torch, forward and backward of 256 tokens, and 1.30 times for one token; "
        "only decoded tokens take it"
    )
    assert "2.00 times as fast" in changes["lm_head"].reason
    assert "no second derivative" in changes["lm_head"].reason
    refused = changes["model.layers.0.self_attn.q_proj"]
    assert (refused.kernel, refused.undo) == (None, None)
    assert refused.reason.startswith("1.05 times as fast")
    assert refused.reason.endswith("and 1.06 times for one token, expected 1.1 or more")
    assert ((48, 32), torch.float32) in measured
    assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == identity


@needs_native
def test_results_agree_and_undo_restores(measured: list[object]) -> None:
    plain, ours = build("llama"), build("llama")
    changes = apply(ours)
    losses = [model(**batch("llama")).loss for model in (plain, ours)]
    torch.testing.assert_close(losses[1], losses[0])
    for each in losses:
        each.backward()
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)
    before = {name: vars(m).keys() for name, m in plain.named_modules()}
    for change in changes:
        if change.undo is not None:
            change.undo()
    assert {type(m) for m in ours.modules()} == {type(m) for m in plain.modules()}
    assert {name: vars(m).keys() for name, m in ours.named_modules()} == before


@needs_native
def test_only_exact_plain_layers_are_looked_at(measured: list[object]) -> None:
    class Quantised(nn.Linear):
        pass

    patched = nn.Linear(4, 64)
    patched.forward = patched.forward
    model = nn.ModuleDict({"a": nn.Linear(4, 64), "b": Quantised(4, 64), "c": patched, "d": nn.Linear(4, 64)})
    changes = {change.module: change for change in apply(model, where=lambda name: name != "d")}
    assert changes.keys() == {"a", "c"}
    assert changes["a"].kernel is not None
    assert changes["c"].reason == "another library has replaced its forward"
    assert [type(m) for m in model.values()] == [Linear, Quantised, nn.Linear, nn.Linear]


@needs_native
def test_layers_elsewhere_are_refused(measured: list[object]) -> None:
    (change,) = apply(nn.Linear(4, 64, device="meta"))
    assert change.kernel is None
    assert "runs on cpu tensors only" in change.reason
    assert measured == []


@needs_native
def test_base_layers_of_peft_are_swapped(measured: list[object]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["gate_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    model = peft.get_peft_model(build("llama"), config)
    plain = copy.deepcopy(model)
    names = {change.module for change in apply(model) if change.kernel is not None}
    assert "base_model.model.model.layers.0.mlp.gate_proj.base_layer" in names
    torch.testing.assert_close(model(**batch("llama")).loss, plain(**batch("llama")).loss)


@needs_native
def test_a_head_that_the_loss_serves_is_left_to_it(measured: list[object]) -> None:
    model = build("llama")
    (change,) = loss.apply(model)
    assert "lm_head" not in {c.module for c in apply(model)}
    change.undo()
    assert type(model.lm_head) is nn.Linear


@needs_native
def test_decoding_alone(measured: list[object]) -> None:
    """One token goes through the op where no gradient is wanted, and all else is torch's bit by bit."""
    layer = nn.Linear(40, 30)
    plain = copy.deepcopy(layer)
    (change,) = apply(layer)
    assert type(layer) is DecodingLinear
    token, many = torch.randn(1, 40), torch.randn(50, 40)
    assert layer(token).equal(plain(token))
    with torch.no_grad():
        assert layer(token).equal(torch.ops.pyvlm.linear(token, plain.weight, plain.bias))
        assert layer(many).equal(plain(many))
    change.undo()
    assert type(layer) is nn.Linear


@pytest.fixture
def unmeasured() -> Iterator[None]:
    """No measurement is known yet, and none that the test made is kept."""
    for measurement in (integration._faster_on, integration._decodes_faster_on):
        measurement.cache_clear()
    yield
    for measurement in (integration._faster_on, integration._decodes_faster_on):
        measurement.cache_clear()


MEASUREMENTS = pytest.mark.parametrize(
    ("measure", "ours", "tokens"),
    [(faster_on, "linear", integration.TOKENS), (decodes_faster_on, "few_tokens", 1)],
    ids=["many tokens", "one"],
)


@needs_native
@pytest.mark.parametrize("inference", [False, True])
@MEASUREMENTS
@pytest.mark.usefixtures("unmeasured")
def test_the_measurement_is_made_once_and_leaves_no_trace(
    measure: Callable[..., float], ours: str, tokens: int, monkeypatch: pytest.MonkeyPatch, inference: bool
) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(integration, "READ_BYTES", 1)  # one weight
    monkeypatch.setattr(integration, ours, lambda x, w, b: calls.append(x) or nn.functional.linear(x, w))
    state = torch.get_rng_state()
    with torch.inference_mode(inference):
        ratio = measure((8, 16), torch.float32)
        assert measure((8, 16), torch.float32) == ratio
    assert len(calls) == integration.ROUNDS + 1
    assert calls[0].shape == (tokens, 16)
    assert ratio > 0
    assert torch.equal(torch.get_rng_state(), state)


@needs_native
@MEASUREMENTS
@pytest.mark.usefixtures("unmeasured")
def test_the_ratio_is_that_of_the_times(
    measure: Callable[..., float], ours: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only ours, then only theirs, moves forward."""
    now = [0.0]

    def product(seconds: float):
        def run(x: Tensor, weight: Tensor, bias: None) -> Tensor:
            now[0] += seconds
            return x @ weight.T

        return run

    monkeypatch.setattr(integration, "READ_BYTES", 3 * 4 * 8 * 16)  # three weights
    monkeypatch.setattr(integration.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(integration, ours, product(1.0))
    monkeypatch.setattr(integration.nn.functional, "linear", product(3.0))
    assert measure((8, 16), torch.float32) == 3.0

"""Values and gradients of every op on a GPU: the shared cases, dtypes, options, and authors' stored outputs.

On the CPU a few cases of each family are enough to show that the bodies run: other tests go through them all.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import attention.test_layout_conformance
import fusion.test_fusion_conformance
import moe.test_moe_conformance
import pytest
import torch
from attention.cases import SMALL_CASES, AttentionCase
from attention.checks import assert_results_close
from conformance import Case
from gpu.calls import CALLS, LONGER, runs_on_kernels
from gpu.devices import on
from moe.moe_helpers import check_lists
from tolerance import assert_close
from torch import Tensor

from benchmarks.__main__ import OPERATIONS, load
from benchmarks.harness.run import DTYPES, run_pass
from benchmarks.harness.verify import Expected, verify
from pyvlm.nn.moe_options import RouterOptions
from pyvlm.nn.moe_routing import TokenGroups
from pyvlm.ops import (
    Routing,
    expert_choice,
    expert_mlp,
    gated_activation,
    linear_cross_entropy,
    merge_routings,
    patches_to_token,
    routing_from_choices,
    threshold_choice,
    token_choice,
)
from pyvlm.reference.gating import ACTIVATIONS

HALVES_AND_FLOAT = ("fp32", "bf16", "fp16")
# Of one channel the norm is 0 and so are gradients, but for rounding; of no label plain PyTorch makes NaN.
NOT_BY_THE_POLICY = {"fusion": ("one-number", "one-channel"), "loss": ("no-label", "no-token")}


def every_case() -> Iterator[Any]:
    """Of each op's cases the first and the last on the CPU, and all on a GPU: each by itself, for each
    compiles kernels of its own."""
    for family in OPERATIONS:
        if family == "models":  # whole models: no op
            continue
        not_these = NOT_BY_THE_POLICY.get(family, ())
        names = [name for name in load(family).case_names if name not in not_these]
        for device, chosen in (("cpu", {names[0], names[-1]}), ("cuda", names)):
            for case in sorted(chosen):
                yield from (
                    on(device, family, case, dtype, name=f"-{family}-{case}-{dtype}")
                    for dtype in HALVES_AND_FLOAT
                )


@pytest.mark.parametrize(("device", "family", "case", "dtype"), list(every_case()))
def test_every_case(family: str, case: str, dtype: str, device: torch.device) -> None:
    """Forward, and forward and backward, within the policy of tolerances."""
    operation = load(family)
    (work,) = operation.workloads(device, [DTYPES[dtype]], [case], quick=True)
    expected = Expected.of(operation, work)
    function = operation.providers[0].build(work)
    assert len(work.costs) >= 1
    for name in work.costs:
        problem = verify(run_pass(function, work, name)(), expected)
        assert problem is None, f"{name}: {problem}"


def attention_cases() -> Iterator[Any]:
    """As they are, most of which few queries' kernel serves, and of several tiles."""
    for factor in (1, LONGER):
        for device, chosen in (("cpu", SMALL_CASES[:: len(SMALL_CASES) // 3]), ("cuda", SMALL_CASES)):
            for case in chosen:
                yield on(device, case.times(factor), name=f"-{case.name}-times-{factor}")


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize(("device", "case"), list(attention_cases()))
def test_attention_with_lse_and_sinks(case: AttentionCase, dtype: str, device: torch.device) -> None:
    q, k, v, _ = case.inputs(DTYPES[dtype], device)
    sinks = case.sink_scores(DTYPES[dtype], device)
    assert_results_close("auto", q, k, v, case.spans(device), case.scale, case.softcap, sinks)


# Tiles are chosen by the head dimension, up to 64, 128 and 256; 72 and 96 are padded.
@pytest.mark.parametrize("head_dim", [16, 64, 72, 96, 128, 160, 256])
@pytest.mark.parametrize("rule", ["causal", "mmca", "all_images"])  # one range, two softmaxes, one of two
def test_every_table_of_attentions_tiles(rule: str, head_dim: int, device: torch.device) -> None:
    """Rows of several tiles, whole images in one of them, at the tiles that run."""
    rows = ("t70 i300 t90 i130 t45",) if device.type == "cuda" else ("t7 i30 t9 i13 t4",)
    case = AttentionCase("tiles", "", rule, rows, heads=2, kv_heads=1, head_dim=head_dim)
    q, k, v, _ = case.inputs(torch.bfloat16, device)
    assert_results_close("auto", q, k, v, case.spans(device))


@pytest.mark.parametrize("keys", [40, 1000])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rule", ["causal", "mmca"])
def test_decoding(rule: str, head_dim: int, keys: int, device: torch.device) -> None:
    rows = (f"t9 i{keys // 2} t{keys - 9 - keys // 2}", f"p{keys // 2} t{keys - keys // 2}")
    case = AttentionCase("decode", "", rule, rows, heads=8, kv_heads=2, head_dim=head_dim, query_start=-1)
    q, k, v, _ = case.inputs(torch.bfloat16, device)
    assert_results_close("auto", q, k, v, case.spans(device))


def of_experts(
    leaves: dict[str, Tensor], routing: Routing, activation: str, gated: bool, backend: str, like: Tensor
) -> dict[str, Tensor]:
    """y and all gradients, those of the routing's weights among them."""
    given = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    weight = routing.weight.detach().to(torch.promote_types(like.dtype, torch.float32)).requires_grad_()
    routing = Routing(
        routing.token, weight, routing.expert_offsets, routing.token_offsets, routing.slot, routing.num_tokens
    )
    x, *layer = given.values()
    names = dict(zip(list(given)[1:], layer, strict=True))
    y = expert_mlp(x, routing, **names, activation=activation, gated=gated, backend=backend)
    grads = torch.autograd.grad(y, [*given.values(), weight], like.to(y.dtype))
    return {"y": y.detach()} | dict(zip([*given, "weight"], grads, strict=True))


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_kind_of_expert(activation: str, gated: bool, dtype: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    tokens, experts, hidden, intermediate = (300, 4, 96, 136) if device.type == "cuda" else (33, 3, 24, 20)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, DTYPES[dtype])

    rows = 2 * intermediate if gated else intermediate
    leaves = {
        "x": normal(tokens, hidden),
        "gate_up": normal(experts, rows, hidden, scale=hidden**-0.5),
        "down": normal(experts, hidden, intermediate, scale=intermediate**-0.5),
        "gate_up_bias": normal(experts, rows),
        "down_bias": normal(experts, hidden),
    }
    routing = token_choice(torch.randn(tokens, experts, generator=generator), 2, tokens // 2).to(device)
    cotangent = normal(tokens, hidden)
    actual = of_experts(leaves, routing, activation, gated, "auto", cotangent)
    plain = of_experts(leaves, routing, activation, gated, "reference", cotangent)
    wide = {name: x.double() for name, x in leaves.items()}
    expected = of_experts(wide, routing, activation, gated, "reference", cotangent.double())
    for name, value in actual.items():
        assert_close(value, expected[name], plain[name], name)


LOSS_OPTIONS = ({}, {"reduction": "sum"}, {"softcap": 1.5}, {"label_smoothing": 0.2}, {"z_loss": 0.3})


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_every_option_of_the_loss(options: dict[str, Any], dtype: str, device: torch.device) -> None:
    call = CALLS["linear_cross_entropy"](device, DTYPES[dtype])
    labels = call.static["labels"]

    def results(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in call.leaves]
        hidden, weight, bias = leaves
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, **options, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    plain, expected = results(DTYPES[dtype], "reference"), results(torch.float64, "reference")
    for i, value in enumerate(results(DTYPES[dtype], "auto")):
        assert_close(value, expected[i], plain[i].to(value.dtype), f"result {i}")


def test_where_no_row_has_a_label_the_loss_and_its_gradients_are_zero(device: torch.device) -> None:
    for tokens in (0, 6):
        hidden, weight = (torch.randn(n, 16).to(device).requires_grad_() for n in (tokens, 20))
        labels = torch.full((tokens,), -100, device=device)
        loss = linear_cross_entropy(hidden, weight, labels)
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert loss.item() == 0
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", ["fp64", *HALVES_AND_FLOAT])
def test_routers(dtype: str, device: torch.device) -> None:
    """The lists are whole in every dtype; in float64, where no rounding decides, they are the reference's."""
    logits = torch.randn(777, 8, generator=torch.Generator().manual_seed(5)).to(device, DTYPES[dtype])
    groups = torch.tensor([0, 300, 301, 777], device=device)
    routers = {
        "expert choice": lambda backend: expert_choice(logits, 40, groups, backend=backend),
        "expert choice of one group": lambda backend: expert_choice(logits, 101, backend=backend),
        "token choice": lambda backend: token_choice(logits, 3, backend=backend),
        "token choice as it is": lambda backend: token_choice(logits, 3, normalize=False, backend=backend),
    }
    for name, router in routers.items():
        routing, expected = router("auto").to("cpu"), router("reference").to("cpu")
        check_lists(routing)
        assert routing.expert_offsets.equal(expected.expert_offsets), name
        if dtype == "fp64":
            assert routing.token.equal(expected.token), name
            assert routing.slot.equal(expected.slot), name
            torch.testing.assert_close(routing.weight, expected.weight)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize(
    "router", ["expert choice", "token choice", "token choice as it is", "with a capacity", "threshold"]
)
def test_gradients_of_routers(router: str, dtype: str, device: torch.device) -> None:
    """Of the weights of those slots that the router has chosen, whichever a rounding decides."""
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(777, 8, generator=generator).to(device, DTYPES[dtype]).requires_grad_()
    groups = torch.tensor([0, 300, 301, 777], device=device)
    routers = {
        "expert choice": lambda: expert_choice(logits, 40, groups),
        "token choice": lambda: token_choice(logits, 3),
        "token choice as it is": lambda: token_choice(logits, 3, normalize=False),
        "with a capacity": lambda: token_choice(logits, 3, capacity=200),
        "threshold": lambda: threshold_choice(logits, torch.full((8,), 0.2, device=device)),
    }
    routing = routers[router]()
    token, expert = routing.token.long(), routing.expert
    cotangent = torch.randn(len(token), generator=generator).to(device)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = logits.detach().to(dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        weight = leaf.softmax(-1, dtype=wide)[token, expert]
        if router in ("token choice", "with a capacity"):
            weight = weight / weight.new_zeros(len(leaf)).index_add(0, token, weight)[token]
        return torch.autograd.grad(weight, leaf, cotangent.to(wide))[0]

    (actual,) = torch.autograd.grad(routing.weight, logits, cotangent)
    assert actual.dtype == logits.dtype
    assert_close(actual, gradient(torch.float64), gradient(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_patches_to_token(dtype: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(9)
    shapes = ((2, 36, 120), (2, 24, 200), (96, 360), (96, 400), (96,), (96,))
    leaves = [torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for shape in shapes]
    leaves = [x.to(device, DTYPES[dtype]) for x in leaves]
    cotangent = torch.randn(2, 24, 96, generator=generator).to(device, DTYPES[dtype])

    def results(dtype: torch.dtype, backend: str) -> list[Tensor]:
        given = [x.to(dtype).detach().requires_grad_() for x in leaves]
        out = patches_to_token(given[:2], given[2:4], (3, 2), given[4:], backend=backend)
        return [out.detach(), *torch.autograd.grad(out, given, cotangent.to(dtype))]

    plain, expected = results(DTYPES[dtype], "reference"), results(torch.float64, "reference")
    for i, value in enumerate(results(DTYPES[dtype], "auto")):
        assert_close(value, expected[i], plain[i], f"result {i}")


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_an_activation_written_over_the_gate(gated: bool, dtype: str, device: torch.device) -> None:
    joint = torch.randn(90, 2 * 1300, generator=torch.Generator().manual_seed(10)).to(device, DTYPES[dtype])
    gate, up = joint.chunk(2, dim=-1)  # halves of rows that lie further apart
    before = up.clone()
    expected = gated_activation(gate.clone(), up if gated else None)
    out = gated_activation(gate, up if gated else None, inplace=True)
    assert out.equal(expected)
    assert out.data_ptr() == gate.data_ptr()
    assert gate.equal(expected)
    assert up.equal(before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(0, 4, 2), (1, 128, 8), (33, 300, 8), (293, 60, 7), (40_000, 128, 8)]
)
def test_routing_from_choices(
    tokens: int, experts: int, top_k: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(6)
    index = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.to(device, dtype)
    index[1::2] = index[1::2, :1]  # every other token names one expert K times
    weight = torch.rand(tokens, top_k, generator=generator).to(device)
    routing = routing_from_choices(index, weight, experts).to("cpu")
    expected = routing_from_choices(index, weight, experts, backend="reference").to("cpu")
    for name in ("token", "weight", "expert_offsets", "token_offsets", "slot"):
        assert getattr(routing, name).equal(getattr(expected, name)), name
    index[: tokens // 2, 0] = experts  # of another device
    dropped = routing_from_choices(index, weight, experts, drop_out_of_range=True)
    assert len(dropped.token) == int((index < experts).sum())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("tokens", "images"), [(0, 5), (40, 0), (7_000, 5_000)])
def test_merge_routings(tokens: int, images: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randperm(tokens + images + 9, generator=generator)
    logits = torch.randn(tokens + images, 8, generator=generator)
    parts = [
        (token_choice(logits[:tokens], 2), rows[:tokens].sort().values.to(dtype)),
        (expert_choice(logits[tokens:], 700), rows[tokens:-9].sort().values.to(dtype)),
    ]
    there = [(routing.to(device), of_part.to(device)) for routing, of_part in parts]
    merged, expected = merge_routings(there, len(rows)).to("cpu"), merge_routings(parts, len(rows))
    check_lists(merged)
    for name in ("token", "weight", "expert_offsets", "token_offsets", "slot"):
        assert getattr(merged, name).equal(getattr(expected, name)), name


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.25])
def test_capacities_of_images_are_those_that_the_host_counts_with(
    factor: float, device: torch.device
) -> None:
    """A device that rounds otherwise would make other slots than there is memory for."""
    sizes = list(range(0, 1500, 5))
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(device)
    rows = torch.arange(sum(sizes), device=device)
    groups = TokenGroups(rows[:0], rows, offsets, torch.ones_like(rows, dtype=torch.bool), sizes)
    for experts in range(2, 33):
        capacity, slots = groups.image_capacity(RouterOptions(experts, capacity_factor=factor), experts)
        assert experts * capacity.minimum(offsets.diff()).sum().item() == slots


def test_the_kernels_are_what_runs(gpu: torch.device) -> None:
    """Else all of this would compare the reference with itself."""
    for make in CALLS.values():
        call = make(gpu, torch.bfloat16)
        assert runs_on_kernels(call.op, gpu, torch.bfloat16), call.op
    for op in ("expert_choice", "token_choice", "routing_from_choices", "merge_routings"):
        assert runs_on_kernels(op, gpu, torch.float32), f"{op}: _C_cuda is not there"


def conformance_tests() -> Iterator[Any]:
    """Every test of stored outputs with each of its cases, to be called with the case on another device."""
    for module in (
        attention.test_layout_conformance,
        moe.test_moe_conformance,
        fusion.test_fusion_conformance,
    ):
        for name, test in vars(module).items():
            for mark in getattr(test, "pytestmark", ()) if name.startswith("test_") else ():
                for case in mark.args[1]:
                    yield pytest.param(test, *case.values, id=f"{name}-{case.id}", marks=case.marks)


@pytest.mark.parametrize(("test", "case"), list(conformance_tests()))
def test_authors_outputs(test: Any, case: Case, device: torch.device) -> None:
    arguments = {"backend": "auto"} if "backend" in inspect.signature(test).parameters else {}
    with device:  # what the test makes of its own lies there too
        test(case=case.to(device), **arguments)

"""The ops as citizens of torch on a GPU: opcheck, compile, CUDA graphs, no wait, the same bits, no peeking.

On the CPU the same bodies run on the native kernels, less what only a GPU has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attention.cases import PACKED, PADDED, AttentionCase
from gpu.calls import CALLS, LONGER, OpCall, attention_call, attention_case, loss_call, routed_call, sized
from pyvlm.triton_kernels.attention import default_config
from pyvlm.triton_kernels.attention_forward import forward_kernel
from tolerance import assert_conforms
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from pyvlm.layout import IMAGE, PADDING, TEXT, TokenLayout
from pyvlm.nn import MoE, TokenGroups
from pyvlm.ops import (
    expert_choice,
    expert_mlp,
    importance_loss,
    load_balancing_loss,
    load_loss,
    router_z_loss,
    span_attention,
    token_choice,
)

each_call = pytest.mark.parametrize("name", CALLS)
ON_A_CPU = ("merge_levels", "add_at_image_tokens")


def slow_on(device: torch.device, name: str) -> None:
    if device.type == "cpu" and name not in ON_A_CPU:
        pytest.skip("on the CPU the family's own tests do this, and it takes seconds")


class _Recorded(TorchDispatchMode):
    """The calls of pyvlm's torch ops inside, those of backwards among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pyvlm":
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def leaf(value: Any, with_gradient: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(leaf(item, with_gradient) for item in value)
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(with_gradient and value.is_floating_point())


@each_call
def test_opcheck(name: str, device: torch.device) -> None:
    slow_on(device, name)
    call = CALLS[name](device, torch.float32)
    with _Recorded() as recorded:
        call.results()
    names = {func._opname for func, _ in recorded.calls}
    assert {call.op, f"{call.op}_backward"} <= names
    for func, args in recorded.calls:
        with_gradient = not func._opname.endswith("_backward")
        torch.library.opcheck(func, tuple(leaf(value, with_gradient) for value in args))


@each_call
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_in_one_graph(name: str, device: torch.device) -> None:
    slow_on(device, name)
    call = CALLS[name](device, torch.float32)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(call.run, fullgraph=True, backend=backend)
    again = OpCall(call.op, compiled, call.leaves)
    for actual, expected in zip(again.results(), call.results(), strict=True):
        assert_conforms(actual, expected, gradient=True)


def replayed(call: OpCall, static: tuple[Tensor, ...], change: Callable[[], None]) -> list[Tensor]:
    """What a CUDA graph of forward and backward gives for inputs that changed after it was captured; on the
    CPU, what a second run gives."""
    if static[0].device.type == "cpu":
        call.results(static)
        change()
        return call.results(static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # kernels are compiled, and libraries take their workspaces
            call.results(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.results(static)
    change()
    graph.replay()
    return [x.clone() for x in captured]


@each_call
def test_a_captured_graph_replays_on_new_inputs(name: str, device: torch.device) -> None:
    call = CALLS[name](device, torch.bfloat16)
    static = tuple(x.detach().clone() for x in call.leaves)
    torch.use_deterministic_algorithms(False)  # its filling of memory would be captured too

    def change() -> None:
        for x in static:
            x.copy_(x.flip(0) * 0.5)

    actual = replayed(call, static, change)
    for a, b in zip(actual, call.results(static), strict=True):
        assert a.equal(b)


def test_a_captured_graph_sees_new_ranges(device: torch.device) -> None:
    """Who sees whom is data: other documents and images, the same graph."""
    call = attention_call(device, torch.bfloat16)
    other = attention_case(rows=("i3 t1 i20 t7", "t31", "t2 i1 t2 i1 t20 p5")).spans(device)
    torch.use_deterministic_algorithms(False)

    def change() -> None:
        call.static["bounds"].copy_(other.bounds)
        call.static["key_class"].copy_(other.key_class)

    before = call.results()
    actual = replayed(call, call.leaves, change)
    assert not actual[0].equal(before[0])
    for a, b in zip(actual, call.results(), strict=True):
        assert a.equal(b)


@contextmanager
def triton_compilations() -> Iterator[list[str]]:
    """The names of the kernels that Triton compiles inside."""
    import triton

    names: list[str] = []

    def hook(*args: Any, **kwargs: Any) -> None:
        names.append(str(kwargs.get("repr", "a kernel")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
        yield names


RANGES = {
    "two softmaxes": (
        ("mmca", PADDED, {}),
        ("mmca", PACKED[:1] * 3, {"window": 3}),
        ("mmca_released", ("t31", "i31", "p31"), {}),
        ("mmca_image", ("i3 t1 | t20 i4 p3",) * 3, {}),
    ),
    "one range": (
        ("causal", PADDED, {}),
        ("causal", PACKED[:1] * 3, {"window": 3}),
        ("bidirectional_image", ("t31", "i31", "p31"), {}),
        ("prefix", ("I9 T4 t18",) * 3, {}),
    ),
    "two ranges": (
        ("all_images", PADDED, {}),
        ("all_images", PACKED[:1] * 3, {"window": 3}),
        ("all_images", ("t31", "i31", "p31"), {}),
    ),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", RANGES)
def test_all_ranges_changed_compile_nothing_new(kind: str, device: torch.device) -> None:
    """Neither torch.compile nor Triton: rules, images, documents, padding and windows are run-time data."""
    counter = CompileCounterWithBackend("aot_eager")
    ranges = RANGES[kind]

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: Any) -> Tensor:
        return span_attention(q, k, v, spans)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)

    def run(index: int) -> None:
        rule, rows, options = ranges[index]
        case = AttentionCase("any", "", rule, rows, **options).times(LONGER)
        q, k, v, cotangent = case.inputs(torch.bfloat16, device)
        spans = case.spans(device)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        outs = [attention(*leaves, spans) for attention in (span_attention, compiled)]
        grads = [torch.autograd.grad(out, leaves, cotangent) for out in outs]
        for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
            assert a.equal(b)

    run(0)
    if device.type == "cpu":
        for index in range(1, len(ranges)):
            run(index)
    else:
        with triton_compilations() as names:
            for index in range(1, len(ranges)):
                run(index)
        assert names == []
        with triton_compilations() as names:  # that it would be seen
            forward_kernel.device_caches.clear()  # what this process has compiled it would only look up
            attention_call(device, torch.bfloat16).results()
        assert names
    assert counter.frame_count == 1


def test_these_are_not_attentions_few_queries() -> None:
    """Which have a kernel of their own: that for many would go untested."""
    few = max(
        default_config(head_dim, dtype, capability).decode_rows
        for head_dim in (64, 128, 256)
        for dtype in (torch.float32, torch.bfloat16)
        for capability in ((8, 0), (9, 0), (10, 0))
    )
    cases = [
        AttentionCase("", "", rule, rows).times(LONGER) for of in RANGES.values() for rule, rows, _ in of
    ]
    for case in (attention_case(), *cases):
        assert case.length * case.heads // case.kv_heads > few


@contextmanager
def waiting_refused(device: torch.device) -> Iterator[None]:
    """On a GPU what waits for it raises inside."""
    if device.type == "cpu":
        yield
        return
    torch.use_deterministic_algorithms(False)  # some of torch's ops wait in that mode
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_call
def test_nothing_waits_for_the_gpu(name: str, device: torch.device) -> None:
    call = CALLS[name](device, torch.bfloat16)
    call.results()
    with waiting_refused(device):
        call.results()


def test_neither_do_losses_of_routers(device: torch.device) -> None:
    logits = torch.randn(70, 6, device=device)

    def losses() -> list[Tensor]:
        return [
            load_balancing_loss(logits, 2),
            load_balancing_loss(logits, 2, form="transformers"),
            importance_loss(logits),
            load_loss(logits, logits + 0.1, 2, noise_std=0.2),
            router_z_loss(logits),
        ]

    expected = losses()
    with waiting_refused(device):
        actual = losses()
    for a, b in zip(actual, expected, strict=True):
        assert a.equal(b)


def test_neither_does_a_layer_of_experts_that_knows_its_groups(device: torch.device) -> None:
    kind = torch.tensor([[TEXT] * 9 + [IMAGE] * 20 + [TEXT] * 6, [TEXT] * 4 + [IMAGE] * 25 + [PADDING] * 6])
    layout = TokenLayout(kind.to(torch.uint8).to(device))
    routers = {"text_router": "token_choice", "image_router": "expert_choice"}
    layer = MoE(64, 48, 4, top_k=2, aux_loss_coef=0.01, z_loss_coef=0.001, **routers).to(device)
    x = torch.randn(2, 35, 64, device=device, requires_grad=True)
    groups = TokenGroups.of(layout)  # asks how many rows there are of each

    def results() -> list[Tensor]:
        y, stats = layer(x, layout, groups)
        loss = y.square().mean() + stats.aux_loss
        return [y.detach(), *torch.autograd.grad(loss, (x, *layer.parameters()))]

    expected = results()
    with waiting_refused(device):
        actual = results()
    for a, b in zip(actual, expected, strict=True):
        assert a.equal(b)


@each_call
def test_the_same_bits_twice(name: str, device: torch.device) -> None:
    call = CALLS[name](device, torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # it would hide an op that is not
    first = call.results()
    for _ in range(2):
        for a, b in zip(call.results(), first, strict=True):
            assert a.equal(b)


SEEN = (
    *((rule, "t9 i11 t4 i6 t2 p1", None) for rule in ("causal", "mmca", "mmca_released", "mmca_image")),
    *((rule, "t9 i11 t4 i6 t2 p1", None) for rule in ("bidirectional_image", "all_images")),
    *((rule, "t9 i11 | t4 i6 t2 p1", None) for rule in ("mmca", "bidirectional_image", "bidirectional")),
    *((rule, "t9 i11 t4 i6 t2 p1", 5) for rule in ("causal", "mmca", "bidirectional_image")),
    ("prefix", "I9 T4 t14 p3", None),
)


@pytest.mark.parametrize(("rule", "row", "window"), SEEN)
def test_a_row_of_attention_depends_on_nothing_that_it_does_not_see(
    rule: str, row: str, window: int | None, device: torch.device
) -> None:
    case = AttentionCase("seen", "", rule, (row,), head_dim=64, window=window).times(sized(device, 1, 10))
    q, k, v, cotangent = case.inputs(torch.bfloat16, device)
    spans = case.spans(device)
    sees = spans.dense().any(1)

    def out_and_grad(k: Tensor, v: Tensor) -> list[Tensor]:
        leaf = q.detach().requires_grad_()
        out = span_attention(leaf, k, v, spans)
        return [out.detach(), *torch.autograd.grad(out, leaf, cotangent)]

    before = out_and_grad(k, v)
    for i in range(0, case.length, case.length // 7):
        hidden = ~sees[:, i, None, :, None]
        other = [torch.where(hidden, 30 * torch.randn_like(x), x) for x in (k, v)]
        for a, b in zip(out_and_grad(*other), before, strict=True):
            assert a[:, :, i].equal(b[:, :, i]), i


def test_a_row_of_experts_depends_on_its_own_token_or_image(device: torch.device) -> None:
    """Token choice: on the token. Expert choice in groups: on the tokens of the group."""
    _, logits, gate_up, down = routed_call(device, torch.bfloat16, "token_choice").leaves
    x, half = torch.randn(len(logits), down.shape[1], device=device).to(down.dtype), len(logits) // 2
    groups = torch.tensor([0, half, len(logits)], device=device)
    routers = {
        "token choice": lambda logits: token_choice(logits, 2),
        "expert choice": lambda logits: expert_choice(logits, half // 4, groups),
    }
    for name, router in routers.items():
        first, second = torch.randn_like(logits), torch.randn_like(logits)
        second[:half] = first[:half]
        other_x = x.clone()
        other_x[half:] = 30 * torch.randn_like(x[half:])
        y = expert_mlp(x, router(first), gate_up, down)
        other_y = expert_mlp(other_x, router(second), gate_up, down)
        assert not other_y[half:].equal(y[half:]), name
        assert other_y[:half].equal(y[:half]), name


def test_rows_without_a_label_reach_neither_loss_nor_gradients(device: torch.device) -> None:
    call = loss_call(device, torch.bfloat16)
    hidden, *others = call.leaves
    unlabeled = call.static["labels"] == -100
    changed = hidden.masked_fill(unlabeled[:, None], torch.nan)
    for a, b in zip(call.results((changed, *others)), call.results(), strict=True):
        assert a.equal(b)

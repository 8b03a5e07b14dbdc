"""The native routers as citizens of torch, at sizes where they work in chunks, and bit by bit."""

from collections.abc import Callable

import pytest
import torch
from moe_helpers import check_lists, chosen, dense_weights
from torch import Tensor

from pyvlm.ops import Routing, expert_choice, merge_routings, threshold_choice, token_choice

ROUTERS: dict[str, Callable[[Tensor], Routing]] = {
    "expert_choice": lambda x: expert_choice(x, 300, backend="native"),
    "expert_choice in groups": lambda x: expert_choice(x, 40, groups_of(x), backend="native"),
    "token_choice": lambda x: token_choice(x, 2, backend="native"),
    "token_choice dropping": lambda x: token_choice(x, 2, 300, backend="native"),
    "token_choice by priority": lambda x: token_choice(x, 2, 300, drop="priority", backend="native"),
    "threshold_choice": lambda x: threshold_choice(x, torch.full(x.shape[1:], 0.2), "native"),
}


def groups_of(logits: Tensor) -> Tensor:
    """Small groups, one without tokens and large ones."""
    return torch.tensor([0, 7, 7, 600, 5_000, len(logits)])


def best_by_sorting(p: Tensor, capacity: int) -> Tensor:
    best = p.sort(dim=0, descending=True, stable=True).indices[:capacity]
    return torch.zeros_like(p, dtype=torch.bool).scatter_(0, best, True)


# A sample bounds the scores of 20,000 rows. 6 experts leave most of a block of 64 empty, 70 need two.
@pytest.mark.parametrize("capacity", [1, 300, 4_000, 30_000])
@pytest.mark.parametrize("experts", [6, 70])
@pytest.mark.parametrize("kind", ["random", "few values", "all equal", "best first", "sample misleads"])
def test_expert_choice_over_many_tokens(kind: str, experts: int, capacity: int) -> None:
    tokens = 20_000
    logits = {
        "random": lambda: torch.randn(tokens, experts),
        "few values": lambda: torch.randint(0, 3, (tokens, experts)).float(),
        "all equal": lambda: torch.zeros(tokens, experts),
        "best first": lambda: torch.randn(tokens, experts).sort(dim=0, descending=True).values,
        "sample misleads": lambda: torch.randn(tokens, experts),
    }[kind]()
    if kind == "sample misleads":  # the rows that the kernel looks at are the best ones of an expert
        logits[torch.arange(1024) * 0x9E3779B9 % 2**32 * tokens >> 32, 0] += 9
    p = dense_weights(token_choice(logits, experts, normalize=False, backend="native"))
    routing = expert_choice(logits, capacity, backend="native")
    check_lists(routing)
    expected = best_by_sorting(p, capacity)
    assert chosen(routing).equal(expected)
    assert dense_weights(routing).equal(p * expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("experts", [1, 5, 16, 70])
def test_equal_rows_have_equal_bits(experts: int, dtype: torch.dtype) -> None:
    rows = torch.randn(7, experts).to(dtype)
    which = torch.randint(0, 7, (3_001,))
    p = dense_weights(token_choice(rows[which], experts, normalize=False, backend="native"))
    alone = [
        dense_weights(token_choice(row[None], experts, normalize=False, backend="native")) for row in rows
    ]
    assert p.equal(torch.cat(alone)[which])


@pytest.mark.parametrize("router", ROUTERS)
def test_the_number_of_threads_changes_no_bit(router: str) -> None:
    logits = torch.randn(20_000, 8, requires_grad=True)

    def tensors() -> list[Tensor]:
        routing = ROUTERS[router](logits)
        weight = routing.weight
        (grad,) = torch.autograd.grad(weight, logits, torch.linspace(-1, 1, len(weight)))
        return [grad, weight, routing.token, routing.expert_offsets, routing.token_offsets, routing.slot]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = tensors()
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, tensors(), expected))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("router", ROUTERS)
def test_lists_of_many_tokens(router: str) -> None:
    logits = torch.randn(20_000, 70)
    routing = ROUTERS[router](logits)
    check_lists(routing)
    rows = torch.randperm(30_000)[:20_000].int()
    merged = merge_routings([(routing, rows)], 30_000)
    check_lists(merged)
    expected = torch.zeros(30_000, 70).index_copy(0, rows.long(), dense_weights(routing))
    assert dense_weights(merged).equal(expected)


def test_gradients_of_merged_routings_go_to_their_parts() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def merged(x: Tensor) -> Tensor:
        parts = [
            (token_choice(x[:2], 2), torch.tensor([4, 1])),
            (expert_choice(x[2:], 1), torch.arange(5, 9)),
        ]
        return merge_routings(parts, 9).weight

    assert torch.autograd.gradcheck(merged, logits)


OPS = {
    "expert_choice": (torch.tensor([2, 3]), torch.tensor([0, 4, 9])),
    "expert_choice of one group": (None, None, 12),
    "token_choice": (2, None, True, "position", None),
    "token_choice dropping": (2, 3, False, "priority", torch.randn(4)),
    "threshold_choice": (torch.full((4,), 0.25),),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.pyvlm, name.split()[0])
    logits = torch.randn(9, 4).to(dtype)
    torch.library.opcheck(op.default, (logits.clone().requires_grad_(), *OPS[name]))
    torch.library.opcheck(op.default, (torch.randn(4, 9).to(dtype).T, *OPS[name]))
    weight, token, expert_offsets, _, _ = op(logits, *OPS[name])
    torch.library.opcheck(
        torch.ops.pyvlm.routing_backward.default,
        (torch.randn_like(weight), logits, token, weight, expert_offsets, True),
    )


def test_opcheck_of_merging() -> None:
    routing = token_choice(torch.randn(5, 4), 2)
    lists = [routing.token] * 2, [routing.expert_offsets] * 2, [torch.arange(5), torch.arange(5, 10)]
    torch.library.opcheck(torch.ops.pyvlm.merge_routings.default, (*lists, 11))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("merge", [False, True], ids=["", "merged"])
def test_token_choice_compiles_in_one_graph(merge: bool) -> None:
    def weights(x: Tensor) -> tuple[Tensor, Tensor]:
        routing = token_choice(x, 2)
        if merge:
            routing = merge_routings([(routing, torch.arange(x.shape[0]))], x.shape[0])
        return routing.token, routing.weight.square()

    compiled = torch.compile(weights, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 4, requires_grad=True)
    for actual, expected in zip(compiled(x), weights(x), strict=True):
        assert actual.equal(expected)
    grads = [torch.autograd.grad(route(x)[1].sum(), x)[0] for route in (compiled, weights)]
    assert grads[0].equal(grads[1])


def test_a_second_derivative_is_refused() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    weight = token_choice(logits, 2, backend="native").weight
    (grad,) = torch.autograd.grad(weight.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.square().sum().backward()

"""The CUDA kernels of the routers, compiled for the host and emulated, against the reference."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from emulated_cuda import Guarded, in_both_orders, needs_compiler, pointer, pointers, run, sizes_of_lists
from moe_helpers import check_lists
from tolerance import assert_close
from torch import Tensor

from pyvlm.ops import Routing
from pyvlm.reference import moe as reference

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
]  # by the number that the host code knows

pytestmark = needs_compiler


def route(
    host: ctypes.CDLL, logits: Tensor, slots: int, call: Callable[[ctypes.Array, bool], None]
) -> tuple[Routing, Tensor]:
    """The routing and the probabilities [T, E]."""
    tokens, experts = logits.shape
    dtype = reference.accumulation_dtype(logits.dtype)
    sizes = {
        **sizes_of_lists(tokens, experts, slots, "weight", dtype),
        "bits": (host.bits_size(tokens, experts), torch.int32),
        "prob": (experts * tokens, dtype),
    }
    found = in_both_orders(sizes, lambda tensors, backwards: call(pointers(tensors), backwards))
    prob = found.pop("prob").view(experts, tokens).T.contiguous()
    found.pop("bits")
    return Routing(**found, num_tokens=tokens), prob


def expert_choice(
    host: ctypes.CDLL, logits: Tensor, capacity: Tensor, offsets: Tensor, slots: int | None = None
) -> tuple[Routing, Tensor]:
    tokens, experts = logits.shape
    if slots is None:
        slots = experts * int(torch.minimum(capacity, offsets.diff()).sum())
    # One group of all tokens is told by its absence.
    groups = (None, None) if len(capacity) == 1 else (capacity, offsets)

    def call(arrays: ctypes.Array, backwards: bool) -> None:
        run(
            host.expert_choice_on_host,
            DTYPES.index(logits.dtype),
            backwards,
            pointer(logits),
            tokens,
            experts,
            pointer(groups[0]),
            pointer(groups[1]),
            len(capacity),
            slots,
            arrays,
        )

    return route(host, logits, slots, call)


def token_choice(
    host: ctypes.CDLL, logits: Tensor, top_k: int, normalize: bool, bias: Tensor | None
) -> tuple[Routing, Tensor]:
    tokens, experts = logits.shape
    sums = torch.full((tokens,), float("nan"), dtype=reference.accumulation_dtype(logits.dtype))

    def call(arrays: ctypes.Array, backwards: bool) -> None:
        run(
            host.token_choice_on_host,
            DTYPES.index(logits.dtype),
            backwards,
            pointer(logits),
            pointer(bias),
            tokens,
            experts,
            top_k,
            normalize,
            pointer(sums),
            arrays,
        )

    return route(host, logits, tokens * top_k, call)


def backward(
    host: ctypes.CDLL, grad: Tensor, logits: Tensor, routing: Routing, normalize: bool, backwards: bool
) -> Tensor:
    tokens, experts = logits.shape
    out = Guarded(logits.numel(), logits.dtype)
    run(
        host.routing_backward_on_host,
        DTYPES.index(logits.dtype),
        backwards,
        pointer(grad),
        pointer(logits),
        pointer(routing.token),
        pointer(routing.weight),
        pointer(routing.expert_offsets),
        tokens,
        experts,
        normalize,
        pointer(out.tensor),
    )
    return out.written().view(tokens, experts)


def make_logits(tokens: int, experts: int, dtype: torch.dtype, kind: str) -> Tensor:
    logits = torch.randn(tokens, experts)
    if kind == "ties":  # rows, and so probabilities, of which each occurs many times
        logits = logits[torch.randint(0, max(tokens // 8, 1), (tokens,))]
    if kind == "equal":
        logits = torch.zeros(tokens, experts)
    if kind == "-inf":  # an expert for each token stays finite
        logits = logits.masked_fill(torch.rand(tokens, experts) < 0.7, -torch.inf)
        logits[torch.arange(tokens), torch.randint(0, experts, (tokens,))] = 0.25
    return logits.to(dtype)


def assert_softmax(prob: Tensor, logits: Tensor) -> None:
    assert_close(prob, logits.double().softmax(-1), logits.softmax(-1, dtype=prob.dtype), "probabilities")


def assert_same(routing: Routing, expected: reference.RoutingTensors) -> None:
    """Exactly the lists; weights as far as an order of addition may move them."""
    token, weight, expert_offsets, token_offsets, slot = expected
    assert routing.expert_offsets.equal(expert_offsets)
    assert routing.token.equal(token)
    assert routing.token_offsets.equal(token_offsets)
    assert routing.slot.equal(slot)
    torch.testing.assert_close(routing.weight, weight.to(routing.weight.dtype))


def check_expert_choice(host: ctypes.CDLL, logits: Tensor, capacity: Tensor, offsets: Tensor) -> Tensor:
    """Compares with the reference on the kernel's own probabilities, which may differ from torch's in the
    last place, and returns them."""
    routing, prob = expert_choice(host, logits, capacity, offsets)
    assert_softmax(prob, logits)
    assert_same(routing, reference._slots_of(reference._best_in_groups(prob, capacity, offsets), prob))
    assert routing.weight.equal(prob[routing.token.long(), routing.expert])
    return prob


GROUPS = {  # sizes of the groups and their capacities; the reason of each
    "one group": ([130], [17]),  # tokens are no multiple of a word, a tile, or a chunk
    "one group for 512 threads": ([2600], [401]),
    "a long group among short ones": ([3, *[1] * 8, 2600], [2, *[1] * 8, 401]),  # more rounds of few threads
    "small groups": ([5, 0, 40, 1, 33], [7, 2, 8, 1, 33]),  # empty, below their capacity, words of two groups
    "images": ([300, 256, 211], [19, 256, 1]),  # chunks of one group and of two
    "more groups than threads": ([2] * 140, [1] * 140),
    "one token": ([1], [1]),
}


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "-inf"])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("experts", [1, 5])
def test_expert_choice(host: ctypes.CDLL, groups: str, experts: int, kind: str) -> None:
    sizes, capacities = GROUPS[groups]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    logits = make_logits(int(offsets[-1]), experts, torch.float32, kind)
    check_expert_choice(host, logits, torch.tensor(capacities), offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_choice_in_every_type(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    """float64 keys have six digits; low precision makes ties of its own."""
    logits = make_logits(161, 64, dtype, "random")
    check_expert_choice(host, logits, torch.tensor([9, 30]), torch.tensor([0, 70, 161]))


def test_expert_choice_is_the_reference_where_no_rounding_decides(host: ctypes.CDLL) -> None:
    logits = make_logits(777, 8, torch.float64, "random")
    offsets, capacity = torch.tensor([0, 300, 777]), torch.tensor([40, 100])
    routing, _ = expert_choice(host, logits, capacity, offsets)
    assert_same(routing, reference.expert_choice(logits, capacity, offsets))


def test_keys_that_differ_in_their_last_bits(host: ctypes.CDLL) -> None:
    """Probabilities so close together that the select needs all digits."""
    logits = torch.zeros(600, 2)
    logits[:, 0] = torch.randint(0, 40, (600,)) * 2e-7
    prob = check_expert_choice(host, logits, torch.tensor([123]), torch.tensor([0, 600]))
    assert 2 < len(prob[:, 0].unique()) <= 40


@pytest.mark.parametrize(
    ("capacity", "offsets", "slots"),
    [
        ([9, 9], [0, 20, 50], 4 * 17),
        ([9, 9], [0, 60, 50], 4 * 9),
        ([9, 9], [0, 20, 51], 4 * 18),
        ([9, -9], [0, 20, 50], 4 * 9),
        ([9, 0], [0, 20, 50], 4 * 9),
    ],
    ids=["slots", "falling offsets", "offsets beyond the tokens", "negative capacity", "no capacity"],
)
def test_what_does_not_fit_traps(
    host: ctypes.CDLL, capacity: list[int], offsets: list[int], slots: int
) -> None:
    logits = make_logits(50, 4, torch.float32, "random")
    with pytest.raises(RuntimeError, match="trap"):
        expert_choice(host, logits, torch.tensor(capacity), torch.tensor(offsets), slots)


def test_logits_of_nan_still_give_lists(host: ctypes.CDLL) -> None:
    """Nobody looks at the values on a GPU: what is promised is that the lists are whole."""
    logits = make_logits(300, 4, torch.float32, "random")
    logits[::3] = torch.nan
    logits[1] = -torch.inf
    for routing, _ in (
        expert_choice(host, logits, torch.tensor([20]), torch.tensor([0, 300])),
        token_choice(host, logits, 3, True, None),
    ):
        check_lists(routing)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "kind", "biased"),
    [
        (1, 1, 1, "random", False),
        (290, 4, 2, "random", False),
        (70, 64, 8, "ties", True),
        (33, 100, 3, "random", False),  # a tile of 64 rows
        (33, 300, 1, "random", True),  # a tile of 32; more experts than threads
        (45, 7, 7, "equal", False),
        (64, 6, 4, "-inf", False),  # fewer experts with p > 0 than choices
        (66_000, 1, 1, "random", False),  # more words, and more chunks, than threads
    ],
)
def test_token_choice(
    host: ctypes.CDLL, tokens: int, experts: int, top_k: int, kind: str, biased: bool, normalize: bool
) -> None:
    logits = make_logits(tokens, experts, torch.float32, kind)
    bias = 0.1 * torch.randn(experts) if biased else None
    routing, prob = token_choice(host, logits, top_k, normalize, bias)
    assert_softmax(prob, logits)
    score = prob if bias is None else prob + bias
    chosen = torch.zeros_like(prob, dtype=torch.bool)
    chosen.scatter_(1, reference.top_choices(score, top_k), True)
    kept = (prob * chosen).sum(-1, keepdim=True) if normalize else torch.ones(tokens, 1)
    assert_same(routing, reference._slots_of(chosen, prob / kept))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(301, 6, 2), (40, 70, 5), (1, 1, 1)])
def test_backward(
    host: ctypes.CDLL, dtype: torch.dtype, normalize: bool, tokens: int, experts: int, top_k: int
) -> None:
    logits = make_logits(tokens, experts, dtype, "random")
    routing, _ = token_choice(host, logits, top_k, normalize, None)
    grad = torch.randn_like(routing.weight)

    def by_autograd(logits: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        p = reference.router_probabilities(logits)
        weight_TE = p
        if normalize:
            mask = torch.zeros_like(p).index_put((routing.token.long(), routing.expert), p.new_ones(()))
            weight_TE = p / (p * mask).sum(-1, keepdim=True)
        weight = weight_TE[routing.token.long(), routing.expert]
        return torch.autograd.grad(weight, logits, grad.to(weight.dtype))[0]

    out = backward(host, grad, logits, routing, normalize, backwards=False)
    assert out.equal(backward(host, grad, logits, routing, normalize, backwards=True))
    assert_close(
        out, by_autograd(logits.double()), by_autograd(logits), "grad_logits", terms=float(grad.abs().max())
    )


def test_backward_where_a_row_was_divided_by_the_epsilon(host: ctypes.CDLL) -> None:
    """A bias may choose experts whose probabilities add up to nothing: their sum has no gradient then."""
    logits = torch.tensor([[0.0, -18.4, -19.0]]).repeat(3, 1)
    routing, _ = token_choice(host, logits, 2, True, torch.tensor([0.0, 3.0, 3.0]))
    assert 0.1 < routing.weight.sum() / 3 < 0.2
    grad = torch.ones_like(routing.weight)
    wide = logits.double().requires_grad_()
    eps = torch.finfo(torch.float32).eps
    (expected,) = torch.autograd.grad(wide.softmax(-1)[:, 1:].sum() / eps, wide)
    torch.testing.assert_close(backward(host, grad, logits, routing, True, backwards=False), expected.float())

"""The CUDA kernels of the routers, compiled for the host and emulated, against the reference."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_helpers import check_lists
from tolerance import assert_close
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from pyvlm.ops import Routing
from pyvlm.reference import moe as reference

HERE = Path(__file__).parent / "cuda_host"
CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
]  # by the number that the host code knows

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the kernels")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("cuda_host") / "routing_on_host.so"
    includes = [f"-I{HERE}", f"-I{CSRC}", *(f"-isystem{path}" for path in include_paths())]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    command = ["g++", *flags, *includes, str(HERE / "routing_on_host.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.bits_size.restype = loaded.counts_size.restype = ctypes.c_int64
    return loaded


class Guarded:
    """A tensor for a kernel to write, of garbage and between guards."""

    GUARD = 64

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        garbage = float("nan") if dtype.is_floating_point else 0x7FFF_FFFF
        self.memory = torch.full((size + 2 * self.GUARD,), garbage, dtype=dtype)
        self.tensor = self.memory[self.GUARD : self.GUARD + size]

    def written(self) -> Tensor:
        before, after = self.memory[: self.GUARD], self.memory[self.GUARD + len(self.tensor) :]
        for guard in (before, after):
            assert bool((guard.isnan() if guard.is_floating_point() else guard == 0x7FFF_FFFF).all())
        return self.tensor


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def run(function: Callable[..., Any], *arguments: Any) -> None:
    function.restype = ctypes.c_char_p
    converted = [ctypes.c_int(a) if isinstance(a, (bool, int)) else a for a in arguments]
    problem = function(*converted)
    if problem is not None:
        raise RuntimeError(problem.decode())


def route(
    host: ctypes.CDLL, logits: Tensor, slots: int, call: Callable[[ctypes.Array, bool], None]
) -> tuple[Routing, Tensor]:
    """The routing and the probabilities [T, E]; the same whether threads run in order or in reverse."""
    tokens, experts = logits.shape
    dtype = reference.accumulation_dtype(logits.dtype)
    results = []
    for backwards in (False, True):
        sizes = {
            "token": (slots, torch.int32),
            "weight": (slots, dtype),
            "expert_offsets": (experts + 1, torch.int32),
            "token_offsets": (tokens + 1, torch.int32),
            "slot": (slots, torch.int32),
            "bits": (host.bits_size(tokens, experts), torch.int32),
            "prob": (experts * tokens, dtype),
        }
        arrays = {name: Guarded(*size) for name, size in sizes.items()}
        call((ctypes.c_void_p * 7)(*(a.tensor.data_ptr() for a in arrays.values())), backwards)
        results.append({name: a.written() for name, a in arrays.items()})
    for name in results[0]:
        one, other = (result[name].view(torch.uint8) for result in results)  # NaN is like itself
        assert one.equal(other), f"{name} depends on the order of threads"
    prob = results[0].pop("prob").view(experts, tokens).T.contiguous()
    results[0].pop("bits")
    return Routing(**results[0], num_tokens=tokens), prob


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


def from_choices(host: ctypes.CDLL, index: Tensor, experts: int) -> dict[str, Tensor]:
    """The tensors of the op, the same whether threads run in order or in reverse."""
    (tokens, top_k), slots = index.shape, index.numel()
    results = []
    for backwards in (False, True):
        sizes = {
            "token": (slots, torch.int32),
            "choice": (slots, torch.int64),
            "expert_offsets": (experts + 1, torch.int32),
            "token_offsets": (tokens + 1, torch.int32),
            "slot": (slots, torch.int32),
        }
        arrays = {name: Guarded(*size) for name, size in sizes.items()}
        counts = Guarded(host.counts_size(slots, experts), torch.int32)
        run(
            host.routing_from_choices_on_host,
            index.dtype == torch.int64,
            backwards,
            pointer(index),
            slots,
            top_k,
            experts,
            pointer(counts.tensor),
            (ctypes.c_void_p * 5)(*(a.tensor.data_ptr() for a in arrays.values())),
        )
        counts.written()
        results.append({name: a.written() for name, a in arrays.items()})
    for name, tensor in results[0].items():
        assert tensor.equal(results[1][name]), f"{name} depends on the order of threads"
    return results[0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "kind"),
    [
        (1, 1, 1, "random"),
        (1, 128, 8, "random"),
        (32, 4, 8, "any"),  # as many as one warp takes; the same expert several times
        (33, 4, 8, "any"),  # one token more
        (256, 300, 8, "random"),  # one chunk; more experts than threads
        (293, 60, 7, "random"),  # a chunk and 3, in which a token of the first one ends
        (1_400, 5, 3, "any"),
        (1_100, 9, 2, "equal"),  # all chose the same
        (530_000, 2, 1, "any"),  # more chunks than threads
    ],
)
def test_routing_from_choices(
    host: ctypes.CDLL, tokens: int, experts: int, top_k: int, kind: str, dtype: torch.dtype
) -> None:
    if kind == "random":  # no expert twice
        index = torch.rand(tokens, experts).topk(top_k).indices
    else:
        index = torch.randint(0, experts if kind == "any" else 1, (tokens, top_k)) + (kind == "equal") * 3
    found = from_choices(host, index.to(dtype), experts)
    number = torch.arange(index.numel(), dtype=torch.float64).view(
        index.shape
    )  # a weight that tells the choice
    token, choice, *offsets, slot = reference.routing_from_choices(index, number, experts, False)
    names = ("token", "choice", "expert_offsets", "token_offsets", "slot")
    for name, expected in zip(names, (token, choice.long(), *offsets, slot), strict=True):
        assert found[name].equal(expected), name


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [(-1, torch.int32), (5, torch.int32), (-1, torch.int64), (5, torch.int64), (2**32, torch.int64)],
)
@pytest.mark.parametrize("tokens", [3, 1_500])
def test_choices_of_no_expert_trap(host: ctypes.CDLL, tokens: int, wrong: int, dtype: torch.dtype) -> None:
    index = torch.zeros(tokens, 2, dtype=dtype)
    index[-1, 1] = wrong
    with pytest.raises(RuntimeError, match="trap"):
        from_choices(host, index, 5)


class Part(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token", "expert_offsets", "rows")),
        *((name, ctypes.c_int) for name in ("slots", "tokens", "first")),
    )


def merge(host: ctypes.CDLL, parts: list[tuple[Routing, Tensor]], tokens: int) -> dict[str, Tensor]:
    """The tensors of the op, the same whether threads run in order or in reverse."""
    experts, slots = parts[0][0].num_experts, sum(len(routing.token) for routing, _ in parts)
    given, first = (Part * len(parts))(), 0
    for part, (routing, rows) in zip(given, parts, strict=True):
        part.token, part.expert_offsets = routing.token.data_ptr(), routing.expert_offsets.data_ptr()
        part.rows, part.tokens = rows.data_ptr(), len(rows)
        part.slots, part.first = len(routing.token), first
        first += part.slots
    results = []
    for backwards in (False, True):
        sizes = {
            "token": (slots, torch.int32),
            "order": (slots, torch.int64),
            "expert_offsets": (experts + 1, torch.int32),
            "token_offsets": (tokens + 1, torch.int32),
            "slot": (slots, torch.int32),
            "bits": (host.bits_size(tokens, experts), torch.int32),
            "slots": (experts * tokens, torch.int64),
        }
        arrays = {name: Guarded(*size) for name, size in sizes.items()}
        arrays["bits"].tensor.zero_()
        pointers = (ctypes.c_void_p * 7)(*(a.tensor.data_ptr() for a in arrays.values()))
        run(host.merge_routings_on_host, backwards, given, len(parts), tokens, experts, slots, pointers)
        results.append({name: a.written() for name, a in arrays.items()})
    for name, tensor in results[0].items():
        assert tensor.equal(results[1][name]), f"{name} depends on the order of threads"
    return results[0]


def parts_of(sizes: list[int], experts: int, tokens: int) -> list[tuple[Routing, Tensor]]:
    """Routings of so many tokens, each of every second expert and so of few or many slots, and their rows."""
    rows = torch.randperm(tokens)[: sum(sizes)].split(sizes)
    parts = []
    for i, of_part in enumerate(rows):
        chosen = torch.rand(len(of_part), experts) < (0.2, 0.8)[i % 2]
        chosen[:, i % 2 :: 2] = False
        tensors = reference._slots_of(chosen, torch.rand(len(of_part), experts))
        parts.append((Routing(*tensors, num_tokens=len(of_part)), of_part.sort().values))
    return parts


@pytest.mark.parametrize(
    ("sizes", "experts", "tokens"),
    [
        ([1], 1, 1),
        ([3, 4], 4, 9),  # rows of no part
        ([300, 0, 217], 5, 517),  # slots for several blocks; a part of no tokens
        ([40, 30], 300, 77),  # more experts than threads, some without tokens
        ([0, 0], 3, 40),  # no slots
    ],
)
def test_merge_routings(host: ctypes.CDLL, sizes: list[int], experts: int, tokens: int) -> None:
    parts = parts_of(sizes, experts, tokens)
    found = merge(host, parts, tokens)
    expert = torch.cat([routing.expert for routing, _ in parts])
    token = torch.cat([rows[routing.token.long()] for routing, rows in parts])
    number = torch.arange(len(token), dtype=torch.float64)
    token, order, *offsets, slot = reference.sort_slots(expert, token, number, experts, tokens)
    names = ("token", "order", "expert_offsets", "token_offsets", "slot")
    for name, expected in zip(names, (token, order.long(), *offsets, slot), strict=True):
        assert found[name].equal(expected), name


@pytest.mark.parametrize("wrong", ["row", "negative row", "token", "a row of two parts"])
def test_rows_that_do_not_fit_trap(host: ctypes.CDLL, wrong: str) -> None:
    parts = parts_of([20, 30], 4, 50)
    routing, rows = parts[1]
    if wrong == "token":
        routing.token[-1] = 30
    elif wrong == "a row of two parts":
        parts[1] = parts[0]
    else:
        rows[int(routing.token[-1])] = {"row": 50, "negative row": -1}[wrong]
    with pytest.raises(RuntimeError, match="trap"):
        merge(host, parts, 50)

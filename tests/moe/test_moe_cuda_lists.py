"""The CUDA kernels that make routings of choices and of routings, on the host, against the reference."""

import ctypes

import pytest
import torch
from emulated_cuda import in_both_orders, needs_compiler, pointer, pointers, run, sizes_of_lists
from torch import Tensor

from pyvlm.ops import Routing
from pyvlm.reference import moe as reference

pytestmark = needs_compiler


def from_choices(host: ctypes.CDLL, index: Tensor, experts: int) -> dict[str, Tensor]:
    """The tensors of the op."""
    (tokens, top_k), slots = index.shape, index.numel()
    sizes = {
        **sizes_of_lists(tokens, experts, slots, "choice", torch.int64),
        "counts": (host.counts_size(slots, experts), torch.int32),
    }

    def call(tensors: dict[str, Tensor], backwards: bool) -> None:
        counts = tensors.pop("counts")
        run(
            host.routing_from_choices_on_host,
            index.dtype == torch.int64,
            backwards,
            pointer(index),
            slots,
            top_k,
            experts,
            pointer(counts),
            pointers(tensors),
        )

    return in_both_orders(sizes, call)


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
    """The tensors of the op."""
    experts, slots = parts[0][0].num_experts, sum(len(routing.token) for routing, _ in parts)
    given, first = (Part * len(parts))(), 0
    for part, (routing, rows) in zip(given, parts, strict=True):
        part.token, part.expert_offsets = routing.token.data_ptr(), routing.expert_offsets.data_ptr()
        part.rows, part.tokens = rows.data_ptr(), len(rows)
        part.slots, part.first = len(routing.token), first
        first += part.slots
    sizes = {
        **sizes_of_lists(tokens, experts, slots, "order", torch.int64),
        "bits": (host.bits_size(tokens, experts), torch.int32),
        "slots": (experts * tokens, torch.int64),
    }

    def call(tensors: dict[str, Tensor], backwards: bool) -> None:
        tensors["bits"].zero_()
        numbers = (len(parts), tokens, experts, slots)
        run(host.merge_routings_on_host, backwards, given, *numbers, pointers(tensors))

    return in_both_orders(sizes, call)


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

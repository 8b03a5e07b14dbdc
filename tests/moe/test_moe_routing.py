"""The routers against loops that read like the definitions, on routings that hypothesis makes up."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from moe_helpers import check_lists, chosen, dense_weights
from tolerance import assert_close, assert_conforms
from torch import Tensor

from pyvlm.ops import Routing, expert_choice, merge_routings, threshold_choice, token_choice

LEVELS = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0])  # few, so that ties are common


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """[T, E] float64 with many ties, T from 0 on."""
    experts = draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(LEVELS, min_size=experts, max_size=experts), max_size=13))
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), experts)


@st.composite
def grouped_logits(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits and group offsets; groups may be empty."""
    scores = draw(logits())
    cuts = draw(st.lists(st.integers(0, len(scores)), max_size=4))
    return scores, torch.tensor([0, *sorted(cuts), len(scores)], dtype=torch.int32)


def best(scores: dict[int, float], count: int) -> list[int]:
    """The keys of the `count` highest scores, ties to the lower key."""
    return sorted(scores, key=lambda key: (-scores[key], key))[:count]


def expert_choice_by_loops(p: Tensor, capacities: list[int], offsets: list[int]) -> Tensor:
    gates = torch.zeros_like(p)
    for capacity, start, stop in zip(capacities, offsets, offsets[1:], strict=False):
        for e in range(p.shape[1]):
            for t in best({t: float(p[t, e]) for t in range(start, stop)}, capacity):
                gates[t, e] = p[t, e]
    return gates


def token_choice_by_loops(p: Tensor, top_k: int, capacity: int | None, normalize: bool, drop: str) -> Tensor:
    tokens, experts = p.shape
    choices = [best(dict(enumerate(p[t].tolist())), top_k) for t in range(tokens)]
    routes = [(t, choices[t][k]) for k in range(top_k) for t in range(tokens)]  # first choices first
    kept = []
    for e in range(experts):
        mine = [t for t, chosen_expert in routes if chosen_expert == e]
        if capacity is not None and drop == "priority":
            mine = best({t: float(p[t, e]) for t in mine}, capacity)
        kept += [(t, e) for t in mine[:capacity]]
    gates = torch.zeros_like(p)
    for t, e in kept:
        gates[t, e] = p[t, e]
    return gates / gates.sum(-1, keepdim=True).clamp(min=1e-300) if normalize else gates


def probabilities(scores: Tensor, backend: str) -> Tensor:
    """The backend's own softmax: another's may differ in the last bit, and tie where this one does not."""
    routing = token_choice(scores, scores.shape[1], normalize=False, backend=backend)
    p = dense_weights(routing).detach()
    assert_conforms(p, scores.detach().softmax(-1), "probabilities")
    return p


def assert_is(routing: Routing, gates: Tensor) -> None:
    check_lists(routing)
    assert chosen(routing).equal(gates > 0)
    assert_conforms(dense_weights(routing), gates, "weights")


@given(grouped=grouped_logits(), capacity=st.integers(1, 6))
@example(grouped=(torch.zeros(0, 3).double(), torch.tensor([0, 0])), capacity=1)
@example(grouped=(torch.zeros(0, 3).double(), torch.tensor([0])), capacity=1)  # no groups
@example(grouped=(torch.zeros(7, 2).double(), torch.tensor([0, 3, 3, 7])), capacity=2)
def test_expert_choice_is_its_definition(backend: str, grouped: tuple[Tensor, Tensor], capacity: int) -> None:
    scores, offsets = grouped
    groups = len(offsets) - 1
    p = probabilities(scores, backend)
    expected = expert_choice_by_loops(p, [capacity] * groups, offsets.tolist())
    routing = expert_choice(scores, capacity, offsets, backend)
    assert_is(routing, expected)
    # Every group gives each expert its capacity, or all that it has.
    full = torch.minimum(offsets.diff(), torch.tensor(capacity)).sum()
    assert (routing.expert_offsets.diff() == full).all()


@given(grouped=grouped_logits(), data=st.data())
def test_expert_choice_with_a_capacity_for_each_group(
    backend: str, grouped: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    scores, offsets = grouped
    groups = len(offsets) - 1
    capacities = data.draw(st.lists(st.integers(1, 6), min_size=groups, max_size=groups))
    taken = sum(min(n, c) for n, c in zip(offsets.diff().tolist(), capacities, strict=True))
    known = data.draw(st.sampled_from([None, taken * scores.shape[1]]))
    routing = expert_choice(scores, torch.tensor(capacities), offsets, backend, known)
    p = probabilities(scores, backend)
    assert_is(routing, expert_choice_by_loops(p, capacities, offsets.tolist()))


@given(
    scores=logits(),
    top_k=st.integers(1, 5),
    capacity=st.none() | st.integers(1, 6),
    normalize=st.booleans(),
    drop=st.sampled_from(["position", "priority"]),
)
def test_token_choice_is_its_definition(
    backend: str, scores: Tensor, top_k: int, capacity: int | None, normalize: bool, drop: str
) -> None:
    top_k = min(top_k, scores.shape[1])
    routing = token_choice(scores, top_k, capacity, normalize, drop, backend=backend)
    p = probabilities(scores, backend)
    assert_is(routing, token_choice_by_loops(p, top_k, capacity, normalize, drop))
    counts = routing.expert_offsets.diff()
    if capacity is None:
        assert len(routing.token) == top_k * len(scores)
    else:
        assert (counts <= capacity).all()


@given(scores=logits(), data=st.data())
def test_threshold_choice_is_its_definition(backend: str, scores: Tensor, data: st.DataObject) -> None:
    experts = scores.shape[1]
    thresholds = data.draw(st.lists(st.floats(0, 1), min_size=experts, max_size=experts))
    thresholds = torch.tensor(thresholds, dtype=torch.float64)
    p = probabilities(scores, backend)
    assert_is(threshold_choice(scores, thresholds, backend), p * (p >= thresholds))


def test_ties_go_to_the_lower_index(backend: str) -> None:
    equal = torch.zeros(5, 4)
    by_token = token_choice(equal, 2, backend=backend)
    assert chosen(by_token).equal(torch.tensor([[True, True, False, False]] * 5))
    assert expert_choice(equal, 2, backend=backend).token.tolist() == [0, 1] * 4
    by_priority = token_choice(equal, 1, capacity=3, drop="priority", backend=backend)
    assert by_priority.token.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_at_the_probability_itself_takes_the_token(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(6, 3)
    third_best = probabilities(logits, backend).sort(dim=0, descending=True).values[2]
    routing = threshold_choice(logits, third_best.to(dtype), backend)
    assert routing.expert_offsets.tolist() == [0, 3, 6, 9]
    # A threshold between two float32 numbers is not rounded down to the lower one.
    above = third_best.double() * (1 + 1e-9)
    assert threshold_choice(logits, above, backend).expert_offsets.tolist() == [0, 2, 4, 6]


def test_second_choices_are_numbered_behind_all_first_choices(backend: str) -> None:
    # Token 0 wants expert 1 second, tokens 1 and 2 want it first: with room for two, token 0 stays out.
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    assert chosen(token_choice(logits, 2, capacity=2, backend=backend)).tolist() == [
        [True, False, False],
        [False, True, True],
        [False, True, True],
    ]


def test_weights_are_divided_by_what_is_kept(backend: str) -> None:
    # Token 1 loses its first choice to token 0, so its second has weight 1.
    logits = torch.tensor([[3.0, 0.0, -1.0], [2.0, -1.0, 1.0]])
    weights = dense_weights(token_choice(logits, 2, capacity=1, backend=backend))
    assert_conforms(weights[1], torch.tensor([0.0, 0.0, 1.0]))
    assert_conforms(weights[0].sum(), torch.tensor(1.0))


def test_bias_moves_the_choice_and_not_the_weight(backend: str) -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    p = logits.softmax(-1)[0]
    for bias in ([0.0, 0.0, 1.0], [-torch.inf, -torch.inf, -1.0]):
        routing = token_choice(logits, 1, normalize=False, bias=torch.tensor(bias), backend=backend)
        assert routing.expert.tolist() == [2]
        assert_conforms(routing.weight, p[2:])
    all_of_them = token_choice(logits, 3, bias=torch.full((3,), -torch.inf), backend=backend)
    assert all_of_them.expert.tolist() == [0, 1, 2]


def test_an_underflowing_probability_is_kept_without_nan(backend: str) -> None:
    # Both tokens want expert 0; the second keeps only an expert whose probability underflows to 0.
    logits = torch.tensor([[500.0, 0.0], [500.0, 0.0]], requires_grad=True)
    weight = token_choice(logits, 2, capacity=1, backend=backend).weight
    weight.sum().backward()
    assert weight.isfinite().all()
    assert logits.grad.isfinite().all()


def test_an_expert_masked_out_is_not_chosen(backend: str) -> None:
    logits = torch.randn(9, 4)
    logits[:, 2] = -torch.inf
    assert not chosen(token_choice(logits, 3, backend=backend))[:, 2].any()
    assert (probabilities(logits, backend)[:, 2] == 0).all()


def test_logits_of_any_size_have_a_softmax(backend: str) -> None:
    logits = torch.tensor([[3e38, -3e38], [3e38, 3e38], [-3e38, -3e38], [1e-40, 0.0], [-200.0, -103.0]])
    assert_conforms(probabilities(logits, backend)[:3], torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_probabilities_are_float32_or_more(backend: str, dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(7, 37)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for routing in (
        expert_choice(logits, 7, backend=backend),
        token_choice(logits, 37, normalize=False, backend=backend),
        threshold_choice(logits, torch.zeros(37, dtype=wide), backend),
    ):
        assert routing.weight.dtype == wide
        assert_close(dense_weights(routing), logits.double().softmax(-1), logits.to(wide).softmax(-1))


def test_logits_may_have_any_strides(backend: str) -> None:
    logits = torch.randn(5, 11).T
    rows_apart = torch.randn(11, 9)[:, :5]
    for route in (
        lambda x: expert_choice(x, 3, backend=backend),
        lambda x: token_choice(x, 2, capacity=4, backend=backend),
    ):
        for x in (logits, rows_apart):
            strided, contiguous = route(x), route(x.contiguous())
            assert strided.token.equal(contiguous.token)
            assert strided.weight.equal(contiguous.weight)


ROUTERS = {
    "expert_choice": lambda x, b: expert_choice(x, torch.tensor([2, 3]), torch.tensor([0, 4, 9]), b),
    "token_choice": lambda x, b: token_choice(x, 2, backend=b),
    "token_choice_dropping": lambda x, b: token_choice(x, 2, capacity=3, backend=b),
    "token_choice_not_normalized": lambda x, b: token_choice(x, 2, 3, False, "priority", backend=b),
    "threshold_choice": lambda x, b: threshold_choice(x, torch.full((4,), 0.25), b),
}


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_reach_the_logits(router: str, backend: str) -> None:
    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    # Nothing is chosen differently within the step of the numeric derivative: the gaps are far above it.
    assert torch.autograd.gradcheck(lambda x: ROUTERS[router](x, backend).weight, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_of_every_dtype(normalize: bool, dtype: torch.dtype) -> None:
    logits = torch.randn(700, 37).to(dtype)
    # The last rows keep nothing but a probability that underflows: their sum is replaced by the epsilon.
    logits[-5:] = -100
    logits[-5:, 0] = 0
    bias = torch.zeros(37)
    bias[5:9] = 100
    cotangent = torch.randn(700 * 4)

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        x = logits.to(dtype).requires_grad_()
        weight = token_choice(x, 4, normalize=normalize, bias=bias, backend=backend).weight
        return torch.autograd.grad(weight, x, cotangent.to(weight.dtype))[0]

    expected, plain = gradient(torch.float64, "reference"), gradient(dtype, "reference")
    if normalize:  # in float64 these sums are above its epsilon
        expected[-5:] = plain[-5:]
    assert_close(gradient(dtype, "native"), expected, plain)


@given(first=logits(), second=logits(), random=st.randoms(use_true_random=False))
def test_merged_routings_are_their_parts(first: Tensor, second: Tensor, random) -> None:
    experts = min(first.shape[1], second.shape[1])
    first, second = first[:, :experts], second[:, :experts]
    total = len(first) + len(second) + 2
    rows = list(range(total))
    random.shuffle(rows)
    rows_of_first = torch.tensor(rows[: len(first)], dtype=torch.int64)
    rows_of_second = torch.tensor(rows[len(first) : len(first) + len(second)], dtype=torch.int64)
    parts = [
        (token_choice(first, 1), rows_of_first),
        (expert_choice(second, 2), rows_of_second),
    ]
    merged = merge_routings(parts, total)
    expected = torch.zeros(total, experts, dtype=torch.float64)
    for routing, part_rows in parts:
        expected[part_rows] = dense_weights(routing)
    assert_is(merged, expected)


def test_expert_choice_over_a_sequence_leaks_the_future() -> None:
    """Why expert choice is kept inside images: here the rows before a change do change."""
    logits = torch.randn(64, 4)
    changed = logits.clone()
    changed[-8:] = torch.randn(8, 4)
    before, after = (dense_weights(expert_choice(x, 16))[:-8] for x in (logits, changed))
    assert not before.equal(after)
    grouped = torch.tensor([0, 56, 64])
    before, after = (dense_weights(expert_choice(x, 14, grouped))[:-8] for x in (logits, changed))
    assert before.equal(after)

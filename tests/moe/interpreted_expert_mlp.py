"""The Triton kernels of `expert_mlp` on CPU tensors. test_expert_mlp_triton.py runs this file in a process of
its own, since Triton settles at its import whether it interprets. By hand:

    TRITON_INTERPRET=1 pytest tests/moe/interpreted_expert_mlp.py

The interpreter is slow, so the tiles are small: few tokens still have several.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from memory_checks import races_allowed
from moe.cases import LARGE_CASES, SMALL_CASES, ExpertCase
from moe_helpers import random_layer
from pyvlm.triton_kernels import moe
from pyvlm.triton_kernels.common import INTERPRETED
from pyvlm.triton_kernels.moe import Config, Tiles
from tolerance import assert_close, assert_conforms
from torch import Tensor

from pyvlm.ops import Routing, expert_choice, expert_mlp, token_choice
from pyvlm.reference import moe as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(reference.ACTIVATIONS)
NAMES = ("x", "weight", "gate_up", "down", "gate_up_bias", "down_bias")
SMALL = Tiles(16, 32, 16, 4, 1)
CONFIG = Config(SMALL, SMALL, SMALL, SMALL, SMALL, descriptors=True, group=2)
POINTERS = replace(CONFIG, grad_matrix=Tiles(32, 16, 32, 4, 1), descriptors=False, group=8)
ALL = [True] * 6


@dataclass
class Problem:
    """The arguments of the op. `leaves` are those with a gradient, by NAMES; the last two may be None."""

    leaves: dict[str, Tensor | None]
    routing: Routing
    activation: str = "silu"
    gated: bool = True
    config: Config | None = CONFIG

    def arguments(self) -> tuple[Any, ...]:
        r, leaf = self.routing, self.leaves
        return (
            *(r.token, leaf["weight"], r.expert_offsets, r.token_offsets, r.slot),
            *(leaf["gate_up"], leaf["down"], self.activation, self.gated),
            *(leaf["gate_up_bias"], leaf["down_bias"]),
        )

    def forward(self, keep_hidden: bool = True) -> tuple[Tensor, Tensor]:
        return moe.expert_mlp(self.leaves["x"], *self.arguments(), keep_hidden, self.config)

    def backward(self, grad_y: Tensor, hidden: Tensor, needs: list[bool] = ALL) -> tuple[Tensor, ...]:
        return moe.expert_mlp_backward(
            grad_y, self.leaves["x"], hidden, *self.arguments(), needs, self.config
        )

    def results(self, grad_y: Tensor) -> dict[str, Tensor]:
        """y and all gradients."""
        y, hidden = self.forward()
        needs = [leaf is not None for leaf in self.leaves.values()]
        grads = self.backward(grad_y, hidden, needs)
        return {"y": y} | {name: grads[i] for i, name in enumerate(NAMES) if needs[i]}

    def by_reference(self, grad_y: Tensor, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The same by the definition, on leaves that are converted first."""
        leaves = {
            name: None if leaf is None else convert(leaf).requires_grad_()
            for name, leaf in self.leaves.items()
        }
        r = self.routing
        y = reference.expert_mlp(
            leaves["x"],
            (r.token, leaves["weight"], r.expert_offsets, r.token_offsets, r.slot),
            *(leaves["gate_up"], leaves["down"], self.activation, self.gated),
            *(leaves["gate_up_bias"], leaves["down_bias"]),
        )
        present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        grads = torch.autograd.grad(y, list(present.values()), convert(grad_y))
        return {"y": y.detach()} | dict(zip(present, grads, strict=True))


def problem_of(
    routing: Routing,
    hidden: int = 40,
    intermediate: int = 24,
    dtype: torch.dtype = torch.float32,
    activation: str = "silu",
    gated: bool = True,
    biases: bool = False,
    config: Config | None = CONFIG,
) -> Problem:
    layer = random_layer(routing.num_experts, hidden, intermediate, gated, biases)
    layer["gate_up"] /= hidden**0.5
    layer["down"] /= intermediate**0.5
    leaves = {"x": torch.randn(routing.num_tokens, hidden), "weight": routing.weight.detach()}
    leaves |= {name: layer.get(name) for name in NAMES[2:]}
    converted = {
        name: leaf if leaf is None or name == "weight" else leaf.to(dtype) for name, leaf in leaves.items()
    }
    return Problem(converted, routing, activation, gated, config)


def assert_right(problem: Problem) -> None:
    x = problem.leaves["x"]
    grad_y = torch.randn(x.shape).to(x.dtype)
    actual = problem.results(grad_y)
    expected = problem.by_reference(grad_y, lambda leaf: leaf.double())
    plain = problem.by_reference(grad_y, lambda leaf: leaf.clone())
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype, name
        assert_close(value, expected[name], plain[name], name)


def routed(tokens: int, experts: int, top_k: int = 2, capacity: int | None = None) -> Routing:
    return token_choice(torch.randn(tokens, experts), top_k, capacity)


def test_the_kernels_are_interpreted() -> None:
    assert INTERPRETED.value


def test_the_public_op_runs_them() -> None:
    layer = {name: weight / 4 for name, weight in random_layer(3, 24, 16, biases=True).items()}
    leaves = [torch.randn(21, 24), *(weight.float() for weight in layer.values())]
    logits = torch.randn(21, 3)

    def by(backend: str) -> list[Tensor]:
        x, *weights = (leaf.detach().requires_grad_() for leaf in leaves)
        scores = logits.clone().requires_grad_()
        routing = token_choice(scores, 2)
        y = expert_mlp(x, routing, **dict(zip(layer, weights, strict=True)), backend=backend)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, scores, *weights))]

    for actual, expected in zip(by("triton"), by("reference"), strict=True):
        assert_conforms(actual, expected, gradient=True)


def kinds() -> list[Any]:
    """Every activation, gated and plain: neighbours differ in dtype, biases and the way of loading."""
    parameters = []
    for i, activation in enumerate(ACTIVATIONS):
        for gated in (True, False):
            biases = (i + gated) % 2 == 0
            config = (CONFIG, POINTERS)[(i // 2 + gated) % 2]
            parameters.append((activation, gated, biases, DTYPES[(2 * i + gated) % 3], config))
    return parameters


@pytest.mark.parametrize(("activation", "gated", "biases", "dtype", "config"), kinds())
def test_every_kind_of_expert(
    activation: str, gated: bool, biases: bool, dtype: torch.dtype, config: Config
) -> None:
    routing = routed(33, 3, capacity=20)
    assert (routing.expert_offsets.diff() > 16).any()  # several tiles
    assert (routing.token_offsets.diff() < 2).any()  # some are dropped
    assert_right(problem_of(routing, 40, 24, dtype, activation, gated, biases, config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_with_the_default_tiles(dtype: torch.dtype) -> None:
    assert_right(problem_of(routed(70, 3), 72, 40, dtype, biases=True, config=None))


SHARED_CASES = [*SMALL_CASES, *(case.reduced() for case in LARGE_CASES)]


@pytest.mark.parametrize("case", SHARED_CASES, ids=lambda case: case.name)
def test_shared_cases(case: ExpertCase) -> None:
    """Each in one dtype and by one way of loading; fewer tokens and narrower, for the interpreter is slow."""
    index = SHARED_CASES.index(case)
    sizes = {"tokens": min(case.tokens, 34), "hidden": min(case.hidden, 41)}
    case = replace(case, **sizes, intermediate=min(case.intermediate, 35))
    leaves = dict(zip(("x", "gate_up", "down"), case.inputs(DTYPES[index % 3]), strict=True))
    routing = case.route(case.logits())
    leaves = {name: leaves.get(name) for name in NAMES} | {"weight": routing.weight.detach()}
    assert_right(
        Problem({"x": leaves.pop("x"), **leaves}, routing, config=(CONFIG, POINTERS)[index // 3 % 2])
    )


ROUTINGS = {
    "expert choice": lambda: expert_choice(torch.randn(29, 3), 9, torch.tensor([0, 11, 29])),
    "one expert": lambda: routed(19, 1, 1),
    "experts without tokens": lambda: routed(2, 8, 1),
    "tokens without experts": lambda: expert_choice(torch.randn(21, 2), 3),
    "full tiles": lambda: expert_choice(torch.randn(40, 3), 32),
    "one token": lambda: routed(1, 3),
    "no tokens": lambda: routed(0, 3),
    "no slots": lambda: Routing(
        token=torch.empty(0, dtype=torch.int32),
        weight=torch.empty(0),
        expert_offsets=torch.zeros(4, dtype=torch.int32),
        token_offsets=torch.zeros(6, dtype=torch.int32),
        slot=torch.empty(0, dtype=torch.int32),
        num_tokens=5,
    ),
}


@pytest.mark.parametrize("config", [CONFIG, POINTERS], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_routing(name: str, config: Config) -> None:
    assert_right(problem_of(ROUTINGS[name](), 24, 16, biases=True, config=config))


@pytest.mark.parametrize(("hidden", "intermediate"), [(1, 1), (37, 19), (16, 32), (7, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_size(hidden: int, intermediate: int, dtype: torch.dtype) -> None:
    assert_right(problem_of(routed(13, 3), hidden, intermediate, dtype, biases=True))


def test_gate_and_up_are_whole_tiles_together_and_not_each() -> None:
    """Gated, a tile has 16 rows of each: 24 of both are three tiles, and the last of the up's is half one."""
    assert_right(problem_of(routed(13, 3), 16, 24, config=POINTERS))


def test_weights_of_slots_may_be_float64() -> None:
    """As those of a float64 router are; their gradient is as well."""
    problem = problem_of(routed(13, 3), 24, 16, biases=True)
    grad_y = torch.randn(13, 24)
    expected = problem.results(grad_y)
    problem.leaves["weight"] = problem.leaves["weight"].double()
    actual = problem.results(grad_y)
    assert actual["weight"].dtype == torch.float64
    for name, value in actual.items():
        assert value.to(expected[name].dtype).equal(expected[name]), name


def test_rows_without_an_expert_are_zero_and_so_are_gradients_of_experts_without_tokens() -> None:
    routing = token_choice(torch.tensor([[5.0, 0.0, 4.0]]).repeat(9, 1), 1, capacity=4)
    actual = problem_of(routing, 16, 16, biases=True).results(torch.randn(9, 16))
    assert (actual["y"][4:] == 0).all()
    assert (actual["x"][4:] == 0).all()
    for name in NAMES[2:]:
        assert actual[name][0].any()
        assert (actual[name][1:] == 0).all()


def test_hidden_is_the_pre_activation_and_kept_only_where_it_is_wanted() -> None:
    problem = problem_of(routed(23, 3), dtype=torch.bfloat16, biases=True)
    x, routing = problem.leaves["x"], problem.routing
    y, hidden = problem.forward()

    def by_loop(convert: Callable[[Tensor], Tensor]) -> Tensor:
        gate_up, bias = convert(problem.leaves["gate_up"]), convert(problem.leaves["gate_up_bias"])
        rows = zip(convert(x)[routing.token.long()], routing.expert.tolist(), strict=True)
        return torch.stack([gate_up[e] @ row + bias[e] for row, e in rows])

    assert_close(hidden, by_loop(Tensor.double), by_loop(Tensor.clone))
    y_alone, nothing = problem.forward(keep_hidden=False)
    assert y_alone.equal(y)
    assert nothing.numel() == 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran."""
    names: list[str] = []
    launch = moe.launch

    def record(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *arguments)

    monkeypatch.setattr(moe, "launch", record)
    return names


def test_what_is_not_needed_is_empty_and_costs_nothing(launched: list[str]) -> None:
    problem = problem_of(routed(19, 3), 24, 16, biases=True)
    hidden = problem.forward()[1]
    grad_y = torch.randn(19, 24)
    everything = problem.backward(grad_y, hidden)
    first = ["schedule_kernel", "grad_hidden_kernel"]
    cost = {
        (): [],
        ("x",): [*first, "grad_rows_kernel", "sum_slots_kernel"],
        ("weight",): [*first, "grad_weight_kernel"],
        ("gate_up",): [*first, "grad_matrix_kernel"],
        ("down",): [*first, "grad_matrix_kernel"],
        ("gate_up_bias",): [*first, "grad_bias_kernel"],
        ("down_bias",): ["grad_bias_kernel"],
        ("weight", "down", "down_bias"): [
            *first,
            *("grad_weight_kernel", "grad_matrix_kernel", "grad_bias_kernel"),
        ],
    }
    for wanted, kernels in cost.items():
        launched.clear()
        grads = problem.backward(grad_y, hidden, [name in wanted for name in NAMES])
        assert launched == kernels, wanted
        for name, grad, full in zip(NAMES, grads, everything, strict=True):
            assert grad.equal(full) if name in wanted else grad.numel() == 0, (wanted, name)


def test_the_same_bits_in_every_run_and_with_descriptors_or_pointers() -> None:
    problem = problem_of(routed(13, 2, 1), dtype=torch.bfloat16, biases=True)
    grad_y = torch.randn(13, 40).bfloat16()
    first = problem.results(grad_y)
    for config in (CONFIG, replace(CONFIG, descriptors=False), replace(CONFIG, group=8)):
        again = replace(problem, config=config).results(grad_y)
        assert all(again[name].equal(first[name]) for name in first)


def test_any_strides() -> None:
    problem = problem_of(routed(11, 3), 24, 16, biases=True)
    grad_y = torch.randn(11, 24)
    expected = problem.results(grad_y)
    strided = {name: torch.stack([leaf, leaf], -1)[..., 0] for name, leaf in problem.leaves.items()}
    assert not any(leaf.is_contiguous() for leaf in strided.values())
    actual = replace(problem, leaves=strided).results(grad_y.T.contiguous().T)
    assert all(actual[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("config", [CONFIG, POINTERS], ids=["descriptors", "pointers"])
def test_nan_stays_with_its_token_and_its_experts(config: Config) -> None:
    problem = problem_of(routed(21, 4), 24, 16, biases=True, config=config)
    grad_y = torch.randn(21, 24)
    clean = problem.results(grad_y)
    problem.leaves["x"][5] = torch.nan
    grad_y[5] = torch.nan
    routing = problem.routing
    touched = torch.zeros(4, dtype=torch.bool)
    touched[routing.expert[routing.token == 5]] = True
    assert 0 < touched.sum() < 4
    actual = problem.results(grad_y)
    others = torch.arange(21) != 5
    assert actual["y"][others].equal(clean["y"][others])
    assert actual["x"][others].equal(clean["x"][others])
    assert actual["weight"][routing.token != 5].equal(clean["weight"][routing.token != 5])
    for name in NAMES[2:]:
        assert actual[name][~touched].equal(clean[name][~touched])
        assert actual[name][touched].isnan().any()


def within_nan(tensor: Tensor) -> Tensor:
    """The same values, with NaN (integers: the largest) before and behind them in memory."""
    filling = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    larger = torch.full((3 * len(tensor), *tensor.shape[1:]), filling, dtype=tensor.dtype)
    larger[len(tensor) : 2 * len(tensor)] = tensor
    return larger[len(tensor) : 2 * len(tensor)]


@pytest.fixture
def races() -> Iterator[None]:
    """Slots that a routing gives to two experts at once are written by both."""
    with races_allowed():
        yield


@pytest.mark.usefixtures("races")
def test_a_broken_routing_reads_nothing_outside() -> None:
    # On a GPU nobody checks a routing: that would stall it. Of its tensors only their lengths are trusted.
    problem = problem_of(routed(20, 3), 24, 16, config=POINTERS)
    problem.leaves = {
        name: leaf if leaf is None else within_nan(leaf) for name, leaf in problem.leaves.items()
    }
    broken = torch.tensor([-(2**30), -1, 20, 2**30], dtype=torch.int32).repeat(10)
    routing = replace(problem.routing, token=broken, slot=broken)
    for offsets in ([0, 10, 30, 40], [-7, 2**30, -5, 2**30]):
        expert_offsets = torch.tensor(offsets, dtype=torch.int32)
        problem.routing = replace(routing, expert_offsets=expert_offsets)
        y, hidden = problem.forward()
        if offsets[0] == 0:  # else some slots have no expert, and their rows are never written
            assert y.isfinite().all()
            assert all(g.isfinite().all() for g in problem.backward(torch.ones_like(y), hidden)[:4])
    # Slots beyond the last one are not there.
    outputs = []
    for end in (40, 47):
        token_offsets = torch.tensor([0, end] * 10 + [0], dtype=torch.int32)
        problem.routing = replace(routing, token_offsets=token_offsets)
        outputs.append(problem.forward()[0])
    assert outputs[0].any()
    assert outputs[1].equal(outputs[0])


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize(
    "counts",
    [[5], [16, 0, 17, 128, 0, 129], [0, 0, 3], [1] * 135, [0] * 135 + [40], [2500, 1]],
    ids=["one", "edges of tiles", "empty ones first", "more than a block", "late", "many tiles"],
)
def test_the_schedule_covers_every_slot_once(counts: list[int], rows: int) -> None:
    slots = sum(counts)
    x, experts = torch.zeros(1, 8), len(counts)
    empty = torch.empty(slots, dtype=torch.int32)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    gate_up, down = torch.zeros(experts, 8, 8), torch.zeros(experts, 8, 8)
    p = moe._Problem(
        x, empty, torch.zeros(slots), offsets, torch.zeros(2).int(), empty, gate_up, down, None, None,
        "silu", False, None,
    )  # fmt: skip
    schedule = p.schedule(rows)
    expected = [(e, int(offsets[e]) + i) for e, n in enumerate(counts) for i in range(0, n, rows)]
    tiles = list(zip(schedule["tile_expert"].tolist(), schedule["tile_slot"].tolist(), strict=True))
    assert schedule["row_tiles"] == len(tiles)
    assert tiles[: len(expected)] == expected
    assert all(expert == -1 for expert, _ in tiles[len(expected) :])


def test_what_the_kernels_do_not_take() -> None:
    with pytest.raises(TypeError, match=r'x is torch.float64: use backend="reference"'):
        problem_of(routed(3, 2), dtype=torch.float64).forward()

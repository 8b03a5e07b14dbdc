"""The Triton kernels of `merge_levels` on CPU tensors. test_merge_levels_triton.py runs this file in a
process of its own, since Triton settles at its import whether it interprets. By hand:

    TRITON_INTERPRET=1 pytest tests/fusion/interpreted_merge_levels.py

The interpreter is slow, so the tiles and the programs' shares are small: few rows still have several.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import memory_checks
import pytest
import torch
from fusion.fusion_cases import LARGE_CASES, SMALL_CASES, MergeCase
from pyvlm.triton_kernels import fusion
from pyvlm.triton_kernels.common import INTERPRETED
from pyvlm.triton_kernels.fusion import Config, Tiles
from tolerance import assert_close, assert_conforms
from torch import Tensor

from pyvlm.ops import merge_levels
from pyvlm.reference import fusion as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("alpha", "weight", "bias", "ln_weight", "ln_bias")
LETTERS = dict(zip(NAMES[1:], "wbgn", strict=True))
# The last tile is not full, a program has several tiles, and there are several chunks of projections.
CONFIG = Config(forward=Tiles(8, 1), backward=Tiles(4, 1), resident_warps=4, levels=2)
ALL = [True] * 6


@pytest.fixture(autouse=True)
def levels_are_given(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels find the levels, and the gradients to write, by addresses in memory."""
    table = fusion._Problem.table

    def told(problem: fusion._Problem, grads: Sequence[Tensor]) -> Tensor:
        memory_checks.forget()
        memory_checks.also_given(*problem.levels, *grads)
        return table(problem, grads)

    monkeypatch.setattr(fusion._Problem, "table", told)
    yield
    memory_checks.forget()


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "multiprocessors", lambda device: 1)


@dataclass
class Problem:
    """The arguments of the op; of the parameters, those but alpha and weight may be None."""

    levels: list[Tensor]
    parameters: dict[str, Tensor | None]
    config: Config | None = CONFIG
    eps: float = 1e-5

    def forward(self, keep_statistics: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        parameters = self.parameters.values()
        return fusion.merge_levels(self.levels, *parameters, self.eps, keep_statistics, self.config)

    def backward(
        self, grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: list[bool] = ALL
    ) -> tuple[Any, ...]:
        return fusion.merge_levels_backward(
            grad_out, self.levels, *self.parameters.values(), mean, rstd, needs, self.config
        )

    def results(self, grad_out: Tensor) -> dict[str, Tensor]:
        """out and all gradients."""
        out, mean, rstd = self.forward()
        needs = [True, *(parameter is not None for parameter in self.parameters.values())]
        of_levels, *of_parameters = self.backward(grad_out, mean, rstd, needs)
        results = {"out": out} | {f"levels[{i}]": grad for i, grad in enumerate(of_levels)}
        found = zip(NAMES, of_parameters, needs[1:], strict=True)
        return results | {name: grad for name, grad, needed in found if needed}

    def by_reference(self, grad_out: Tensor, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The same by the definition, on leaves that are converted first."""
        levels = [convert(level).requires_grad_() for level in self.levels]
        parameters = {
            name: None if parameter is None else convert(parameter).requires_grad_()
            for name, parameter in self.parameters.items()
        }
        out = reference.merge_levels(levels, *parameters.values(), self.eps)
        leaves = {f"levels[{i}]": level for i, level in enumerate(levels)}
        leaves |= {name: parameter for name, parameter in parameters.items() if parameter is not None}
        grads = torch.autograd.grad(out, list(leaves.values()), convert(grad_out))
        return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))

    def random_gradient(self) -> Tensor:
        shape = (*self.levels[0].shape[:2], self.parameters["weight"].shape[-2])
        return torch.randn(shape).to(self.levels[0].dtype)


def problem_of(
    per_level: str = "",
    levels: int = 3,
    shape: tuple[int, int, int] = (2, 9, 12),
    features: int = 7,
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
    config: Config | None = CONFIG,
) -> Problem:
    """Levels of which CLS is cut off, of other means and sizes; `per_level` names by LETTERS what each level
    has of its own."""

    def parameter(name: str, *size: int) -> Tensor | None:
        if name in without:
            return None
        return torch.randn(*((levels,) if LETTERS[name] in per_level else ()), *size).to(dtype)

    images, tokens, channels = shape
    maps = [(torch.randn(images, tokens + 1, channels) * (1 + i) + i).to(dtype) for i in range(levels)]
    parameters = {
        "alpha": torch.randn(levels).to(dtype),
        "weight": parameter("weight", features, channels),
        "bias": parameter("bias", features),
        "ln_weight": parameter("ln_weight", channels),
        "ln_bias": parameter("ln_bias", channels),
    }
    return Problem([level[:, 1:] for level in maps], parameters, config)


def assert_right(problem: Problem) -> None:
    grad_out = problem.random_gradient()
    actual = problem.results(grad_out)
    expected = problem.by_reference(grad_out, lambda leaf: leaf.double())
    plain = problem.by_reference(grad_out, lambda leaf: leaf.clone())
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype, name
        assert value.is_contiguous(), name
        # The norm of one channel is 0, and a level's gradient what is left of two equal terms of this size.
        cancels = name.startswith("levels") and problem.levels[0].shape[-1] == 1
        terms = problem.eps**-0.5 if cancels else 0.0
        assert_close(value, expected[name], plain[name], name, terms)


SHARED_CASES = [*SMALL_CASES, *(case.reduced() for case in LARGE_CASES)]


@pytest.mark.parametrize("case", SHARED_CASES, ids=lambda case: case.name)
def test_shared_cases(case: MergeCase) -> None:
    """Each in one dtype: neighbours differ."""
    dtype = DTYPES[SHARED_CASES.index(case) % 3]
    levels, parameters = shortened(case).inputs(dtype)
    assert_right(Problem(levels, parameters))


def shortened(case: MergeCase) -> MergeCase:
    """With as many tokens as still make several tiles and shares of programs: the interpreter is slow."""
    return replace(case, levels=min(case.levels, 5), images=min(case.images, 2), tokens=min(case.tokens, 19))


def test_the_kernels_are_interpreted() -> None:
    assert INTERPRETED.value


@pytest.mark.parametrize("per_level", ["", "wbgn"])
def test_the_public_function_runs_them(per_level: str) -> None:
    problem = problem_of(per_level)
    leaves = [*problem.levels, *problem.parameters.values()]
    grad_out = problem.random_gradient()

    def by(backend: str, wanted: list[bool]) -> list[Tensor]:
        copies = [leaf.detach().requires_grad_(w) for leaf, w in zip(leaves, wanted, strict=True)]
        out = merge_levels(copies[:3], *copies[3:], backend=backend)
        differentiable = [copy for copy in copies if copy.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, differentiable, grad_out)]

    for wanted in ([True] * 8, [False] * 3 + [True] * 5, [False, True] + [False] * 6):
        for actual, expected in zip(by("triton", wanted), by("reference", wanted), strict=True):
            assert_conforms(actual, expected, gradient=True)


def kinds() -> list[Any]:
    """Everything that levels may share or not; neighbours differ in dtype."""
    subsets = ["".join(c for i, c in enumerate("wbgn") if bits >> i & 1) for bits in range(16)]
    return [(subset, DTYPES[i % 3]) for i, subset in enumerate(subsets)]


@pytest.mark.parametrize(("per_level", "dtype"), kinds())
def test_every_kind_of_sharing(per_level: str, dtype: torch.dtype) -> None:
    assert_right(problem_of(per_level, dtype=dtype))


@pytest.mark.parametrize("per_level", ["", "g", "wbgn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_with_the_default_tiles(dtype: torch.dtype, per_level: str) -> None:
    assert_right(problem_of(per_level, 2, (2, 5, 300), dtype=dtype, config=None))


@pytest.mark.parametrize("per_level", ["", "wbgn"])
@pytest.mark.parametrize("without", [("bias",), ("ln_weight",), ("ln_bias",), NAMES[2:]], ids=" and ".join)
def test_what_may_be_left_out(without: tuple[str, ...], per_level: str) -> None:
    assert_right(problem_of(per_level, dtype=torch.bfloat16, without=without))


SIZES = {
    "one of everything": (1, (1, 1, 1), 1),
    "one channel: the norm is 0": (2, (1, 5, 1), 3),
    "primes": (3, (1, 23, 37), 13),
    "one level": (1, (2, 4, 8), 5),
    "a full tile of channels": (2, (1, 8, 16), 16),
    "as many levels as CLIP-L": (24, (1, 3, 8), 4),
    "no image": (2, (0, 4, 3), 2),
    "no token": (2, (2, 0, 3), 2),
    "no channel": (2, (1, 2, 0), 2),
    "no feature": (2, (1, 2, 3), 0),
}


@pytest.mark.parametrize("per_level", ["", "wbgn", "gn"])
@pytest.mark.parametrize("name", SIZES)
def test_every_size(name: str, per_level: str) -> None:
    levels, shape, features = SIZES[name]
    assert_right(problem_of(per_level, levels, shape, features))


def test_levels_lie_in_memory_as_they_like() -> None:
    problem = problem_of(levels=5, shape=(2, 6, 8), dtype=torch.bfloat16)
    grad_out = problem.random_gradient()
    values = problem.levels
    expected = replace(problem, levels=[level.contiguous() for level in values]).results(grad_out)
    padded, shifted, transposed, strided = (
        torch.empty(shape, dtype=torch.bfloat16) for shape in ((2, 6, 11), (97,), (6, 2, 8), (2, 8, 6))
    )
    ways = [
        padded[..., :8].copy_(values[0]),  # tokens 22 bytes apart
        shifted[1:].view(2, 6, 8).copy_(values[1]),  # an address that is odd in elements
        transposed.transpose(0, 1).copy_(values[2]),  # images between tokens
        strided.transpose(1, 2).copy_(values[3]),  # channels apart: copied
        values[4],
    ]
    actual = replace(problem, levels=ways).results(grad_out)
    assert all(actual[name].equal(expected[name]) for name in expected)
    same = [ways[4][:1, :1].expand(2, 6, 8)] * 5  # one token for all, of one level for all
    assert_right(replace(problem, levels=same))


def test_images_may_be_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 4 GB stay untouched
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    problem = problem_of(levels=1, shape=(2, 3, 8), dtype=torch.bfloat16)
    far = memory.as_strided((2, 3, 8), (2**31, 8, 1)).copy_(problem.levels[0])
    grad_out = problem.random_gradient()
    expected = problem.results(grad_out)
    actual = replace(problem, levels=[far]).results(grad_out)
    assert all(actual[name].equal(expected[name]) for name in expected)


def test_any_strides_of_the_rest() -> None:
    problem = problem_of("wbgn")
    grad_out = problem.random_gradient()
    expected = problem.results(grad_out)
    strided = {
        name: torch.stack([parameter, parameter], -1)[..., 0]
        for name, parameter in problem.parameters.items()
    }
    assert not any(parameter.is_contiguous() for parameter in strided.values())
    actual = replace(problem, parameters=strided).results(grad_out.mT.contiguous().mT)
    for name in expected:
        assert_conforms(actual[name], expected[name], name, gradient=True)


def test_statistics_are_kept_only_where_they_are_wanted() -> None:
    problem = problem_of("w", dtype=torch.bfloat16)
    out, mean, rstd = problem.forward()
    stacked = torch.stack(problem.levels).double().flatten(1, 2)
    variance, expected = torch.var_mean(stacked, -1, correction=0)
    assert mean.dtype == rstd.dtype == torch.float32
    assert_conforms(mean, expected.float())
    assert_conforms(rstd, (variance + problem.eps).rsqrt().float())
    again, *nothing = problem.forward(keep_statistics=False)
    assert again.equal(out)
    assert [t.numel() for t in nothing] == [0, 0]


def test_a_mean_far_from_zero_loses_nothing() -> None:
    problem = problem_of(shape=(1, 7, 64))
    problem.levels = [level * 1e-2 + 100 for level in problem.levels]
    assert_right(problem)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of the kernels that ran, but for that which makes the table."""
    calls: list[dict[str, Any]] = []
    launch = fusion.launch

    def record(kernel: Any, grid: Any, tiles: Any, arguments: dict[str, Any]) -> None:
        if "entries" not in arguments:
            calls.append(arguments)
        launch(kernel, grid, tiles, arguments)

    monkeypatch.setattr(fusion, "launch", record)
    return calls


@pytest.mark.parametrize("per_level", ["", "g", "wbgn"])
def test_what_is_not_needed_is_empty_and_costs_nothing(
    per_level: str, launched: list[dict[str, Any]]
) -> None:
    problem = problem_of(per_level)
    _, mean, rstd = problem.forward()
    grad_out = problem.random_gradient()
    everything = problem.backward(grad_out, mean, rstd)
    parts = {
        (): None,
        ("bias",): None,
        ("levels",): {"GRAD_LEVELS"},
        ("alpha",): {"alpha_parts", "bias_parts"},
        ("weight",): {"merged"},
        ("ln_weight",): {"weight_parts"},
        ("ln_bias",): {"bias_parts"},
        ("weight", "ln_weight"): {"merged", "weight_parts"},
    }
    optional = ("GRAD_LEVELS", "alpha_parts", "bias_parts", "weight_parts", "merged")
    for wanted, expected in parts.items():
        launched.clear()
        needs = [name in wanted for name in ("levels", *NAMES)]
        of_levels, *grads = problem.backward(grad_out, mean, rstd, needs)
        if expected is None:
            assert not launched
        for call in launched:
            assert {n for n in optional if call[n] is not None and call[n] is not False} == expected, wanted
        assert len(of_levels) == (3 if "levels" in wanted else 0)
        assert all(grad.equal(full) for grad, full in zip(of_levels, everything[0], strict=False))
        for name, grad, full in zip(NAMES, grads, everything[1:], strict=True):
            assert grad.equal(full) if name in wanted else grad.numel() == 0, (wanted, name)


@pytest.mark.parametrize("per_level", ["", "gn", "wbgn"])
def test_the_same_bits_in_every_run(per_level: str) -> None:
    problem = problem_of(per_level, dtype=torch.bfloat16)
    grad_out = problem.random_gradient()
    first, again = problem.results(grad_out), problem.results(grad_out)
    assert all(again[name].equal(first[name]) for name in first)


@pytest.mark.parametrize("per_level", ["", "wbgn"])
def test_nan_stays_with_its_token(per_level: str) -> None:
    problem = problem_of(per_level)
    grad_out = problem.random_gradient()
    clean = problem.results(grad_out)
    problem.levels[1][1, 4] = torch.nan
    actual = problem.results(grad_out)
    touched = torch.zeros(2, 9, dtype=torch.bool)
    touched[1, 4] = True
    assert actual["out"][touched].isnan().all()
    assert actual["out"][~touched].equal(clean["out"][~touched])
    assert actual["levels[0]"].equal(clean["levels[0]"])
    assert actual["levels[1]"][touched].isnan().all()
    assert actual["levels[1]"][~touched].equal(clean["levels[1]"][~touched])
    assert actual["alpha"].isnan().tolist() == [False, True, False]


def test_what_the_kernels_do_not_take() -> None:
    with pytest.raises(TypeError, match=r'levels are torch.float64: use backend="reference"'):
        problem_of(dtype=torch.float64).forward()
    with pytest.raises(ValueError, match=r"up to 32768 channels, and the levels have 32769: use"):
        problem_of(shape=(1, 1, 32769), features=1).forward()
    problem = problem_of()
    problem.levels[1] = problem.levels[1][:, 1:]
    with pytest.raises(ValueError, match=r"levels of one shape.*\[2, 8, 12\]"):
        problem.forward()

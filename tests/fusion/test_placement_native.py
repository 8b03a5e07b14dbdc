"""The native copies and sums of image rows: any mask and index map, bit by bit, and as torch ops."""

from collections.abc import Callable

import pytest
import torch
from fusion.placement_cases import LARGE_CASES, SMALL_CASES, PlacementCase
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor
from torch.autograd import gradcheck

from pyvlm.ops import add_at_image_tokens, pack_image_tokens, place_image_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS = torch.ops.pyvlm

Op = Callable[..., Tensor]  # of leaves, and `backend=`


def results(op: Op, leaves: list[Tensor], grad: Tensor, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradient of every leaf."""
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    out = op(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def assert_right(op: Op, leaves: list[Tensor], grad: Tensor | None = None) -> None:
    dtype = leaves[0].dtype
    with torch.no_grad():
        out = op(*leaves, backend="native")
    grad = torch.randn(out.shape).to(dtype) if grad is None else grad
    actual = results(op, leaves, grad, "native", dtype)
    plain = results(op, leaves, grad, "reference", dtype)
    expected = results(op, leaves, grad, "reference", torch.float64)
    assert actual[0].equal(plain[0])
    for i, value in enumerate(actual):
        assert value.dtype == dtype
        assert_close(value, expected[i], plain[i], f"result {i}")


def op_of(case: PlacementCase) -> Op:
    mask, index = case.image_mask(), case.index()
    return lambda *leaves, backend: case.run(leaves, mask, index, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [*SMALL_CASES, *(case.reduced() for case in LARGE_CASES)], ids=lambda case: case.name
)
def test_cases(case: PlacementCase, dtype: torch.dtype) -> None:
    assert_right(op_of(case), list(case.inputs(dtype)))


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    samples, length = draw(st.integers(0, 4)), draw(st.integers(0, 12))
    bits = draw(st.lists(st.booleans(), min_size=samples * length, max_size=samples * length))
    return torch.tensor(bits, dtype=torch.bool).view(samples, length)


@st.composite
def indices(draw: st.DrawFn, rows: int, num_features: int) -> Tensor:
    """Any entries, −1 among them: used several times, once or never."""
    parts = draw(st.sampled_from([None, 1, 2, 3]))
    shape = (rows,) if parts is None else (rows, parts)
    count = torch.Size(shape).numel()
    entries = draw(st.lists(st.integers(-1, num_features - 1), min_size=count, max_size=count))
    return torch.tensor(entries, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).view(shape)


@settings(max_examples=100)
@given(data=st.data())
def test_any_mask_and_index(data: st.DataObject) -> None:
    data.draw(st.random_module())
    mask = data.draw(masks())
    rows, num_features = int(mask.sum()), data.draw(st.integers(0, 5))
    width, dtype = data.draw(st.integers(0, 40)), data.draw(st.sampled_from(DTYPES))
    index = data.draw(indices(rows, num_features))
    parts = index.shape[1] if index.dim() == 2 else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    text, features, newline = normal(*mask.shape, parts * width), normal(num_features, width), normal(width)
    assert_right(
        lambda t, f, n, backend: place_image_tokens(t, f, mask, index, n, backend=backend),
        [text, features, newline],
    )
    assert_right(lambda f, n, backend: pack_image_tokens(f, index, n, backend=backend), [features, newline])
    for op in (place_image_tokens, add_at_image_tokens):
        assert_right(
            lambda t, r, backend, op=op: op(t, r, mask, backend=backend), [text, normal(rows, parts * width)]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_used_often_is_summed_in_float32(dtype: torch.dtype) -> None:
    index = torch.full((3000,), 1)
    index[::2] = -1
    grad = (1 + torch.rand(3000, 70)).to(dtype)
    leaves = [torch.randn(3, 70).to(dtype), torch.randn(70).to(dtype)]
    _, features, newline = results(
        lambda f, n, backend: pack_image_tokens(f, index, n, backend=backend), leaves, grad, "native", dtype
    )
    accumulated = grad.double() if dtype == torch.float64 else grad.float()
    for value, rows in ((features[1], accumulated[1::2]), (newline, accumulated[::2])):
        exact = rows.double().sum(0)
        assert_close(value, exact, plain=rows.sum(0).to(dtype))
    assert (features[[0, 2]] == 0).all()


def strided(tensor: Tensor, kind: str) -> Tensor:
    """The same values, as a view."""
    if kind == "rows of a wider tensor":
        return torch.nn.functional.pad(tensor, (3, 5), value=torch.nan)[..., 3:-5]
    if kind == "some of the rows":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], 1)[:, 0]
    assert kind == "transposed"
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize("kind", ["rows of a wider tensor", "some of the rows", "transposed"])
def test_views(kind: str) -> None:
    mask, index = torch.rand(5, 7) < 0.5, torch.randint(-1, 4, (9,))
    mask.view(-1)[:9], mask.view(-1)[9:] = True, False
    text, features, newline = torch.randn(5, 7, 6), torch.randn(4, 6), torch.randn(6)
    rows, grad = torch.randn(9, 6), torch.randn(5, 7, 6)

    def view(tensor: Tensor) -> Tensor:
        view = strided(tensor, kind)
        assert not view.is_contiguous()
        assert view.equal(tensor)
        return view

    strided_mask = torch.stack([mask, ~mask], -1)[..., 0]
    wide_newline = torch.stack([newline, newline], 1)[:, 0]
    calls = (
        (OPS.place_image_tokens, (text, features, mask, index, newline), (0, 1)),
        (OPS.place_image_tokens, (text, rows, mask, None, None), (0, 1)),
        (OPS.add_at_image_tokens, (text, rows, mask), (0, 1)),
        (OPS.pack_image_tokens, (features, index, newline), (0,)),
        (OPS.place_image_tokens_backward, (grad, mask, index, 4, 6, [True] * 3), (0,)),
        (OPS.place_image_tokens_backward, (grad, mask, None, 9, 6, [True] * 3), (0,)),
        (OPS.pack_image_tokens_backward, (rows, index, 4, 6, [True] * 2), (0,)),
        (OPS.add_at_image_tokens_backward, (grad, mask, 9), (0,)),
    )
    for op, arguments, positions in calls:
        views = [view(a) if i in positions else a for i, a in enumerate(arguments)]
        views = [strided_mask if a is mask else wide_newline if a is newline else a for a in views]
        expected, actual = op(*arguments), op(*views)
        if isinstance(expected, Tensor):
            expected, actual = [expected], [actual]
        assert all(a.is_contiguous() and a.equal(e) for a, e in zip(actual, expected, strict=True))


def test_a_gradient_that_is_one_number() -> None:
    case = SMALL_CASES[3]
    inputs = [leaf.requires_grad_() for leaf in case.inputs(torch.float32)]
    op_of(case)(*inputs, backend="native").sum().backward()
    assert (inputs[0].grad == (~case.image_mask())[..., None]).all()
    assert (inputs[2].grad == (case.index() == -1).sum()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["place", "pack", "add", "place with an index"])
def test_the_same_bits_for_any_number_of_threads(op: str, dtype: torch.dtype) -> None:
    mask = torch.rand(3, 300) < 0.6
    rows = int(mask.sum())
    index = torch.randint(-1, 50, (rows,))
    text, image, features = torch.randn(3, 300, 700), torch.randn(rows, 700), torch.randn(50, 700)
    newline, grad = torch.randn(700), torch.randn(3, 300, 700)
    run, leaves = {
        "place": (lambda t, f, backend: place_image_tokens(t, f, mask, backend=backend), [text, image]),
        "add": (lambda t, f, backend: add_at_image_tokens(t, f, mask, backend=backend), [text, image]),
        "pack": (
            lambda f, n, backend: pack_image_tokens(f, index, n, backend=backend),
            [features, newline],
        ),
        "place with an index": (
            lambda t, f, n, backend: place_image_tokens(t, f, mask, index, n, backend=backend),
            [text, features, newline],
        ),
    }[op]
    grad = grad[mask] if op == "pack" else grad
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            runs.append(results(run, leaves, grad, "native", dtype))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(a.equal(b) for a, b in zip(other, runs[0], strict=True))


def test_nan_in_rows_that_nobody_sees_stays_there() -> None:
    mask = torch.tensor([[False, True, True, False], [True, False, False, True]])
    text = torch.randn(2, 4, 20).masked_fill(mask[..., None], torch.nan).requires_grad_()
    features = torch.randn(5, 20)
    features[[1, 3]] = torch.nan
    features.requires_grad_()
    newline = torch.full((20,), torch.nan).requires_grad_()
    index = torch.tensor([0, 4, 2, 0])
    placed = place_image_tokens(text, features, mask, index, newline)
    assert placed.isfinite().all()
    grad = torch.randn(2, 4, 20)
    gradients = torch.autograd.grad(placed, (text, features, newline), grad)
    assert (gradients[0][mask] == 0).all()
    assert (gradients[1][[1, 3]] == 0).all()
    assert (gradients[2] == 0).all()
    assert all(g.isfinite().all() for g in gradients)
    # What the cotangent holds at one token reaches the sources of that token alone.
    grad[0, 1] = torch.nan  # of feature row 0
    broken = torch.autograd.grad(
        place_image_tokens(text, features, mask, index, newline), (text, features, newline), grad
    )
    assert broken[0].equal(gradients[0])
    assert broken[1][0].isnan().all()
    assert broken[1][1:].equal(gradients[1][1:])
    assert broken[2].equal(gradients[2])
    # Added to, a broken token breaks no other.
    hidden = torch.randn(2, 4, 20)
    hidden[0, 1] = torch.nan
    added = add_at_image_tokens(hidden, torch.randn(4, 20), mask)
    assert added[0, 1].isnan().all()
    assert added.isnan().sum() == 20


def test_gradients_by_differences() -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    mask = torch.tensor([[False, True, True], [True, False, True]])
    index = torch.tensor([[0, 2], [-1, 2], [1, -1], [2, 0]])
    assert gradcheck(
        lambda t, f, n: place_image_tokens(t, f, mask, index, n, backend="native"),
        [leaf(2, 3, 4), leaf(3, 2), leaf(2)],
    )
    assert gradcheck(
        lambda t, f: place_image_tokens(t, f, mask, backend="native"), [leaf(2, 3, 2), leaf(4, 2)]
    )
    assert gradcheck(lambda f, n: pack_image_tokens(f, index, n, backend="native"), [leaf(3, 2), leaf(2)])
    assert gradcheck(
        lambda h, u: add_at_image_tokens(h, u, mask, backend="native"), [leaf(2, 3, 2), leaf(4, 2)]
    )


@pytest.mark.parametrize("case", SMALL_CASES[2:6], ids=lambda case: case.name)
def test_what_is_frozen_changes_no_other_gradient(case: PlacementCase) -> None:
    op, inputs = op_of(case), case.inputs(torch.float32)
    grad = torch.randn(op(*inputs, backend="native").shape)
    expected = results(op, list(inputs), grad, "native", torch.float32)[1:]
    for frozen in range(len(inputs)):
        leaves = [leaf.detach().requires_grad_(i != frozen) for i, leaf in enumerate(inputs)]
        op(*leaves, backend="native").backward(grad)
        assert leaves[frozen].grad is None
        assert all(leaf.grad.equal(expected[i]) for i, leaf in enumerate(leaves) if i != frozen)


def test_only_mask_and_index_are_saved() -> None:
    case = SMALL_CASES[3]
    mask, index = case.image_mask(), case.index()
    inputs = [leaf.requires_grad_() for leaf in case.inputs(torch.float32)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        case.run(inputs, mask, index, "native")
    assert set(saved) == {mask.data_ptr(), index.data_ptr()}


def arguments(dtype: torch.dtype) -> dict[str, tuple[object, ...]]:
    """Of every op, by its name and what is special."""
    mask = torch.tensor([[False, True, True], [True, False, True]])
    index, parts = torch.tensor([1, -1, 0, 1]), torch.tensor([[1, -1], [0, 1], [2, 2], [0, -1]]).int()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    text, features, newline = normal(2, 3, 4), normal(3, 4), normal(4)
    half, half_newline = normal(3, 2), normal(2)
    return {
        "place_image_tokens": (text, normal(4, 4), mask, None, None),
        "place_image_tokens, packed": (text, features, mask, index, newline),
        "place_image_tokens, parts": (text, half, mask, parts, half_newline),
        "place_image_tokens_backward": (text, mask, None, 4, 4, [True, True, False]),
        "place_image_tokens_backward, packed": (text, mask, index, 3, 4, [False, True, True]),
        "place_image_tokens_backward, parts": (text, mask, parts, 3, 2, [True, True, True]),
        "pack_image_tokens": (features, index, newline),
        "pack_image_tokens, parts": (half, parts, half_newline),
        "pack_image_tokens_backward": (normal(4, 4), index, 3, 4, [True, True]),
        "pack_image_tokens_backward, one": (normal(4, 4), index, 3, 4, [False, True]),
        "add_at_image_tokens": (text, normal(4, 4), mask),
        "add_at_image_tokens_backward": (text, mask, 4),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", arguments(torch.float32))
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    given = arguments(dtype)[name]
    op = name.split(",")[0]
    if not op.endswith("_backward"):
        for tensor in given:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.requires_grad_()
    torch.library.opcheck(getattr(OPS, op).default, given)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_in_one_graph_with_its_gradients(compiler: str) -> None:
    newline = torch.randn(12, requires_grad=True)

    def run(text: Tensor, features: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        placed = place_image_tokens(text * 2, features, mask, index, newline, backend="native")
        packed = pack_image_tokens(features, index, newline, backend="native")
        return add_at_image_tokens(placed, packed, mask, backend="native") * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=compiler)
    for samples, length in ((2, 7), (3, 11)):
        mask = torch.rand(samples, length) < 0.5
        index = torch.randint(-1, 5, (int(mask.sum()),))
        inputs = (torch.randn(samples, length, 12), torch.randn(5, 12))
        grad = torch.randn(samples, length, 12)

        runs = []
        for function in (compiled, run):
            leaves = [leaf.clone().requires_grad_() for leaf in inputs]
            y = function(*leaves, mask, index)
            runs.append([y.detach(), *torch.autograd.grad(y, [*leaves, newline], grad)])
        assert all(a.equal(b) for a, b in zip(*runs, strict=True))


def test_a_second_derivative_is_refused() -> None:
    for case in SMALL_CASES[3:6]:
        leaves = [leaf.requires_grad_() for leaf in case.inputs(torch.float64)]
        out = op_of(case)(*leaves, backend="native")
        (grad,) = torch.autograd.grad((out**2).sum(), leaves[-1], create_graph=True)
        with pytest.raises(RuntimeError, match=r'no second derivative .* use backend="reference"'):
            grad.sum().backward()


MASK = torch.tensor([[True, False, True]])
TEXT, ROWS, INDEX = torch.zeros(1, 3, 2), torch.zeros(2, 2), torch.tensor([0, 1])
BAD = {
    "fewer rows": (
        lambda: OPS.place_image_tokens(TEXT, ROWS[:1], MASK, None, None),
        ValueError,
        "there are 2 image placeholders, but 1 image features",
    ),
    "more entries": (
        lambda: OPS.place_image_tokens(TEXT, ROWS, MASK, torch.tensor([0, 0, 0]), None),
        ValueError,
        "there are 2 image placeholders, but 3 image features",
    ),
    "more updates": (
        lambda: OPS.add_at_image_tokens(TEXT, torch.zeros(3, 2), MASK),
        ValueError,
        "there are 2 image placeholders, but 3 image features",
    ),
    "entry beyond the rows": (
        lambda: OPS.place_image_tokens(TEXT, ROWS, MASK, torch.tensor([0, 2]), None),
        ValueError,
        "index runs from 0 to 2; there are 2 feature rows, and no newline was given",
    ),
    "no newline": (
        lambda: OPS.pack_image_tokens(ROWS, torch.tensor([0, -1]), None),
        ValueError,
        "index runs from -1 to 0; there are 2 feature rows, and no newline was given",
    ),
    "entry below the newline": (
        lambda: OPS.pack_image_tokens(ROWS, torch.tensor([0, -2]), ROWS[0]),
        ValueError,
        "index runs from -2 to 0; there are 2 feature rows, and only -1 stands for the newline",
    ),
    "gradient of fewer rows": (
        lambda: OPS.pack_image_tokens_backward(ROWS[:1], INDEX, 2, 2, [True, True]),
        RuntimeError,
        r"grad is \[1, 2\]; expected \[2, 2\]",
    ),
    "backward of fewer rows": (
        lambda: OPS.place_image_tokens_backward(TEXT, MASK, None, 1, 2, [True] * 3),
        ValueError,
        "there are 2 image placeholders, but 1 image features",
    ),
    "backward beyond the rows": (
        lambda: OPS.place_image_tokens_backward(TEXT, MASK, INDEX, 1, 2, [True] * 3),
        ValueError,
        "index runs from 0 to 1; there are 1 feature rows",
    ),
    "mask of another shape": (
        lambda: OPS.place_image_tokens(TEXT, ROWS, MASK[:, :2], None, None),
        RuntimeError,
        r"image_mask is Bool \[1, 2\] beside tokens \[1, 3, 2\]",
    ),
    "another type": (
        lambda: OPS.place_image_tokens(TEXT, ROWS.double(), MASK, None, None),
        RuntimeError,
        "text is Float .* the same type for all",
    ),
    "integers": (
        lambda: OPS.pack_image_tokens(ROWS.long(), INDEX, None),
        RuntimeError,
        "features is Long",
    ),
    "another width": (
        lambda: OPS.add_at_image_tokens(TEXT, ROWS[:, :1], MASK),
        RuntimeError,
        "updates have 1 features, and hidden has 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_the_ops_themselves_refuse(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()

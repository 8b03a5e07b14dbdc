"""The native fuse_grids and patches_to_token: values, gradients, what is saved, and as torch ops."""

from dataclasses import replace

import pytest
import torch
from fusion.grid_cases import SMALL_CASES, GridCase
from tolerance import assert_close
from torch import Tensor
from torch.autograd import gradcheck

from pyvlm.ops import fuse_grids, patches_to_token

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BY_NAME = {case.name: case for case in SMALL_CASES}


def with_gradients(y: Tensor, leaves: list[Tensor], grad_y: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def compare(run: object, inputs: list[Tensor], grad_y: Tensor) -> None:
    """run(backend, *inputs) by the native op against the reference, values and every gradient."""

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        return with_gradients(run(backend, *leaves), leaves, grad_y)

    dtype = inputs[0].dtype
    actual, plain = results("native", dtype), results("reference", dtype)
    expected = results("reference", torch.float64)
    for i, (a, e, p) in enumerate(zip(actual, expected, plain, strict=True)):
        assert a.is_contiguous()
        assert_close(a, e, plain=p, name="y" if i == 0 else f"gradient {i - 1}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["concatenated", "projected", "with a bias"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_fuse_grids(case: GridCase, kind: str, dtype: torch.dtype) -> None:
    count = len(case.grids)
    projection = {"concatenated": 0, "projected": 1, "with a bias": 2}[kind]
    inputs = [*case.features(dtype), *case.projection(dtype)[:projection]]
    width = case.out_features if projection else sum(case.channels)

    def run(backend: str, *tensors: Tensor) -> Tensor:
        options = {"mode": case.mode, "align_corners": case.align_corners, "backend": backend}
        return fuse_grids(tensors[:count], case.grids, case.target, *tensors[count:], **options)

    compare(run, inputs, torch.randn(case.images, case.target[0] * case.target[1], width).to(dtype))


@pytest.mark.parametrize("images", [0, 1])
def test_no_image_and_one(images: int) -> None:
    case = replace(BY_NAME["down"], images=images)
    features, (weight, bias) = case.features(torch.float32), case.projection(torch.float32)
    fused = fuse_grids(features, case.grids, case.target, weight, bias, backend="native")
    assert fused.shape == (images, 64, 50)


def test_maps_with_the_class_token_cut_off() -> None:
    case = BY_NAME["one-grid"]
    weight, _ = case.projection(torch.float32)
    features = [torch.randn(2, 65, c)[:, 1:] for c in case.channels]
    expected = fuse_grids(
        [x.contiguous() for x in features], case.grids, case.target, weight, backend="native"
    )
    assert fuse_grids(features, case.grids, case.target, weight, backend="native").equal(expected)


def test_the_gradient_of_an_only_map_is_a_tensor_of_its_own() -> None:
    """An op's result that is its argument would be changed with it, in a gradient that is clipped, say."""
    x, grad = torch.randn(2, 16, 8, requires_grad=True), torch.randn(2, 16, 8)
    y = fuse_grids([x], [(4, 4)], (4, 4), backend="native")
    (actual,) = torch.autograd.grad(y, x, grad)
    assert actual.equal(grad)
    assert actual.data_ptr() != grad.data_ptr()


def test_the_concatenation_is_never_made() -> None:
    case = BY_NAME["up"]
    features = [x.requires_grad_() for x in case.features(torch.float32)]
    weight, bias = (t.requires_grad_() for t in case.projection(torch.float32))

    def saved_bytes(*projection: Tensor) -> int:
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            fuse_grids(features, case.grids, case.target, *projection, backend="native")
        return sum(saved.values())

    assert saved_bytes(weight, bias) == sum(t.nbytes for t in (*features, weight))
    assert saved_bytes() == 0


@pytest.mark.parametrize("frozen", ["weight", "the first map", "all maps"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    case = BY_NAME["up"]
    features, (weight, bias) = case.features(torch.float32), case.projection(torch.float32)
    names = ["the first map", "the second map", "weight", "bias"]
    leaves = dict(zip(names, [*features, weight, bias], strict=True))
    still = [name for name in names if name == frozen or (frozen == "all maps" and "map" in name)]
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in still)
    fuse_grids(features, case.grids, case.target, weight, bias, backend="native").sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is None] == still


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projected", [False, True], ids=["concatenated", "projected"])
@pytest.mark.parametrize("name", ["down", "all-up", "area", "corners"])
def test_opcheck_of_fuse_grids(name: str, projected: bool, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    features = case.features(dtype)
    weight, bias = case.projection(dtype) if projected else (None, None)
    grids, options = [side for grid in case.grids for side in grid], (case.mode, case.align_corners)
    grad_y = torch.randn(
        case.images, case.target[0] * case.target[1], case.out_features if projected else sum(case.channels)
    ).to(dtype)
    needs = [True] * len(features) + [projected] * 2
    torch.library.opcheck(
        torch.ops.pyvlm.fuse_grids_backward.default,
        (grad_y, features, grids, list(case.target), weight, *options, needs),
    )
    for tensor in (*features, weight, bias):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.pyvlm.fuse_grids.default, (features, grids, list(case.target), weight, bias, *options)
    )


@pytest.mark.parametrize("name", ["down", "up", "nearest", "area", "corners"])
def test_gradcheck_of_fuse_grids(name: str) -> None:
    case = replace(
        BY_NAME[name], images=1, grids=((3, 3), (2, 4)), channels=(2, 1), target=(3, 3), out_features=2
    )
    leaves = [t.requires_grad_() for t in (*case.features(torch.float64), *case.projection(torch.float64))]

    def run(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options = (case.mode, case.align_corners, "native")
        return fuse_grids([x, y], case.grids, case.target, weight, bias, *options)

    assert gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("target", [(4, 4), (5, 3), (1, 1)])  # windows that divide the map, and that overlap
def test_an_area_of_half_precision_is_rounded_once(
    target: tuple[int, int], images: int, dtype: torch.dtype
) -> None:
    x = (torch.randn(images, 16 * 16 + 1, 40) + 3).to(dtype)[:, 1:]
    exact = fuse_grids([x.float()], [(16, 16)], target, mode="area", backend="native")
    assert torch.equal(fuse_grids([x], [(16, 16)], target, mode="area", backend="native"), exact.to(dtype))


# ---- patches_to_token

EXPERTS = ((12, 20, 3), (10, 33, 1), (5, 7, 5))  # tokens, channels and patches


def expert_inputs(images: int, dtype: torch.dtype, width: int = 30) -> list[Tensor]:
    features = [torch.randn(images, t, c) for t, c, _ in EXPERTS]
    weights = [torch.randn(width, m * c) * (m * c) ** -0.5 for _, c, m in EXPERTS]
    return [t.to(dtype) for t in (*features, *weights, torch.randn(width), torch.randn(width))]


def run_experts(backend: str, *tensors: Tensor) -> Tensor:
    """The expert in the middle has no bias."""
    features, weights, biases = tensors[:3], tensors[3:6], [tensors[6], None, tensors[7]]
    return patches_to_token(features, weights, [m for *_, m in EXPERTS], biases, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images", [0, 1, 40])
def test_patches_to_token(images: int, dtype: torch.dtype) -> None:
    width = 80 if images > 1 else 30  # the products of 40 images are the native ones
    compare(run_experts, expert_inputs(images, dtype, width), torch.randn(images, 15, width).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_patches_to_token(dtype: torch.dtype) -> None:
    tensors, patches = expert_inputs(2, dtype), [m for *_, m in EXPERTS]
    grad_y = torch.randn(2, 15, 30).to(dtype)
    features, weights = tensors[:3], tensors[3:6]
    biases = [tensors[6], tensors[6].new_empty(0), tensors[7]]
    needs = [True] * 7 + [False, True]
    torch.library.opcheck(
        torch.ops.pyvlm.patches_to_token_backward.default, (grad_y, features, weights, patches, needs)
    )
    for tensor in tensors:
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.pyvlm.patches_to_token.default, (features, weights, biases, patches))


def test_gradcheck_of_patches_to_token() -> None:
    leaves = [t.requires_grad_() for t in expert_inputs(1, torch.float64, width=2)]
    assert gradcheck(lambda *tensors: run_experts("native", *tensors), leaves)


# ---- both


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_in_one_graph() -> None:
    case = BY_NAME["all-up"]
    weight, bias = case.projection(torch.float32)

    def fused(*features: Tensor) -> Tensor:
        return fuse_grids(features, case.grids, case.target, weight, bias, backend="native")

    def tokens(*tensors: Tensor) -> Tensor:
        return run_experts("native", *tensors)

    for run, inputs in (
        (fused, lambda images: replace(case, images=images).features(torch.float32)),
        (tokens, lambda images: expert_inputs(images, torch.float32)),
    ):
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        for images in (2, 5):
            leaves = [t.requires_grad_() for t in inputs(images)]
            y = run(*leaves)
            grad_y = torch.randn_like(y)
            expected = with_gradients(y, leaves, grad_y)
            for a, e in zip(with_gradients(compiled(*leaves), leaves, grad_y), expected, strict=True):
                assert a.equal(e)


def test_under_autocast() -> None:
    case = BY_NAME["up"]
    features, projection = case.features(torch.float32), case.projection(torch.float32)
    tensors = expert_inputs(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fused = fuse_grids(features, case.grids, case.target, *projection, backend="native")
        tokens = run_experts("native", *tensors)
    halves = [t.bfloat16() for t in features]
    assert fused.equal(
        fuse_grids(halves, case.grids, case.target, *(t.bfloat16() for t in projection), backend="native")
    )
    assert tokens.equal(run_experts("native", *(t.bfloat16() for t in tensors)))


def test_the_same_bits_for_any_number_of_threads() -> None:
    case = replace(BY_NAME["up"], images=8, channels=(200, 300), out_features=260)
    leaves = [t.requires_grad_() for t in (*case.features(torch.float32), *case.projection(torch.float32))]
    grad_y = torch.randn(8, 64, 260)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            y = fuse_grids(leaves[:2], case.grids, case.target, *leaves[2:], backend="native")
            runs.append(with_gradients(y, leaves, grad_y))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(a.equal(b) for a, b in zip(run, runs[0], strict=True))


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(1, 4, 3, requires_grad=True)
    weight = torch.randn(2, 3)
    for y in (
        fuse_grids([x], [(2, 2)], (2, 2), weight, backend="native"),
        patches_to_token([x], [weight], [1], backend="native"),
    ):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def test_the_ops_themselves_check_shapes() -> None:
    x, weight = torch.zeros(2, 4, 3), torch.zeros(5, 4)
    with pytest.raises(RuntimeError, match=r"features\[0\] is Float \[2, 4, 3\] on a grid of 2 x 3"):
        torch.ops.pyvlm.fuse_grids([x], [2, 3], [2, 2], None, None, "area", False)
    with pytest.raises(RuntimeError, match=r"weight is \[5, 4\]; expected \[H, 3\]"):
        torch.ops.pyvlm.fuse_grids([x], [2, 2], [2, 2], weight, None, "area", False)
    with pytest.raises(ValueError, match="mode is 'cubic'"):
        torch.ops.pyvlm.fuse_grids([x], [2, 2], [2, 2], None, None, "cubic", False)
    with pytest.raises(RuntimeError, match=r"weights\[0\] \[5, 4\] for 1 patches"):
        torch.ops.pyvlm.patches_to_token([x], [weight], [torch.zeros(0)], [1])

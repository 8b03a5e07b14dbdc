"""The fusion ops against their formulas written out: values, gradients, odd shapes and bad input."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close, assert_conforms
from torch import Tensor
from torch.autograd import gradcheck

from pyvlm.ops.fusion import merge_levels
from pyvlm.ops.grids import fuse_grids, patches_to_token

DTYPES = (torch.float32, torch.bfloat16)


def randn(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


# ---- merge_levels


def merge_arguments(
    levels: int, shape: tuple[int, int, int], out_dim: int, per_level: str, grad: bool = False
) -> list[Tensor]:
    """Stacked levels, alpha, W, b, γ, β; `per_level` names those ("w", "b", "g") that are one a level."""
    channels = shape[-1]

    def each(letter: str, *size: int) -> Tensor:
        return randn(*(((levels,) if letter in per_level else ()) + size), grad=grad)

    return [
        randn(levels, *shape, grad=grad),
        randn(levels, grad=grad),
        each("w", out_dim, channels),
        each("b", out_dim),
        each("g", channels),
        each("g", channels),
    ]


def plain_merge(levels: Tensor, alpha: Tensor, w: Tensor, b: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """COMM's sum, level by level, in the dtype of its arguments."""
    count, channels, out_dim = len(levels), levels.shape[-1], w.shape[-2]
    w, b = w.expand(count, out_dim, channels), b.expand(count, out_dim)
    gamma, beta = gamma.expand(count, channels), beta.expand(count, channels)
    total = 0.0
    for i in range(count):
        centered = levels[i] - levels[i].mean(-1, keepdim=True)
        normalized = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + 1e-5)
        total = total + alpha[i] * ((gamma[i] * normalized + beta[i]) @ w[i].T + b[i])
    return total


MERGE_CASES = [
    pytest.param(3, (2, 5, 7), 6, "", id="shared"),
    pytest.param(3, (2, 5, 7), 6, "wbg", id="per level"),
    pytest.param(2, (1, 3, 11), 1, "g", id="norms per level, one output, prime channels"),
    pytest.param(2, (2, 4, 3), 5, "wb", id="projections per level, norm shared"),
    pytest.param(1, (1, 1, 2), 3, "", id="one level, one token"),
    pytest.param(24, (1, 2, 8), 4, "b", id="as many levels as CLIP-L"),
    pytest.param(2, (1, 4, 1), 2, "", id="one channel: the norm is 0"),
    pytest.param(2, (0, 4, 3), 2, "", id="no image"),
    pytest.param(2, (2, 0, 3), 2, "w", id="no token"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("levels", "shape", "out_dim", "per_level"), MERGE_CASES)
def test_merge_levels_is_the_formula(
    levels: int, shape: tuple[int, int, int], out_dim: int, per_level: str, dtype: torch.dtype
) -> None:
    arguments = [a.to(dtype) for a in merge_arguments(levels, shape, out_dim, per_level)]
    expected = plain_merge(*[a.double() for a in arguments])
    assert_close(merge_levels(*arguments), expected, plain_merge(*arguments))
    assert_close(merge_levels(arguments[0].unbind(), *arguments[1:]), expected, plain_merge(*arguments))


@pytest.mark.parametrize(("levels", "shape", "out_dim", "per_level"), MERGE_CASES[:4])
def test_merge_levels_gradients(
    levels: int, shape: tuple[int, int, int], out_dim: int, per_level: str
) -> None:
    assert gradcheck(merge_levels, merge_arguments(levels, shape, out_dim, per_level, grad=True))


def test_one_shared_projection_collapses_to_one_product() -> None:
    """W·(γ⊙Σ α_l v̂_l + β Σα_l) + b Σα_l is the sum over levels exactly."""
    levels, alpha, w, b, gamma, beta = merge_arguments(5, (2, 3, 8), 4, "")
    scaled = sum(a * F.layer_norm(v, (8,)) for a, v in zip(alpha, levels, strict=True))
    collapsed = (gamma * scaled + beta * alpha.sum()) @ w.T + b * alpha.sum()
    assert_conforms(collapsed, plain_merge(levels, alpha, w, b, gamma, beta), "collapse of the formula")
    assert_conforms(merge_levels(levels, alpha, w, b, gamma, beta), collapsed, "op")


def test_merge_levels_defaults_are_no_bias_and_a_plain_norm() -> None:
    levels, alpha, w, b, gamma, beta = merge_arguments(3, (2, 3, 8), 4, "")
    expected = plain_merge(
        levels, alpha, w, torch.zeros_like(b), torch.ones_like(gamma), torch.zeros_like(beta)
    )
    assert_conforms(merge_levels(levels, alpha, w), expected)


def test_merge_levels_of_views() -> None:
    """Levels as an encoder gives them: CLS cut off, channels last only by strides."""
    levels, *rest = merge_arguments(3, (2, 5, 7), 6, "")
    padded = torch.cat([randn(3, 2, 1, 7), levels], dim=2)[:, :, 1:]
    strided = levels.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    expected = merge_levels(levels, *rest)
    assert_conforms(merge_levels(padded, *rest), expected)
    assert_conforms(merge_levels(strided, *rest), expected)


def test_float32_parameters_meet_half_levels_under_autocast() -> None:
    levels, *parameters = (a.float() for a in merge_arguments(3, (2, 5, 7), 6, ""))
    with pytest.raises(TypeError, match=r"alpha is torch.float32 but levels\[0\] is torch.bfloat16"):
        merge_levels(levels.bfloat16(), *parameters)
    with torch.autocast("cpu", torch.bfloat16):
        merged = merge_levels(levels.bfloat16(), *parameters)
    expected = plain_merge(levels.bfloat16().double(), *[p.double() for p in parameters])
    assert_close(merged, expected, plain_merge(levels.bfloat16(), *[p.bfloat16() for p in parameters]))


# ---- fuse_grids


def test_fuse_grids_resizes_by_each_mode() -> None:
    fine = torch.arange(16.0).view(1, 16, 1)  # row-major over 4 × 4
    blocks = fine.view(2, 2, 2, 2).mean((1, 3)).flatten()
    assert torch.equal(fuse_grids([fine], [(4, 4)], (2, 2), mode="area").flatten(), blocks)
    assert torch.equal(fuse_grids([fine], [(4, 4)], (2, 2), mode="bilinear").flatten(), blocks)
    corners = fuse_grids([fine], [(4, 4)], (2, 2), mode="bilinear", align_corners=True)
    assert torch.equal(corners.flatten(), torch.tensor([0.0, 3.0, 12.0, 15.0]))
    assert torch.equal(
        fuse_grids([fine], [(4, 4)], (2, 2), mode="nearest").flatten(), torch.tensor([0.0, 2.0, 8.0, 10.0])
    )
    coarse = torch.tensor([[[1.0], [2.0]]])  # 1 × 2 to 2 × 4: every value becomes a 2 × 2 block
    assert torch.equal(
        fuse_grids([coarse], [(1, 2)], (2, 4), mode="nearest").flatten(),
        torch.tensor([1.0, 1.0, 2.0, 2.0] * 2),
    )


def test_fuse_grids_keeps_a_map_on_the_target_grid_untouched() -> None:
    same, other = randn(2, 6, 3, dtype=torch.bfloat16), randn(2, 4, 5, dtype=torch.bfloat16)
    fused = fuse_grids([same, other], [(2, 3), (2, 2)], (2, 3))
    assert fused.dtype == torch.bfloat16
    assert torch.equal(fused[..., :3], same)
    assert not fused[..., 3:].isnan().any()


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "area"])
@pytest.mark.parametrize("images", [2, 0])
def test_fuse_grids_projects_the_concatenation(mode: str, images: int) -> None:
    features = [randn(images, 6, 3), randn(images, 35, 2)]
    weight, bias = randn(4, 5), randn(4)
    concatenated = fuse_grids(features, [(2, 3), (7, 5)], (3, 4), mode=mode)
    projected = fuse_grids(features, [(2, 3), (7, 5)], (3, 4), weight, bias, mode=mode)
    assert concatenated.shape == (images, 12, 5)
    assert_conforms(projected, concatenated @ weight.T + bias)


@pytest.mark.parametrize(
    ("mode", "align_corners"), [("bilinear", False), ("bilinear", True), ("nearest", False), ("area", False)]
)
def test_fuse_grids_gradients(mode: str, align_corners: bool) -> None:
    leaves = [
        randn(1, 6, 2, grad=True),
        randn(1, 9, 1, grad=True),
        randn(4, 3, grad=True),
        randn(4, grad=True),
    ]

    def fused(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fuse_grids([x, y], [(2, 3), (3, 3)], (2, 3), weight, bias, mode, align_corners)

    assert gradcheck(fused, leaves)


# ---- patches_to_token


@pytest.mark.parametrize("with_bias", [True, False])
def test_patches_to_token_takes_patches_in_order(with_bias: bool) -> None:
    features = [randn(2, 6, 3), randn(2, 4, 2), randn(2, 5, 1)]
    patches = [3, 1, 5]
    weights = [randn(4, 9), randn(4, 2), randn(4, 5)]
    biases = [randn(4), None, randn(4)] if with_bias else None
    tokens = []
    for i, (x, m, w) in enumerate(zip(features, patches, weights, strict=True)):
        for first in range(0, x.shape[1], m):
            token = torch.cat([x[:, first + j] for j in range(m)], dim=-1) @ w.T
            tokens.append(token if biases is None or biases[i] is None else token + biases[i])
    assert_conforms(patches_to_token(features, weights, patches, biases), torch.stack(tokens, dim=1))


def test_patches_to_token_gradients() -> None:
    leaves = [randn(1, 4, 2, grad=True), randn(1, 3, 1, grad=True), randn(2, 4, grad=True)]
    leaves += [randn(2, 1, grad=True), randn(2, grad=True)]
    assert gradcheck(lambda x, y, w, v, b: patches_to_token([x, y], [w, v], [2, 1], [b, None]), leaves)


# ---- bad input

X = torch.zeros(2, 4, 3)
W = torch.zeros(5, 3)
BAD = {
    "no level": (lambda: merge_levels([], torch.ones(0), W), ValueError, "levels is empty"),
    "levels differ": (
        lambda: merge_levels([X, X[:, :3]], torch.ones(2), W),
        ValueError,
        r"levels\[1\] has shape \[2, 3, 3\], expected \[N, T, C\] with N = 2",
    ),
    "alpha of another length": (
        lambda: merge_levels([X, X], torch.ones(3), W),
        ValueError,
        r"alpha has shape \[3\], expected \[L\] with L = 2",
    ),
    "weight of other channels": (
        lambda: merge_levels([X], torch.ones(1), torch.zeros(5, 4)),
        ValueError,
        r"weight has shape \[5, 4\], expected \[H, C\] or \[L, H, C\] with .*C = 3 \(from levels\[0\]\)",
    ),
    "integer levels": (lambda: merge_levels([X.int()], torch.ones(1), W), TypeError, "floating-point"),
    "not a tensor": (
        lambda: merge_levels([X], 1.0, W),
        TypeError,
        "alpha is a float, expected a torch.Tensor",
    ),
    "unknown backend": (
        lambda: merge_levels([X], torch.ones(1), W, backend="fast"),
        ValueError,
        "backend='fast' is unknown",
    ),
    "no GPU": (
        lambda: merge_levels([X], torch.ones(1), W, backend="triton"),
        RuntimeError,
        "the Triton kernels run on CUDA tensors",
    ),
    "other device": (
        lambda: merge_levels([X], torch.ones(1, device="meta"), W),
        ValueError,
        r"alpha is on meta but levels\[0\] is on cpu",
    ),
    "grid of other size": (
        lambda: fuse_grids([X], [(2, 3)], (2, 2)),
        ValueError,
        r"features\[0\] has 4 tokens, but its grid \(2, 3\) has 6; drop CLS",
    ),
    "too few grids": (lambda: fuse_grids([X, X], [(2, 2)], (2, 2)), ValueError, "2 features but 1 grids"),
    "empty target": (lambda: fuse_grids([X], [(2, 2)], (0, 2)), ValueError, r"target is \(0, 2\)"),
    "unknown mode": (
        lambda: fuse_grids([X], [(2, 2)], (2, 2), mode="cubic"),
        ValueError,
        "mode='cubic' is unknown",
    ),
    "corners of nearest": (
        lambda: fuse_grids([X], [(2, 2)], (2, 2), mode="nearest", align_corners=True),
        ValueError,
        'align_corners=True needs mode="bilinear"',
    ),
    "bias alone": (
        lambda: fuse_grids([X], [(2, 2)], (2, 2), bias=torch.ones(5)),
        ValueError,
        "bias was given without",
    ),
    "weight of one encoder": (
        lambda: fuse_grids([X, X], [(2, 2)] * 2, (2, 2), W),
        ValueError,
        r"weight has shape \[5, 3\], expected \[H, C\] with C = 6",
    ),
    "patches that leave a rest": (
        lambda: patches_to_token([X], [torch.zeros(5, 9)], [3]),
        ValueError,
        r"patches\[0\] is 3, which does not divide the 4 tokens",
    ),
    "too few weights": (
        lambda: patches_to_token([X, X], [W], [1, 1]),
        ValueError,
        "2 features but 1 weights",
    ),
    "weight of one patch": (
        lambda: patches_to_token([X], [W], [2]),
        ValueError,
        r"weights\[0\] has shape \[5, 3\], expected \[H, C\] with C = 6",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    call: Callable[[], Tensor]
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()

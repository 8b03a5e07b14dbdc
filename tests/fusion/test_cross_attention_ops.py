"""Cross-attention to image maps against its formulas: values, gradients, odd shapes and bad input."""

from collections.abc import Callable

import pytest
import torch
from tolerance import assert_close, assert_conforms
from torch import Tensor, nn
from torch.autograd import gradcheck

from pyvlm.ops.cross_attention import local_cross_attention, resample, resize_positions, sincos_positions

DTYPES = (torch.float32, torch.bfloat16)


def randn(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


# ---- local_cross_attention


def local_arguments(
    grid: tuple[int, int], sides: list[int], dtype: torch.dtype, heads: int = 2, dim: int = 3
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    queries = grid[0] * grid[1]
    sizes = [queries * side**2 for side in sides]
    masks = [torch.rand(2, size) < 0.6 for size in sizes]
    return (
        randn(2, heads, queries, dim, dtype=dtype),
        [randn(2, heads, size, dim, dtype=dtype) for size in sizes],
        [randn(2, heads, size, dim, dtype=dtype) for size in sizes],
        masks,
    )


def plain_local_attention(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    grid: tuple[int, int],
    sides: list[int],
    masks: list[Tensor],
) -> Tensor:
    """Query by query, with the keys of its window found by their coordinates."""
    out = torch.zeros_like(query)
    for n in range(query.shape[0]):
        for a in range(query.shape[1]):
            for row in range(grid[0]):
                for column in range(grid[1]):
                    k, v = [], []
                    for key, value, mask, side in zip(keys, values, masks, sides, strict=True):
                        for y in range(row * side, (row + 1) * side):
                            for x in range(column * side, (column + 1) * side):
                                token = y * grid[1] * side + x
                                if mask[n, token]:
                                    k.append(key[n, a, token])
                                    v.append(value[n, a, token])
                    if k:
                        q = query[n, a, row * grid[1] + column]
                        weights = (torch.stack(k) @ q / q.shape[0] ** 0.5).softmax(0)
                        out[n, a, row * grid[1] + column] = weights @ torch.stack(v)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "sides"),
    [
        pytest.param((2, 3), [1, 2, 3], id="three encoders, a grid that is not square"),
        pytest.param((1, 1), [3], id="one query"),
        pytest.param((3, 1), [1], id="one key: many a window is empty"),
    ],
)
def test_local_cross_attention_is_attention_in_windows(
    grid: tuple[int, int], sides: list[int], dtype: torch.dtype
) -> None:
    query, keys, values, masks = local_arguments(grid, sides, dtype)
    expected = plain_local_attention(
        query.double(), [k.double() for k in keys], [v.double() for v in values], grid, sides, masks
    )
    plain = plain_local_attention(query, keys, values, grid, sides, masks)
    assert_close(local_cross_attention(query, keys, values, grid, masks), expected, plain)


def test_local_cross_attention_without_masks_sees_all() -> None:
    query, keys, values, masks = local_arguments((2, 2), [1, 2], torch.float64)
    everything = [torch.ones_like(mask) for mask in masks]
    assert_conforms(
        local_cross_attention(query, keys, values, (2, 2)),
        local_cross_attention(query, keys, values, (2, 2), everything),
    )


def test_a_query_that_sees_nothing_gets_zero_and_no_gradient() -> None:
    query, keys, values, masks = local_arguments((1, 2), [1, 2], torch.float64)
    leaves = [x.requires_grad_() for x in (query, *keys, *values)]
    masks[0][:, 0], masks[0][:, 1] = False, True
    masks[1] = torch.tensor([[False, False, True, True] * 2] * 2)  # the window of query 0 is columns 0 and 1
    out = local_cross_attention(query, keys, values, (1, 2), masks)
    out.sum().backward()
    assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
    assert torch.equal(query.grad[:, :, 0], torch.zeros_like(query.grad[:, :, 0]))
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert query.grad[:, :, 1].abs().min() > 0


def test_local_cross_attention_gradients() -> None:
    query, keys, values, masks = local_arguments((1, 2), [1, 2], torch.float64, heads=1, dim=2)
    leaves = [x.requires_grad_() for x in (query, *keys, *values)]

    def attend(q: Tensor, k0: Tensor, k1: Tensor, v0: Tensor, v1: Tensor) -> Tensor:
        return local_cross_attention(q, [k0, k1], [v0, v1], (1, 2), masks, scale=0.7)

    assert gradcheck(attend, leaves)


# ---- resample


def resample_arguments(images: int, tokens: int, queries: int, dim: int, grad: bool = False) -> list[Tensor]:
    shapes = [
        (images, tokens, dim),
        (queries, dim),
        (queries, dim),
        (tokens, dim),
        (3 * dim, dim),
        (dim, dim),
    ]
    return [randn(*shape, grad=grad) for shape in [*shapes, (3 * dim,), (dim,)]]


@pytest.mark.parametrize(("images", "tokens", "queries"), [(2, 7, 3), (1, 1, 1), (0, 4, 2), (3, 2, 5)])
def test_resample_is_multihead_attention(images: int, tokens: int, queries: int) -> None:
    x, query, query_position, key_position, w_in, w_out, b_in, b_out = resample_arguments(
        images, tokens, queries, 8
    )
    attention = nn.MultiheadAttention(8, 4, batch_first=True, dtype=torch.float64)
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    attention.load_state_dict(dict(zip(names, (w_in, b_in, w_out, b_out), strict=True)))
    expected, _ = attention((query + query_position).expand(images, -1, -1), x + key_position, x)
    actual = resample(x, query, query_position, key_position, w_in, w_out, 4, b_in, b_out)
    assert_conforms(actual, expected.detach())


def test_resample_gradients() -> None:
    leaves = resample_arguments(1, 3, 2, 4, grad=True)
    assert gradcheck(lambda x, q, pq, pk, w, o, b, c: resample(x, q, pq, pk, w, o, 2, b, c), leaves)


def test_resize_positions_keeps_a_table_on_its_grid_and_the_axes_apart() -> None:
    table = sincos_positions((3, 4), 8)
    assert resize_positions(table, (3, 4), (3, 4)) is table
    by_column = torch.arange(8.0).repeat(4, 1).flatten()[:, None]  # 4 × 8, the value is the column
    resized = resize_positions(by_column, (4, 8), (5, 16)).view(5, 16)
    assert_conforms(resized, resized[:1].expand(5, 16), "every row")
    assert (resized[0].diff() > 0).all()
    assert_conforms(resized.mean(), by_column.mean(), "mean of a symmetric ramp")


# ---- bad input

X = torch.zeros(2, 4, 3)
Q = torch.zeros(2, 1, 4, 3)
TABLE = torch.zeros(4, 3)
BAD = {
    "map that is no multiple": (
        lambda: local_cross_attention(Q, [torch.zeros(2, 1, 12, 3)], [torch.zeros(2, 1, 12, 3)], (2, 2)),
        ValueError,
        r"keys\[0\] has 12 tokens, which is not 4 queries times a square",
    ),
    "other query grid": (
        lambda: local_cross_attention(Q, [Q], [Q], (2, 3)),
        ValueError,
        r"query has 4 queries, but query_grid \(2, 3\) has 6",
    ),
    "float mask": (
        lambda: local_cross_attention(Q, [Q], [Q], (2, 2), [torch.zeros(2, 4)]),
        TypeError,
        r"masks\[0\] is torch.float32, expected torch.bool",
    ),
    "heads that do not divide": (
        lambda: resample(X, TABLE, TABLE, TABLE, torch.zeros(9, 3), torch.zeros(3, 3), 2),
        ValueError,
        "num_heads is 2, which does not divide the embedding of 3",
    ),
    "keys without position": (
        lambda: resample(X, TABLE, TABLE, TABLE[:3], torch.zeros(9, 3), torch.zeros(3, 3), 1),
        ValueError,
        r"key_position has shape \[3, 3\], expected \[T, E\] with T = 4",
    ),
    "odd width of positions": (lambda: sincos_positions((2, 2), 6), ValueError, "embed_dim is 6"),
    "table of another grid": (
        lambda: resize_positions(TABLE, (3, 3), (4, 4)),
        ValueError,
        r"table has 4 rows, but grid \(3, 3\) has 9",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    call: Callable[[], Tensor]
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()

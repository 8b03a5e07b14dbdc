"""Fusion of several encoders, levels and grids into one token sequence: the public functions.

Shapes: N images · T tokens of a map, row-major, without CLS · C channels of a map · H output features ·
Q queries · E embedding · A attention heads · D head features. A grid is (rows, columns).
Every function raises TypeError for a wrong dtype and ValueError for a wrong shape, device or option, naming
the argument. `backend` is "auto" or a name in `pyvlm.ops._backends`.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvlm.ops._backends import resolve
from pyvlm.ops._checks import Shapes
from pyvlm.reference import fusion as reference

RESIZE_MODES = ("bilinear", "nearest", "area")


def merge_levels(
    levels: Sequence[Tensor] | Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Merges levels (layers) of one encoder: Σ_l α_l (W_l · LN_l(v_l) + b_l).

    Source: "From CLIP to DINO: Visual Encoders Shout in Multi-modal Large Language Models" (COMM, arXiv
    2310.08825).

    Args:
        levels: L maps [N, T, C], as a sequence or stacked [L, N, T, C].
        alpha: [L], the weight of each level as it is used (a softmax over them is the caller's).
        weight, bias: [H, C] and [H], shared by all levels, or [L, H, C] and [L, H]; no bias where None.
        ln_weight, ln_bias: LayerNorm's γ and β, [C] or [L, C]; 1 and 0 where None.
        eps: LayerNorm's ε.

    Returns:
        [N, T, H] in the dtype of the levels.
    """
    levels = _as_list("merge_levels", "levels", levels)
    shapes = Shapes("merge_levels")
    for i, level in enumerate(levels):
        shapes.check(f"levels[{i}]", level, "NTC")
    shapes.sizes["L"] = len(levels)
    shapes.check("alpha", alpha, "L").check("weight", weight, "HC", "LHC").check("bias", bias, "H", "LH")
    shapes.check("ln_weight", ln_weight, "C", "LC").check("ln_bias", ln_bias, "C", "LC")
    resolve("merge_levels", backend, alpha.device)
    return reference.merge_levels(levels, alpha, weight, bias, ln_weight, ln_bias, eps)


def fuse_grids(
    features: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    target: tuple[int, int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Brings maps of several encoders to one grid, concatenates their channels in order, and projects them.

    The form of Eagle (arXiv 2408.15998; bilinear with `align_corners=True`), Prismatic (2402.07865),
    DeepSeek-VL (2403.05525) and ViP-LLaVA (2312.00784). A map that is on the target grid already passes
    untouched. No antialiasing.

    Args:
        features: one map [N, h_i·w_i, C_i] an encoder.
        grids: (h_i, w_i) of each map.
        target: (h, w) of the result.
        weight, bias: [H, ΣC_i] and [H]; without a weight the concatenation itself is returned.
        mode: "bilinear", "nearest" or "area".
        align_corners: for "bilinear" only, as in `torch.nn.functional.interpolate`.

    Returns:
        [N, h·w, H], or [N, h·w, ΣC_i] without a weight.
    """
    features = _as_list("fuse_grids", "features", features)
    if len(grids) != len(features):
        raise ValueError(f"fuse_grids: {len(features)} features but {len(grids)} grids; give one grid a map")
    if mode not in RESIZE_MODES:
        raise ValueError(
            f"fuse_grids: mode={mode!r} is unknown; expected one of {', '.join(map(repr, RESIZE_MODES))}"
        )
    if align_corners and mode != "bilinear":
        raise ValueError(f'fuse_grids: align_corners=True needs mode="bilinear", not {mode!r}')
    if bias is not None and weight is None:
        raise ValueError("fuse_grids: a bias was given without a weight; give both or neither")
    grids = [_grid("fuse_grids", f"grids[{i}]", grid) for i, grid in enumerate(grids)]
    target = _grid("fuse_grids", "target", target)
    shapes = Shapes("fuse_grids")
    channels = 0
    for i, (feature, grid) in enumerate(zip(features, grids, strict=True)):
        shapes.check(f"features[{i}]", feature, "NTC")
        if feature.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"fuse_grids: features[{i}] has {feature.shape[1]} tokens, but its grid {grid} has "
                f"{grid[0] * grid[1]}; drop CLS and register tokens, or name the right grid"
            )
        channels += feature.shape[2]
        shapes.forget("T", "C")
    shapes.sizes["C"] = channels
    shapes.check("weight", weight, "HC").check("bias", bias, "H")
    resolve("fuse_grids", backend, features[0].device)
    return reference.fuse_grids(features, grids, target, weight, bias, mode, align_corners)


def patches_to_token(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    patches: Sequence[int],
    biases: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Projects m consecutive patches of each expert to one token; the experts' tokens follow one another.

    Source: "MouSi: Poly-Visual-Expert Vision-Language Models" (arXiv 2401.17221), MLP projection fusion. The
    order of the experts is the order of `features`.

    Args:
        features: one map [N, T_i, C_i] an expert.
        weights: [H, m_i·C_i] an expert; columns are patch by patch.
        patches: m_i of each expert; it divides T_i.
        biases: [H] or None an expert; none at all where None.

    Returns:
        [N, ΣT_i/m_i, H].
    """
    op = "patches_to_token"
    features = _as_list(op, "features", features)
    for name, given in (("weights", weights), ("patches", patches), ("biases", biases)):
        if given is not None and len(given) != len(features):
            raise ValueError(
                f"{op}: {len(features)} features but {len(given)} {name}, expected one an expert"
            )
    shapes = Shapes(op)
    for i, (feature, weight, m) in enumerate(zip(features, weights, patches, strict=True)):
        shapes.check(f"features[{i}]", feature, "NTC")
        if m < 1 or feature.shape[1] % m:
            raise ValueError(
                f"{op}: patches[{i}] is {m}, which does not divide the {feature.shape[1]} tokens of "
                f"features[{i}]"
            )
        shapes.forget("T", "C")
        shapes.sizes["C"] = m * feature.shape[2]
        shapes.check(f"weights[{i}]", weight, "HC").forget("C")
        shapes.check(f"biases[{i}]", None if biases is None else biases[i], "H")
    resolve(op, backend, features[0].device)
    return reference.patches_to_token(features, weights, patches, biases)


def local_cross_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    query_grid: tuple[int, int],
    masks: Sequence[Tensor] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Each query of a grid attends to its window of every encoder's map, with one softmax over all of them.

    Source: "Cambrian-1" (arXiv 2406.16860), spatial vision aggregator. A map that is r_i times as fine as the
    query grid on each side gives a query a window of r_i × r_i keys. The maps are read where they lie:
    nothing is rearranged by the caller.

    Args:
        query: [N, A, Q, D], Q = rows·columns of `query_grid`, row-major.
        keys, values: one [N, A, T_i, D] an encoder, T_i = Q·r_i², row-major over the map of rows·r_i ×
            columns·r_i.
        query_grid: (rows, columns).
        masks: one bool [N, T_i] an encoder, True where visible; all visible where None. A query that sees
            nothing gets 0.
        scale: of the scores; 1/√D where None.

    Returns:
        [N, A, Q, D].
    """
    op = "local_cross_attention"
    keys, values = _as_list(op, "keys", keys), _as_list(op, "values", values)
    for name, given in (("values", values), ("masks", masks)):
        if given is not None and len(given) != len(keys):
            raise ValueError(f"{op}: {len(keys)} keys but {len(given)} {name}; give one an encoder")
    query_grid = _grid(op, "query_grid", query_grid)
    num_queries = query_grid[0] * query_grid[1]
    shapes = Shapes(op).check("query", query, "NAQD")
    if query.shape[2] != num_queries:
        raise ValueError(
            f"{op}: query has {query.shape[2]} queries, but query_grid {query_grid} has {num_queries}"
        )
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        shapes.check(f"keys[{i}]", key, "NATD").check(f"values[{i}]", value, "NATD")
        tokens = key.shape[2]
        if tokens == 0 or tokens != num_queries * math.isqrt(tokens // num_queries) ** 2:
            raise ValueError(
                f"{op}: keys[{i}] has {tokens} tokens, which is not {num_queries} queries times a square "
                "window; resize the map to a whole multiple of the query grid"
            )
        if masks is not None:
            shapes.check(f"masks[{i}]", masks[i], "NT", dtypes=(torch.bool,))
        shapes.forget("T")
    resolve(op, backend, query.device)
    return reference.local_cross_attention(query, keys, values, query_grid, masks, scale)


def resample(
    features: Tensor,
    query: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    in_proj_weight: Tensor,
    out_proj_weight: Tensor,
    num_heads: int,
    in_proj_bias: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One cross-attention of learned queries to a map, with positions on queries and keys but not on values.

    Source: "Qwen-VL" (arXiv 2308.12966), the position-aware adapter. `features` and `query` come normalised;
    the query projection and the key position's share of the key projection are the same for every image.

    Args:
        features: [N, T, E].
        query: [Q, E]; query_position: [Q, E]; key_position: [T, E].
        in_proj_weight, in_proj_bias: [3E, E] and [3E], rows ordered query, key, value (as
            `nn.MultiheadAttention`).
        out_proj_weight, out_proj_bias: [E, E] and [E].
        num_heads: divides E.

    Returns:
        [N, Q, E].
    """
    shapes = Shapes("resample").check("features", features, "NTE").check("query", query, "QE")
    shapes.check("query_position", query_position, "QE").check("key_position", key_position, "TE")
    embed_dim = features.shape[2]
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            f"resample: num_heads is {num_heads}, which does not divide the embedding of {embed_dim}"
        )
    shapes.sizes["3E"] = 3 * embed_dim
    shapes.check("in_proj_weight", in_proj_weight, ("3E", "E")).check("in_proj_bias", in_proj_bias, ("3E",))
    shapes.check("out_proj_weight", out_proj_weight, ("E", "E")).check("out_proj_bias", out_proj_bias, "E")
    resolve("resample", backend, features.device)
    return reference.resample(
        features,
        query,
        query_position,
        key_position,
        in_proj_weight,
        out_proj_weight,
        num_heads,
        in_proj_bias,
        out_proj_bias,
    )


def sincos_positions(grid: tuple[int, int], embed_dim: int) -> Tensor:
    """The fixed 2-D sine-cosine table of a grid, float32 [rows·columns, E], row-major.

    The first half of the channels encodes the column, the second the row; each half is sines and then cosines
    of position · 10000^(−i/(E/4)). `embed_dim` must be a multiple of 4. Source: MAE (arXiv 2111.06377), used
    by Qwen-VL.
    """
    if embed_dim < 4 or embed_dim % 4:
        raise ValueError(f"sincos_positions: embed_dim is {embed_dim}, expected a positive multiple of 4")
    rows, columns = _grid("sincos_positions", "grid", grid)
    frequency = 10000.0 ** (-torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))

    def encode(position: Tensor) -> Tensor:
        angle = position.flatten()[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    return torch.cat([encode(x), encode(y)], dim=1).float()


def resize_positions(table: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A position table [rows·columns, E] of `grid` resampled to `target`, as Qwen-VL does.

    Bicubic, without antialiasing. It is resampled when it is enlarged too, and passes untouched where the
    grids agree. Computed in float32 (float64 for a float64 table) and returned in the table's dtype.
    """
    grid, target = _grid("resize_positions", "grid", grid), _grid("resize_positions", "target", target)
    Shapes("resize_positions").check("table", table, "TE")
    if table.shape[0] != grid[0] * grid[1]:
        raise ValueError(
            f"resize_positions: table has {table.shape[0]} rows, but grid {grid} has {grid[0] * grid[1]}"
        )
    if grid == target:
        return table
    maps = table.to(reference.accumulator(table.dtype)).T.unflatten(1, grid)[None]
    return (
        F.interpolate(maps, size=target, mode="bicubic", align_corners=False)[0].flatten(1).T.to(table.dtype)
    )


def _as_list(op: str, name: str, tensors: Sequence[Tensor] | Tensor) -> list[Tensor]:
    tensors = list(tensors)
    if not tensors:
        raise ValueError(f"{op}: {name} is empty; give at least one map")
    return tensors


def _grid(op: str, name: str, grid: tuple[int, int]) -> tuple[int, int]:
    if len(grid) != 2 or grid[0] < 1 or grid[1] < 1:
        raise ValueError(f"{op}: {name} is {grid}, expected (rows, columns), both at least 1")
    return (int(grid[0]), int(grid[1]))

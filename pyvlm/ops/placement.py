"""Image rows into the token sequence: the public functions. `pyvlm.ops.tiling` makes their index maps.

Shapes: B samples · L tokens · H features of a token · R image feature rows · C features of such a row ·
S placeholders, counted row-major over [B, L].
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyvlm import _native
from pyvlm.ops._backends import refuse_second_derivative, resolve, triton_function
from pyvlm.ops._checks import Shapes
from pyvlm.reference import placement as reference

NEWLINE = -1
_INDEX_DTYPES = (torch.int32, torch.int64)


def pack_image_tokens(
    features: Tensor, index: Tensor, newline: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Gathers image rows by an index map: unpadding, newlines and pixel shuffle are all this one gather.

    Args:
        features: [R, C], the rows of all maps, one after another.
        index: int32 or int64 [S]; row s of the result is `features[index[s]]`, or `newline` where index[s] is
            `NEWLINE` (−1). With [S, k], k rows are laid side by side.
        newline: [C], learned; needed where the index asks for it.

    Returns:
        [S, C], or [S, k·C].

    Raises:
        ValueError: a shape, or an index outside the rows (off the CPU, and under torch.compile, the index is
            checked on the device without a sync).
    """
    op = "pack_image_tokens"
    shapes = Shapes(op).check("features", features, "RC").check("newline", newline, "C")
    shapes.check("index", index, "S", "SK", dtypes=_INDEX_DTYPES)
    _check_index(op, index, features.shape[0], newline)
    implementation = resolve(op, backend, features.device)
    if implementation == "reference":
        return reference.pack_image_tokens(features, index, newline)
    newline = None if newline is None else newline.to(features.dtype)
    return _run(op, implementation, features, index, newline)


def place_image_tokens(
    text_embeds: Tensor,
    image_features: Tensor,
    image_mask: Tensor,
    index: Tensor | None = None,
    newline: Tensor | None = None,
    features_per_sample: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Merges image features into the text embeddings: the s-th placeholder takes the s-th image row.

    With an `index` the rows are packed on the way (see `pack_image_tokens`), so that unpadding, newlines and
    the merge are one gather from text, feature and newline rows.

    Args:
        text_embeds: [B, L, H].
        image_features: [R, C]; C = H (H/k with an index [S, k]).
        image_mask: bool [B, L], True at the placeholders.
        index, newline: as in `pack_image_tokens`; without an index row s is feature row s, so R = S.
        features_per_sample: image rows (entries of `index` where there is one) of each sample, B integers;
            with them a mismatch is found by sample, also where the totals happen to agree.

    Returns:
        [B, L, H], a new tensor.

    Raises:
        ValueError: placeholders and image rows differ in number; it names the sample, its placeholders and
            its features. Off the CPU, and under torch.compile, the counts are checked on the device without a
            sync.
    """
    op = "place_image_tokens"
    shapes = Shapes(op).check("text_embeds", text_embeds, "BLH")
    shapes.check("image_mask", image_mask, "BL", dtypes=(torch.bool,))
    shapes.check("image_features", image_features, "RC")
    shapes.check("newline", newline, "C").check("index", index, "S", "SK", dtypes=_INDEX_DTYPES)
    parts = index.shape[1] if index is not None and index.dim() == 2 else 1
    if image_features.shape[1] * parts != text_embeds.shape[2]:
        raise ValueError(
            f"{op}: image_features has {image_features.shape[1]} features a row"
            + (f", {parts} rows a token" if parts > 1 else "")
            + f", but text_embeds has {text_embeds.shape[2]}; project the features to the text width first"
        )
    if index is not None:
        _check_index(op, index, image_features.shape[0], newline)
    elif newline is not None:
        raise ValueError(f"{op}: a newline was given without an index that says where it goes")
    num_rows = image_features.shape[0] if index is None else index.shape[0]
    _check_counts(op, image_mask, num_rows, features_per_sample)
    implementation = resolve(op, backend, text_embeds.device)
    if implementation == "reference":
        return reference.place_image_tokens(text_embeds, image_features, image_mask, index, newline)
    if newline is not None:
        newline = newline.to(image_features.dtype).to(text_embeds.dtype)
    image_features = image_features.to(text_embeds.dtype)
    return _run(op, implementation, text_embeds, image_features, image_mask, index, newline)


def add_at_image_tokens(
    hidden_states: Tensor,
    updates: Tensor,
    image_mask: Tensor,
    features_per_sample: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Adds the s-th update to the s-th image token; the other tokens pass unchanged.

    Sources: DeepStack (arXiv 2406.04334), injection of visual features into decoder layers;
    InternLM-XComposer2 (arXiv 2401.16420), image-only update of Partial LoRA.

    Args:
        hidden_states: [B, L, H].
        updates: [S, H].
        image_mask: bool [B, L], True at the image tokens.
        features_per_sample: as in `place_image_tokens`.

    Returns:
        [B, L, H], a new tensor.

    Raises:
        ValueError: image tokens and updates differ in number; as in `place_image_tokens`.
    """
    op = "add_at_image_tokens"
    shapes = Shapes(op).check("hidden_states", hidden_states, "BLH").check("updates", updates, "SH")
    shapes.check("image_mask", image_mask, "BL", dtypes=(torch.bool,))
    _check_counts(op, image_mask, updates.shape[0], features_per_sample)
    implementation = resolve(op, backend, hidden_states.device)
    if implementation == "reference":
        return reference.add_at_image_tokens(hidden_states, updates, image_mask)
    return _run(op, implementation, hidden_states, updates.to(hidden_states.dtype), image_mask)


def _on_device_only(tensor: Tensor) -> bool:
    return not tensor.is_cpu or torch.compiler.is_compiling()


def _check_index(op: str, index: Tensor, num_rows: int, newline: Tensor | None) -> None:
    if index.numel() == 0:
        return
    least = 0 if newline is None else NEWLINE
    if _on_device_only(index):
        torch._assert_async(
            ((index >= least) & (index < num_rows)).all(), f"{op}: index outside the feature rows"
        )
        return
    lowest, highest = (int(bound) for bound in index.aminmax())
    if lowest < least or highest >= num_rows:
        raise ValueError(
            f"{op}: index runs from {lowest} to {highest}; there are {num_rows} feature rows, and "
            + ("no newline was given" if newline is None else f"only {NEWLINE} stands for the newline")
        )


def _check_counts(op: str, image_mask: Tensor, num_rows: int, per_sample: Sequence[int] | None) -> None:
    batch_size = image_mask.shape[0]
    if per_sample is not None and (len(per_sample) != batch_size or sum(per_sample) != num_rows):
        raise ValueError(
            f"{op}: features_per_sample has {len(per_sample)} numbers that add up to {sum(per_sample)}, "
            f"expected {batch_size} (one a sample) that add up to the {num_rows} image rows given"
        )
    if _on_device_only(image_mask):
        message = f"{op}: the number of image placeholders differs from the number of image features"
        torch._assert_async(image_mask.sum() == num_rows, message)
        if per_sample is not None:
            # Made on the device: a CUDA graph that is being captured takes no copy from the host.
            expected = [torch.full((1,), count, device=image_mask.device) for count in per_sample]
            torch._assert_async((image_mask.sum(1) == torch.cat(expected)).all(), message)
        return
    placeholders = image_mask.sum(1).tolist()
    features = _deal_out(num_rows, placeholders) if per_sample is None else per_sample
    for sample, (wanted, given) in enumerate(zip(placeholders, features, strict=True)):
        if wanted != given:
            raise ValueError(
                f"{op}: sample {sample} has {wanted} image placeholders, but {given} image features "
                f"({sum(placeholders)} and {num_rows} in the batch); make the prompts and the images agree"
            )


def _deal_out(num_rows: int, placeholders: list[int]) -> list[int]:
    """Rows to samples in order, as many as each asks for while they last; the last takes the rest."""
    dealt = []
    for wanted in placeholders[:-1]:
        dealt.append(min(wanted, num_rows))
        num_rows -= dealt[-1]
    return [*dealt, num_rows] if placeholders else []


# ---- torch ops


def _fake_pack(features: Tensor, index: Tensor, newline: Tensor | None) -> Tensor:
    parts = index.shape[1] if index.dim() == 2 else 1
    return features.new_empty((index.shape[0], parts * features.shape[1]))


def _fake_place(text: Tensor, *inputs: Tensor | None) -> Tensor:
    return torch.empty_like(text, memory_format=torch.contiguous_format)


def _empty_gradients(
    grad: Tensor, shapes: Sequence[Sequence[int]], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return tuple(
        grad.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True)
    )


def _fake_pack_backward(
    grad: Tensor, index: Tensor, num_features: int, feature_width: int, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return _empty_gradients(grad, ((num_features, feature_width), (feature_width,)), needs)


def _fake_place_backward(
    grad: Tensor,
    image_mask: Tensor,
    index: Tensor | None,
    num_features: int,
    feature_width: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    return _empty_gradients(grad, (grad.shape, (num_features, feature_width), (feature_width,)), needs)


def _fake_add_backward(grad: Tensor, image_mask: Tensor, num_updates: int) -> Tensor:
    return grad.new_empty((num_updates, grad.shape[2]))


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, index, _ = inputs
    ctx.sizes = tuple(features.shape)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index)


def _setup_place(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, features, image_mask, index, _ = inputs
    ctx.sizes = tuple(features.shape)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image_mask, index)


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, updates, image_mask = inputs
    ctx.sizes = tuple(updates.shape)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image_mask)


Backward = Callable[..., Any]


def _pack_gradients(op: Backward, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    (index,) = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    features, newline = op(grad, index, *ctx.sizes, needs)
    return features if needs[0] else None, None, newline if needs[1] else None


def _place_gradients(op: Backward, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    found = op(grad, *ctx.saved_tensors, *ctx.sizes, needs)
    text, features, newline = (g if needed else None for g, needed in zip(found, needs, strict=True))
    return text, features, None, None, newline


def _add_gradients(op: Backward, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None or not ctx.needs_input_grad[1]:
        return grad, None, None
    return grad, op(grad, *ctx.saved_tensors, ctx.sizes[0]), None


# op -> its fake, its backward's fake, setup_context and gradients
_OPS: dict[str, tuple[Callable[..., Any], ...]] = {
    "pack_image_tokens": (_fake_pack, _fake_pack_backward, _setup_pack, _pack_gradients),
    "place_image_tokens": (_fake_place, _fake_place_backward, _setup_place, _place_gradients),
    "add_at_image_tokens": (_fake_place, _fake_add_backward, _setup_add, _add_gradients),
}


def _interpreted(op: str) -> type[torch.autograd.Function]:
    """The Triton kernels on CPU tensors, in Triton's interpreter: torch's CPU kernels are the native ones."""
    _, _, setup_context, gradients = _OPS[op]

    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients(triton_function("placement", f"{op}_backward"), ctx, grad)

    functions = {
        "forward": triton_function("placement", op),
        "setup_context": setup_context,
        "backward": backward,
    }
    return type(op, (torch.autograd.Function,), {name: staticmethod(f) for name, f in functions.items()})


_INTERPRETED = {op: _interpreted(op) for op in _OPS}


def _run(op: str, implementation: str, first: Tensor, *others: Tensor | None) -> Tensor:
    interpreted = implementation == "triton" and first.device.type == "cpu"
    run = _INTERPRETED[op].apply if interpreted else getattr(torch.ops.pyvlm, op)
    return run(first, *others)


def _register(op: str) -> None:
    fake, fake_backward, setup_context, gradients = _OPS[op]

    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients(getattr(torch.ops.pyvlm, f"{op}_backward"), ctx, grad)

    torch.library.impl(f"pyvlm::{op}", "CUDA", triton_function("placement", op))
    torch.library.impl(f"pyvlm::{op}_backward", "CUDA", triton_function("placement", f"{op}_backward"))
    torch.library.register_fake(f"pyvlm::{op}", fake)
    torch.library.register_fake(f"pyvlm::{op}_backward", fake_backward)
    torch.library.register_autograd(f"pyvlm::{op}", backward, setup_context=setup_context)
    refuse_second_derivative(op)


if _native.C is not None:  # it defines the schemas
    for _op in _OPS:
        _register(_op)

"""Masks of transformers as spans: what its mask interface builds here in place of a dense mask.

transformers describes a mask by a function of (batch, head, query, key) and lets each implementation build
what it needs of it. Here that is a few integers a query: at most two key ranges, the second over keys of one
class, which covers causal masks, windows, chunks, packed sequences, bidirectional images (Gemma 3, PaliGemma)
and images that all see each other (Molmo 2). They travel through the model in one 4-D int32 tensor, since
every function of transformers hands a 4-D mask on untouched.

Shapes: B batch, Q queries, K keys, R ranges a query (1 or 2).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from pyvlm import _native
from pyvlm.spans import EVERY_CLASS, IMAGE, PADDING, TEXT, AttentionSpans

# Dense rows are looked at in pieces of 2 MB of bool: as fast as all of 2,436 x 2,436 at once, and the peak is
# 6 MB in place of 17; with 512 KB it takes up to 1.1 times as long. On an accelerator each piece is some
# thirty launches, whatever its size: 32 MB, where 8,192 x 8,192 are two of them (not yet measured on a GPU).
PIECE, ACCELERATORS_PIECE = 1 << 21, 1 << 25
JOINT = {1: (EVERY_CLASS,), 2: (EVERY_CLASS, 1 << IMAGE)}


def spans_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """The mask of transformers' mask interface, packed as `pack_spans` does it; arguments as `sdpa_mask`'s.

    Raises:
        ValueError: the mask is no two key ranges a query, the second over one class of keys (on an
            accelerator and in a compiled graph, a device-side assertion instead).
    """
    device = torch.device(device)
    past: Any = q_offset  # an int, or a tensor where a static cache counts on its device
    real = _real_keys(batch_size, kv_length, kv_offset, attention_mask, device)
    if mask_function is causal_mask_function:
        end = torch.arange(1, q_length + 1, device=device) + (past - kv_offset)
        end = end.clamp(0, kv_length).to(torch.int32).expand(batch_size, -1)
        bounds = torch.stack([torch.zeros_like(end), end], -1).unsqueeze(2)
        return _carrier(bounds, real)

    def rows(start: int, stop: int) -> Tensor:
        mask = sdpa_mask(
            batch_size,
            stop - start,
            kv_length,
            past + start,
            kv_offset,
            mask_function,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert mask is not None  # it may be None only where a skip is allowed
        return mask[:, 0]

    return _carrier(*_find_ranges(rows, q_length, real))


def dense_spans(mask: Tensor) -> AttentionSpans:
    """The spans of a dense mask: bool [B, 1, Q, K], True where seen, or additive, 0 where seen.

    Raises:
        ValueError: the mask differs between heads, adds anything else than 0 and very negative numbers, or is
            no two key ranges a query.
    """
    if mask.shape[1] != 1:
        raise ValueError(
            f"the attention mask is {list(mask.shape)}, with {mask.shape[1]} masks for the heads; pyvlm "
            'takes one for all heads: load this model with attn_implementation="sdpa"'
        )
    seen = mask[:, 0]
    if seen.dtype != torch.bool:
        if not seen.is_floating_point():
            raise ValueError(
                f"the attention mask is of {mask.dtype}; expected bool, or floating with 0 and -inf"
            )
        zero = seen == 0
        if not torch.compiler.is_compiling() and not (zero | (seen < -1e4)).all():
            raise ValueError(
                "the attention mask adds a bias to the scores; pyvlm has masks only (0 or very negative): "
                'load this model with attn_implementation="sdpa"'
            )
        seen = zero
    batch, queries, keys = seen.shape
    real = torch.full((batch, keys), TEXT, dtype=torch.uint8, device=seen.device)
    bounds, classes = _find_ranges(lambda start, stop: seen[:, start:stop], queries, real)
    return AttentionSpans(bounds, classes, JOINT[bounds.shape[2]], separate=False)


def pack_spans(bounds: Tensor, key_class: Tensor) -> Tensor:
    """bounds int32 [B, Q, R, 2] and key_class uint8 [B, K] in one int32 tensor [B, R, Q + ⌈K/2⌉, 2]."""
    batch, _, ranges, _ = bounds.shape
    keys = key_class.shape[1]
    classes = torch.nn.functional.pad(key_class.to(torch.int32), (0, keys % 2))
    classes = classes.view(batch, 1, -1, 2).expand(-1, ranges, -1, -1)
    return torch.cat([bounds.movedim(2, 1), classes], dim=2)


def _carrier(bounds: Tensor, key_class: Tensor) -> Tensor:
    """Packed spans that know what they were packed from, until they are copied or written to."""
    mask = pack_spans(bounds, key_class)
    if not torch.compiler.is_compiling():
        joint = JOINT[bounds.shape[2]]
        spans = AttentionSpans(bounds, key_class, joint, separate=False, values_known=True)
        keep_spans(mask, (bounds.shape[1], key_class.shape[1], None), spans)
    return mask


def keep_spans(mask: Tensor, use: tuple[int, int, str | None], spans: AttentionSpans) -> None:
    """Keeps the spans of a mask with it, for one use: queries, keys, and the name of a rule or None."""
    mask.pyvlm_spans = (_version(mask), use, spans)  # type: ignore[attr-defined]


def kept_spans(mask: Tensor, use: tuple[int, int, str | None]) -> AttentionSpans | None:
    """What `keep_spans` kept for this use, unless the mask was written to since."""
    version, kept_use, spans = getattr(mask, "pyvlm_spans", (None, None, None))
    return spans if kept_use == use and version == _version(mask) else None


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def unpack_spans(
    mask: Tensor,
    queries: int,
    keys: int,
    range_classes: tuple[int, ...] | None = None,
    separate: bool = False,
) -> AttentionSpans:
    """The spans that `pack_spans` packed, for that many queries and keys.

    Raises:
        ValueError: the tensor was not packed for them.
    """
    expected = queries + (keys + 1) // 2
    if mask.dim() != 4 or mask.shape[2:] != (expected, 2):
        raise ValueError(
            f"the attention mask is {list(mask.shape)}; expected pyvlm's spans [batch, ranges, {expected}, "
            f"2] for {queries} queries and {keys} keys: the model cut or changed the mask, which "
            'pyvlm cannot serve; load it with attn_implementation="sdpa"'
        )
    bounds = mask[:, :, :queries].movedim(1, 2).contiguous()
    classes = mask[:, 0, queries:].reshape(mask.shape[0], -1)[:, :keys].to(torch.uint8)
    return AttentionSpans(bounds, classes, range_classes or JOINT[mask.shape[1]], separate)


def sequence_spans(cu_seqlens: Tensor, tokens: int) -> AttentionSpans:
    """Packed sequences that each see all of themselves: cu_seqlens [n + 1], as FlashAttention's; one row."""
    ends = cu_seqlens[1:].to(torch.int32).contiguous()
    position = torch.arange(tokens, dtype=torch.int32, device=ends.device)
    index = torch.searchsorted(ends, position, right=True)
    bounds = torch.stack([cu_seqlens[index], cu_seqlens[index + 1]], -1).to(torch.int32)
    classes = torch.full((1, tokens), TEXT, dtype=torch.uint8, device=ends.device)
    return AttentionSpans(bounds[None, :, None], classes, JOINT[1], separate=False)


def plain_spans(batch: int, queries: int, keys: int, causal: bool, device: torch.device) -> AttentionSpans:
    """No mask at all: everything, or with `causal` the keys up to the query's place (SDPA's is_causal)."""
    end = (
        torch.arange(1, queries + 1, device=device).clamp(max=keys)
        if causal
        else torch.full((queries,), keys)
    )
    end = end.to(device, torch.int32).expand(batch, -1)
    bounds = torch.stack([torch.zeros_like(end), end], -1).unsqueeze(2)
    classes = torch.full((batch, keys), TEXT, dtype=torch.uint8, device=device)
    return AttentionSpans(bounds, classes, JOINT[1], separate=False)


def _real_keys(
    batch: int, keys: int, kv_offset: int, attention_mask: Tensor | None, device: torch.device
) -> Tensor:
    """uint8 [B, K]: text where the 2-D mask has a token, padding where it has none."""
    padding_mask = prepare_padding_mask(attention_mask, keys, kv_offset)
    if padding_mask is None:
        return torch.full((batch, keys), TEXT, dtype=torch.uint8, device=device)
    real = padding_mask[:, kv_offset : kv_offset + keys] != 0
    return real.to(device, torch.uint8).expand(batch, keys) * TEXT


def _find_ranges(rows: Callable[[int, int], Tensor], queries: int, real: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds [B, Q, R, 2] and classes [B, K] of a mask that `rows(start, stop)` gives densely, [B, q, K].

    The first range is a query's first run of visible keys. What it sees beyond is the second range over the
    class of all keys that any query sees beyond its first run. That this says neither more nor less is
    checked.
    """
    batch, keys = real.shape
    traced = torch.compiler.is_compiling()
    readable = real.device.type == "cpu" and not traced
    mask_runs = torch.ops.pyvlm.mask_runs if readable and _native.C is not None else mask_runs_torch
    piece = PIECE if real.device.type == "cpu" else ACCELERATORS_PIECE
    step = max(queries if traced else piece // max(1, batch * keys), 1)
    pieces = [mask_runs(rows(start, min(start + step, queries))) for start in range(0, max(queries, 1), step)]
    bounds, rest, count = (torch.cat(parts, 1) for parts in list(zip(*pieces, strict=True))[:3])
    beyond = torch.stack([piece[3] for piece in pieces]).any(0)
    if readable and not beyond.any():
        return bounds.unsqueeze(2), real
    # What a query sees beyond its first run lies in its hull and in the class: it is all of them there where
    # it is as many.
    before = torch.nn.functional.pad(beyond.cumsum(1), (1, 0))
    lo, hi = (before.gather(1, rest[..., end].long()) for end in (0, 1))
    right = (hi - lo == count).all()
    if readable and not right:
        raise ValueError(
            "the mask of this model is no two key ranges a query (the second over one class of keys), "
            'which is all that pyvlm has kernels for: load the model with attn_implementation="sdpa"'
        )
    if not readable:
        torch._assert_async(right, "the mask is no two key ranges a query: pyvlm cannot compute it")
    classes = torch.where((real != PADDING) & beyond, IMAGE, real)
    return torch.stack([bounds, rest], 2), classes


def mask_runs_torch(seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The runs of True in the rows of a dense mask, bool [B, q, K]; `pyvlm::mask_runs` in plain PyTorch.

    Returns:
        Of each row the first run and the hull of what it sees beyond that run, both int32 [B, q, 2], half
        open and [0, 0) where there is none; the number of keys it sees beyond, int32 [B, q]; and the keys
        that any row of a batch element sees beyond its first run, bool [B, K].
    """
    keys = seen.shape[2]
    if keys == 0:  # max needs one
        none = seen.new_zeros((*seen.shape[:2], 2), dtype=torch.int32)
        return none, none.clone(), none[..., 0].clone(), seen.any(1)
    position = torch.arange(keys, device=seen.device)
    some, lo = _first_true(seen)
    ended, end = _first_true(~seen & (position > lo))
    hi = torch.where(ended, end, keys)
    first = torch.cat([lo, hi], 2) * some
    beyond = seen & (position >= hi)
    more, lo = _first_true(beyond)
    behind = _first_true(beyond.flip(2))[1]
    rest = torch.cat([lo, keys - behind], 2) * more
    return first.to(torch.int32), rest.to(torch.int32), beyond.sum(2, dtype=torch.int32), beyond.any(1)


def _first_true(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each row of [B, q, K] has a True, and where the first is, both [B, q, 1].

    Of equal values max takes the first; on CPU it is four times as fast as any and argmax one after the
    other. Of bool itself Inductor compiles no max.
    """
    some, place = seen.byte().max(2, keepdim=True)
    return some.bool(), place


def _fake_mask_runs(seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, queries, keys = seen.shape
    run = seen.new_empty((batch, queries, 2), dtype=torch.int32)
    count = seen.new_empty((batch, queries), dtype=torch.int32)
    return run, torch.empty_like(run), count, seen.new_empty((batch, keys))


if _native.C is not None:  # it defines the schema
    torch.library.register_fake("pyvlm::mask_runs", _fake_mask_runs)

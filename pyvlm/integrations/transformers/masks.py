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

from pyvlm.spans import EVERY_CLASS, IMAGE, PADDING, TEXT, AttentionSpans

# Dense rows are looked at in pieces of 2 MB of bool: as fast as all of 2,432 x 2,432 at once, and the peak is
# 27 MB in place of 56; with 512 KB it takes 1.4 times as long.
PIECE = 1 << 21
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
        return pack_spans(bounds, real)

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

    return pack_spans(*_find_ranges(rows, q_length, real))


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
    step = max(queries if traced else PIECE // max(1, batch * keys), 1)
    pieces = [(start, min(start + step, queries)) for start in range(0, queries, step)]
    beyond = torch.zeros(batch, keys, dtype=torch.bool, device=real.device)
    first = []
    for start, stop in pieces:
        seen = rows(start, stop)
        first.append(_first_run(seen))
        beyond = beyond | _beyond(seen, first[-1]).any(1)
    bounds = torch.cat(first, 1) if first else real.new_zeros((batch, 0, 2), dtype=torch.int32)
    readable = real.device.type == "cpu" and not traced
    if readable and not beyond.any():
        return bounds.unsqueeze(2), real
    second = []
    for (start, stop), run in zip(pieces, first, strict=True):
        rest = _beyond(rows(start, stop), run)
        span = _hull(rest)
        position = torch.arange(keys, device=real.device)
        inside = (position >= span[..., :1]) & (position < span[..., 1:]) & beyond[:, None]
        right = (inside == rest).all()
        if readable and not right:
            raise ValueError(
                "the mask of this model is no two key ranges a query (the second over one class of keys), "
                'which is all that pyvlm has kernels for: load the model with attn_implementation="sdpa"'
            )
        if not readable:
            torch._assert_async(right, "the mask is no two key ranges a query: pyvlm cannot compute it")
        second.append(span)
    classes = torch.where((real != PADDING) & beyond, IMAGE, real)
    return torch.stack([bounds, torch.cat(second, 1)], 2), classes


def _first_run(seen: Tensor) -> Tensor:
    """The first run of True in each row of [B, q, K], as int32 [B, q, 2]; empty rows get [0, 0)."""
    keys = seen.shape[-1]
    if keys == 0:
        return seen.new_zeros((*seen.shape[:2], 2), dtype=torch.int32)
    some = seen.any(-1)
    lo = seen.byte().argmax(-1)
    after = ~seen & (torch.arange(keys, device=seen.device) > lo[..., None])
    hi = torch.where(after.any(-1), after.byte().argmax(-1), keys)
    return (torch.stack([lo, hi], -1) * some[..., None]).to(torch.int32)


def _beyond(seen: Tensor, run: Tensor) -> Tensor:
    """What each row sees after its first run."""
    return seen & (torch.arange(seen.shape[-1], device=seen.device) >= run[..., 1:])


def _hull(seen: Tensor) -> Tensor:
    """From the first to the last True of each row, int32 [B, q, 2]; empty rows get [0, 0)."""
    keys = seen.shape[-1]
    lo, behind = seen.byte().argmax(-1), seen.flip(-1).byte().argmax(-1)
    return (torch.stack([lo, keys - behind], -1) * seen.any(-1)[..., None]).to(torch.int32)

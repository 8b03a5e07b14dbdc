"""What each token is, and the rules that turn this into attention: `TokenLayout` and its `spans`.

Every mask of a vision-language model is a few integers a query: R key ranges [lo, hi), and for each range the
classes of key that it may see. A rule computes them from the layout; no mask of size queries × keys is built,
and no tensor of an accelerator is read back to the host.

Shapes: B batch, L tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyvlm.spans import (
    EVERY_CLASS,
    IMAGE,
    PADDING,
    TEXT,
    AttentionSpans,
    expect_classes,
    expect_device,
    expect_dtype,
    first_true,
    is_readable,
)

__all__ = ["EVERY_CLASS", "IMAGE", "PADDING", "RULES", "TEXT", "AttentionSpans", "TokenLayout"]

RULES = (
    "causal",
    "mmca",
    "mmca_released",
    "mmca_image",
    "bidirectional_image",
    "prefix",
    "all_images",
    "bidirectional",
)


@dataclass(frozen=True, eq=False, init=False)
class TokenLayout:
    """What each token of a batch is: its kind, its image, its document, and whether it is in the prefix.

    A document is a run of neighbouring tokens of one number; an image, of one index within a document.

    Attributes:
        kind: uint8 [B, L]: 0 padding, 1 text, 2 image, up to 7 (other modalities; the mmca rules know text
            and image keys only).
        image: int32 [B, L]: which image an image token belongs to, -1 elsewhere. Given as None: each run of
            image tokens within a document is one image.
        document: int32 [B, L]: packed documents do not see each other. Given as None: a row is one document.
        prefix: bool [B, L]: the tokens at the head of each document that see each other both ways. Only the
            rule "prefix" reads it, and needs it; None otherwise.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device. For CPU tensors also a kind above 7, an image token without an
            image index or the other way round, an image in two pieces, or a prefix not at the head.
    """

    kind: Tensor
    image: Tensor
    document: Tensor
    prefix: Tensor | None

    def __init__(
        self,
        kind: Tensor,
        image: Tensor | None = None,
        document: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> None:
        expect_dtype("kind", kind, torch.uint8)
        if kind.dim() != 2:
            raise ValueError(f"kind must be [batch, length], got {list(kind.shape)}")
        optional = (
            ("image", image, torch.int32),
            ("document", document, torch.int32),
            ("prefix", prefix, torch.bool),
        )
        for name, tensor, dtype in optional:
            if tensor is not None:
                expect_dtype(name, tensor, dtype)
                _expect_like(name, tensor, kind)
        document = torch.zeros_like(kind, dtype=torch.int32) if document is None else document
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "image", _number_images(kind, document) if image is None else image)
        object.__setattr__(self, "document", document)
        object.__setattr__(self, "prefix", prefix)
        if is_readable(kind):
            expect_classes("kind", kind)
            if image is not None:
                self._check_images()
            if prefix is not None:
                self._check_prefix(prefix)

    def _check_images(self) -> None:
        kind, image = self.kind, self.image
        bad = (kind == IMAGE) != (image >= 0)
        if bad.any():
            b, i = first_true(bad)
            raise ValueError(
                f"token [{b}, {i}] has kind {kind[b, i]} and image index {image[b, i]}: "
                "image tokens (kind 2) need an index of at least 0, and all others -1"
            )
        doc_first, _ = _runs(self.document)
        image_first, _ = _runs(self.document, image)
        row = torch.arange(len(kind), device=kind.device)[:, None].expand_as(kind)
        starts = (image_first == torch.arange(self.length, device=kind.device)) & (image >= 0)
        pieces = torch.stack([row, doc_first, image], -1)[starts]
        images, count = pieces.unique(dim=0, return_counts=True)
        if (count > 1).any():
            b, _, m = images[count > 1][0].tolist()
            raise ValueError(
                f"image {m} of row {b} lies in more than one piece: "
                "the tokens of an image must be neighbours; give each piece an index of its own"
            )

    def _check_prefix(self, prefix: Tensor) -> None:
        real = self.kind != PADDING
        doc_first, _ = _runs(self.document)
        token = torch.arange(self.length, device=real.device)
        past_prefix = torch.where(real & ~prefix, token, -1).cummax(1).values
        late = real & prefix & (past_prefix >= doc_first)
        if late.any():
            b, i = first_true(late)
            raise ValueError(
                f"token [{b}, {i}] is in the prefix and token [{b}, {past_prefix[b, i]}] before it is not: "
                "a prefix must be the head of its document"
            )

    @property
    def length(self) -> int:
        """L, tokens a row, padding included."""
        return self.kind.shape[1]

    @classmethod
    def from_input_ids(
        cls,
        input_ids: Tensor,
        image_token_id: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> "TokenLayout":
        """The layout of a tokenised batch; each run of the image token is one image, numbered by row from 0.

        Args:
            input_ids: integer [B, L].
            image_token_id: the id of the image placeholder.
            attention_mask: [B, L], 1 (True) for a token and 0 (False) for padding, on either side.
            position_ids: integer [B, L] or [1, L] of packed documents: any step but +1 starts a new document.

        Raises:
            TypeError: a wrong dtype.
            ValueError: a wrong shape or device; for CPU tensors also a mask value that is neither 0 nor 1.
        """
        _expect_integers("input_ids", input_ids)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [batch, length], got {list(input_ids.shape)}")
        _expect_int("image_token_id", image_token_id)
        kind = torch.where(input_ids == image_token_id, IMAGE, TEXT).to(torch.uint8)
        if attention_mask is not None:
            _expect_like("attention_mask", attention_mask, input_ids)
            real = attention_mask != 0
            bad = real & (attention_mask != 1)
            if is_readable(bad) and bad.any():
                b, i = first_true(bad)
                raise ValueError(
                    f"attention_mask[{b}, {i}] is {attention_mask[b, i].item()}: "
                    "expected 1 for a token and 0 for padding (not an additive mask)"
                )
            kind = kind * real
        document = None
        if position_ids is not None:
            _expect_integers("position_ids", position_ids)
            if position_ids.dim() == 2 and position_ids.shape[0] == 1:
                position_ids = position_ids.expand(input_ids.shape[0], -1)
            _expect_like("position_ids", position_ids, input_ids)
            document = torch.zeros_like(kind, dtype=torch.int32)
            document[:, 1:] = (position_ids.diff(dim=1) != 1).cumsum(1)
        return cls(kind, document=document)

    def to(self, device: torch.device | str) -> "TokenLayout":
        """The same layout on another device."""
        prefix = None if self.prefix is None else self.prefix.to(device)
        return TokenLayout(self.kind.to(device), self.image.to(device), self.document.to(device), prefix)

    def spans(
        self, rule: str, window: int | None = None, query_start: int = 0, num_queries: int | None = None
    ) -> AttentionSpans:
        """What the queries query_start, …, query_start + num_queries − 1 see; all L tokens are keys.

        Padding is seen by nobody and sees nothing. Of the rest of its own document, a query sees:

        - "causal": what is not after it.
        - "mmca" (DeepSpeed-VisualChat, arXiv 2309.14327; text keys and image keys are separate streams): a
          text query what is not after it, an image query only itself.
        - "mmca_released" (the code of DeepSpeed-VisualChat): there an image query also sees the text before.
        - "mmca_image": there an image query sees its own image, both ways.
        - "bidirectional_image" (Gemma 3, arXiv 2503.19786): what is not after it, and the rest of its image.
        - "prefix" (PaliGemma, arXiv 2407.07726; PaLI-3, arXiv 2310.09199): a query in the prefix the whole
          prefix, any other what is not after it.
        - "all_images" (Molmo 2): what is not after it; an image query also every image token.
        - "bidirectional": everything.

        `window=w` hides what lies before i − w + 1 from query i, unless i is in a prefix; it hides nothing
        after i. The rows of a chunk of queries are those of the full pass.

        Raises:
            TypeError: an argument is not an int.
            ValueError: an unknown rule, a window below 1, queries outside the layout, no prefix for "prefix".
        """
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is unknown; expected one of {', '.join(map(repr, RULES))}")
        if rule == "prefix" and self.prefix is None:
            raise ValueError('rule="prefix" needs a layout with a prefix: give TokenLayout(..., prefix=mask)')
        if window is not None:
            _expect_int("window", window)
            if window < 1:
                raise ValueError(
                    f"window={window}: a window holds the query itself, so it must be at least 1"
                )
        queries = self._query_slice(query_start, num_queries)

        position = torch.arange(self.length, dtype=torch.int32, device=self.kind.device)
        doc_first, doc_end = (x[:, queries] for x in _runs(self.document))
        is_image = self.kind[:, queries] == IMAGE
        i = position[queries].expand_as(doc_first)
        end = i + 1  # of what is not after the query
        past = doc_first if window is None else torch.maximum(doc_first, end - min(window, self.length))

        if rule in ("mmca", "mmca_released", "mmca_image"):
            image_lo, image_hi, text_lo = i, end, end  # of an image query; end makes an empty range
            if rule == "mmca_released":
                text_lo = past
            elif rule == "mmca_image":
                image_first, image_end = (x[:, queries] for x in _runs(self.document, self.image))
                image_lo, image_hi = torch.maximum(image_first, past), image_end
            text_stream = (torch.where(is_image, text_lo, past), end)
            image_stream = (torch.where(is_image, image_lo, past), torch.where(is_image, image_hi, end))
            return self._pack(queries, (1 << TEXT, 1 << IMAGE), text_stream, image_stream, separate=True)

        if rule == "all_images":
            later_images = (end, torch.where(is_image, doc_end, end))
            return self._pack(queries, (EVERY_CLASS, 1 << IMAGE), (past, end), later_images)

        lo, hi = past, end
        if rule == "bidirectional":
            hi = doc_end
        elif rule == "bidirectional_image":
            _, image_end = _runs(self.document, self.image)
            hi = torch.where(is_image, image_end[:, queries], end)
        elif self.prefix is not None and rule == "prefix":
            prefix_end = torch.where(self.prefix, position + 1, 0).cummax(1).values  # up to each token,
            prefix_end = prefix_end.gather(1, doc_end.long() - 1)  # and so of the document at its last one
            lo = torch.where(self.prefix[:, queries], doc_first, past)
            hi = torch.where(self.prefix[:, queries], prefix_end, end)
        return self._pack(queries, (EVERY_CLASS,), (lo, hi))

    def _query_slice(self, query_start: int, num_queries: int | None) -> slice:
        _expect_int("query_start", query_start)
        if num_queries is not None:
            _expect_int("num_queries", num_queries)
        stop = self.length if num_queries is None else query_start + num_queries
        if not 0 <= query_start <= stop <= self.length:
            raise ValueError(
                f"query_start={query_start}, num_queries={num_queries}: "
                f"the queries must lie within the {self.length} tokens of the layout"
            )
        return slice(query_start, stop)

    def _pack(
        self,
        queries: slice,
        range_classes: tuple[int, ...],
        *ranges: tuple[Tensor, Tensor],
        separate: bool = False,
    ) -> AttentionSpans:
        bounds = torch.stack([torch.stack(r, dim=-1) for r in ranges], dim=-2)
        sees = self.kind[:, queries] != PADDING
        return AttentionSpans(bounds * sees[:, :, None, None], self.kind, range_classes, separate)


def _runs(*labels: Tensor) -> tuple[Tensor, Tensor]:
    """First position and (exclusive) end of each token's run of equal labels, both int32 [B, L]."""
    length, device = labels[0].shape[1], labels[0].device
    starts = torch.zeros(labels[0].shape, dtype=torch.bool, device=device)
    for label in labels:
        starts[:, 1:] |= label[:, 1:] != label[:, :-1]
    position = torch.arange(length, dtype=torch.int32, device=device)
    first = torch.where(starts, position, 0).cummax(1).values
    end = torch.full_like(first, length)
    end[:, :-1] = torch.where(starts, position, length)[:, 1:]
    return first, end.flip(1).cummin(1).values.flip(1)


def _number_images(kind: Tensor, document: Tensor) -> Tensor:
    """Image index of each token, int32 [B, L]: the runs of image tokens in a document, numbered by row."""
    first, _ = _runs(document, kind)
    position = torch.arange(kind.shape[1], device=kind.device)
    starts = (first == position) & (kind == IMAGE)
    return torch.where(kind == IMAGE, starts.cumsum(1, dtype=torch.int32) - 1, -1)


def _expect_like(name: str, tensor: Tensor, other: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != other.shape:
        raise ValueError(f"{name} must be [batch, length] = {list(other.shape)}, got {list(tensor.shape)}")
    expect_device(name, tensor, "the rest of the batch", other)


def _expect_integers(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be an integer tensor, got {given}")


def _expect_int(name: str, value: int) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")

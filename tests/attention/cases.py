"""The attention cases that tests and benchmarks share: plain data, each with the reason why it is there.

A row of tokens is written as a string of runs: `t5` is five text tokens, `i9` an image of nine tokens, `p3`
three padding tokens; a capital (`T5`, `I9`) puts the run in the prefix; `|` starts the next packed document.

Shapes: B rows, L tokens a row (all of them keys), Lq queries, Hq and Hkv heads, D head dimension.
"""

import re
from dataclasses import dataclass, replace

import torch

from pyvlm.layout import TokenLayout
from pyvlm.spans import IMAGE, PADDING, TEXT, AttentionSpans

_KINDS = {"p": PADDING, "t": TEXT, "i": IMAGE}


def parse_row(row: str) -> dict[str, list[int]]:
    """The four columns of a `TokenLayout` for one row: kind, image, document and prefix of every token."""
    columns: dict[str, list[int]] = {"kind": [], "image": [], "document": [], "prefix": []}
    images = document = 0
    for run in row.split():
        if run == "|":
            document += 1
            continue
        letter, length = re.fullmatch(r"([ptiTI])(\d+)", run).groups()
        kind = _KINDS[letter.lower()]
        columns["kind"] += [kind] * int(length)
        columns["image"] += [images if kind == IMAGE else -1] * int(length)
        columns["document"] += [document] * int(length)
        columns["prefix"] += [letter.isupper()] * int(length)
        images += kind == IMAGE
    return columns


@dataclass(frozen=True)
class AttentionCase:
    name: str
    reason: str
    rule: str
    rows: tuple[str, ...]  # all rows have the same number of tokens
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    window: int | None = None
    query_start: int = 0  # negative counts from the end, as in a slice
    num_queries: int | None = None  # None: all from query_start on
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False  # one more score in every softmax of a head, as `sink_scores` gives
    one_softmax: bool = False  # the rule's ranges under one softmax: the joint twin of a separate rule
    large: bool = False  # timed at this size; tests take `reduced()`

    @property
    def length(self) -> int:
        return len(parse_row(self.rows[0])["kind"])

    def layout(self, device: torch.device | str = "cpu") -> TokenLayout:
        rows = [parse_row(row) for row in self.rows]

        def column(name: str, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor([row[name] for row in rows], dtype=dtype, device=device)

        return TokenLayout(
            kind=column("kind", torch.uint8),
            image=column("image", torch.int32),
            document=column("document", torch.int32),
            prefix=column("prefix", torch.bool),
        )

    def spans(self, device: torch.device | str = "cpu") -> AttentionSpans:
        start = self.query_start % self.length if self.length else 0
        spans = self.layout(device).spans(
            self.rule, window=self.window, query_start=start, num_queries=self.num_queries
        )
        return replace(spans, separate=False) if self.one_softmax else spans

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B,Hq,Lq,D], k and v [B,Hkv,L,D] and a cotangent of the output: the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        start = self.query_start % self.length if self.length else 0
        num_queries = self.length - start if self.num_queries is None else self.num_queries
        query_shape = (len(self.rows), self.heads, num_queries, self.head_dim)
        key_shape = (len(self.rows), self.kv_heads, self.length, self.head_dim)
        q_BHTD, k_BHTD, v_BHTD, cotangent_BHTD = (
            torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
            for shape in (query_shape, key_shape, key_shape, query_shape)
        )
        return q_BHTD, k_BHTD, v_BHTD, cotangent_BHTD

    def sink_scores(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> torch.Tensor | None:
        """One number a query head, [Hq]: the same on every device; None where the case has no sinks."""
        if not self.sinks:
            return None
        generator = torch.Generator().manual_seed(seed + 1)
        return torch.randn(self.heads, generator=generator).to(device=device, dtype=dtype)

    def times(self, factor: int) -> "AttentionCase":
        """The same case with runs `factor` times longer: of several tiles where the case itself fits one."""

        def longer(match: re.Match[str]) -> str:
            return str(int(match.group()) * factor)

        return replace(
            self,
            rows=tuple(re.sub(r"\d+", longer, row) for row in self.rows),
            window=self.window and self.window * factor,
            query_start=self.query_start * factor,
            num_queries=self.num_queries and self.num_queries * factor,
        )

    def reduced(self, divisor: int = 16, heads: int = 2) -> "AttentionCase":
        """The same case with runs `divisor` times shorter (576 image tokens become 36) and fewer heads."""

        def shorter(match: re.Match[str]) -> str:
            return str(max(1, int(match.group()) // divisor))

        group = self.heads // self.kv_heads
        return replace(
            self,
            rows=tuple(re.sub(r"\d+", shorter, row) for row in self.rows),
            heads=max(heads, group),
            kv_heads=max(heads, group) // group,
            window=self.window and max(1, self.window // divisor),
            large=False,
        )


TWO_IMAGES = ("t5 i9 t4 i6 t7",)
PADDED = ("t5 i9 t4 i6 t7", "p6 i4 t11 i1 t9", "t3 i3 t11 p14")
PACKED = ("t5 i4 t3 | i6 t5 | t8", "t9 | t1 i7 t2 | i3 t4 p5")
PREFIXED = ("I9 T4 t18", "p3 T2 I5 T6 t15")

SMALL_CASES = (
    AttentionCase("causal", "plain decoder mask; the length is prime", "causal", TWO_IMAGES),
    AttentionCase("causal-padded", "left and right padding, images first and of one token", "causal", PADDED),
    AttentionCase("causal-packed", "ranges start inside the row", "causal", PACKED),
    AttentionCase("causal-window", "lower bound of the range moves", "causal", PADDED, window=4),
    AttentionCase("mmca", "two softmaxes; text before the first image has an empty set", "mmca", PADDED),
    AttentionCase("mmca-packed", "empty sets at the start of every document", "mmca", PACKED),
    AttentionCase("mmca-window", "window on both streams", "mmca", PADDED, window=4),
    AttentionCase("mmca-joint", "same pairs as mmca, one softmax", "mmca", PADDED, one_softmax=True),
    AttentionCase("mmca-released", "image queries have two non-empty streams", "mmca_released", PADDED),
    AttentionCase("mmca-image", "ranges are not monotone in the query", "mmca_image", PACKED),
    AttentionCase("bidirectional-image", "range ends after the query", "bidirectional_image", PADDED),
    AttentionCase("bidirectional-image-packed", "images end documents", "bidirectional_image", PACKED),
    AttentionCase(
        "bidirectional-image-window", "window shorter than the image", "bidirectional_image", PADDED, window=4
    ),
    AttentionCase("prefix", "prefix with and without padding before it", "prefix", PREFIXED),
    AttentionCase("prefix-window", "the prefix ignores the window", "prefix", PREFIXED, window=4),
    AttentionCase(
        "all-images", "second range over all images, before and after the query", "all_images", PACKED
    ),
    AttentionCase("bidirectional", "encoder over packed documents", "bidirectional", PACKED),
    AttentionCase("one-token", "smallest non-empty row", "mmca", ("t1",)),
    AttentionCase("all-padding", "no query sees any key", "causal", ("p7",)),
    AttentionCase("only-image", "no text key at all", "mmca_image", ("i13",)),
    AttentionCase("grouped-heads", "three query heads a key head", "mmca", PADDED, heads=6, kv_heads=2),
    AttentionCase("multi-query", "one key head for all", "bidirectional_image", PADDED, heads=3, kv_heads=1),
    AttentionCase("head-dim-40", "not a power of two", "mmca_image", PADDED, head_dim=40),
    AttentionCase("head-dim-8", "smallest head dimension", "causal", PADDED, head_dim=8),
    AttentionCase("scale", "given scale in place of D^-0.5", "mmca", PADDED, scale=0.7),
    AttentionCase("negative-scale", "the least product is the greatest score", "mmca", PADDED, scale=-0.7),
    AttentionCase(
        "zero-scale", "every key that is seen has the same weight", "bidirectional_image", PADDED, scale=0.0
    ),
    AttentionCase("softcap", "scores bent by tanh", "bidirectional_image", PADDED, scale=2.0, softcap=3.0),
    AttentionCase(
        "softcap-mmca", "softcap under two softmaxes", "mmca_image", PACKED, scale=2.0, softcap=3.0
    ),
    AttentionCase(
        "sinks",
        "rows of weights that do not add up to 1; padding rows see the sink alone",
        "causal",
        PADDED,
        sinks=True,
    ),
    AttentionCase(
        "sinks-mmca", "the sink is in both softmaxes, and alone in empty ones", "mmca", PADDED, sinks=True
    ),
    AttentionCase(
        "sinks-all-options",
        "the sink is neither scaled nor capped; joint ranges, a window, grouped heads",
        "all_images",
        PACKED,
        heads=6,
        kv_heads=2,
        window=4,
        scale=2.0,
        softcap=3.0,
        sinks=True,
    ),
    AttentionCase("decode", "one query, the cache as keys", "mmca", PADDED[:1], query_start=-1),
    AttentionCase(
        "chunk", "a chunk that cuts an image in two", "mmca_image", PADDED, query_start=9, num_queries=11
    ),
    AttentionCase(
        "odd-tiles", "longer than a tile, prime length", "mmca", ("t61 i90 t33 i70 t3",), head_dim=32
    ),
    AttentionCase(
        "odd-tiles-image", "image longer than a tile", "bidirectional_image", ("t7 i151 t99",), head_dim=32
    ),
)

# Three images of 576 tokens (a CLIP ViT-L/14 at 336 pixels) interleaved with text: 4,096 tokens.
DIALOGUE = ("t256 i576 t512 i576 t512 i576 t1088",)
SHORT = ("t32 i64 t32 i64 t64",) * 8

LARGE_CASES = (
    *(
        AttentionCase(
            f"{rule.replace('_', '-')}-4k-d{head_dim}",
            "a multi-image dialogue, training and prefill",
            rule,
            DIALOGUE,
            heads=16,
            kv_heads=16,
            head_dim=head_dim,
            large=True,
        )
        for rule in ("mmca", "bidirectional_image")
        for head_dim in (64, 128)
    ),
    *(
        AttentionCase(
            f"mmca-joint-4k-d{head_dim}",
            "mmca's pairs under one softmax: what the second softmax costs",
            "mmca",
            DIALOGUE,
            heads=16,
            kv_heads=16,
            head_dim=head_dim,
            one_softmax=True,
            large=True,
        )
        for head_dim in (64, 128)
    ),
    *(
        AttentionCase(
            f"short-{rule.replace('_', '-')}",
            "short rows, where fixed costs show",
            rule,
            SHORT,
            heads=8,
            kv_heads=8,
            head_dim=64,
            large=True,
        )
        for rule in ("mmca", "bidirectional_image")
    ),
    *(
        AttentionCase(
            f"decode-4k-b{batch}",
            "one new token against a full cache: bound by reading keys and values",
            "bidirectional_image",
            DIALOGUE * batch,
            heads=16,
            kv_heads=16,
            head_dim=128,
            query_start=-1,
            large=True,
        )
        for batch in (1, 8)
    ),
)

CASES = SMALL_CASES + LARGE_CASES

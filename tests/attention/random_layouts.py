"""Random layouts for hypothesis: packed documents of text, images, other kinds of token, and padding."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from pyvlm.layout import IMAGE, PADDING, TEXT, TokenLayout


@dataclass(frozen=True)
class Token:
    kind: int
    image: int = -1
    document: int = 0
    prefix: bool = False


def layout_of(rows: list[list[Token]]) -> TokenLayout:
    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[getattr(token, name) for token in row] for row in rows], dtype=dtype)

    return TokenLayout(
        column("kind", torch.uint8),
        column("image", torch.int32),
        column("document", torch.int32),
        column("prefix", torch.bool),
    )


@st.composite
def rows(draw: st.DrawFn) -> list[list[Token]]:
    """Rows of packed documents: text, images (some side by side), other kinds, padding all over."""
    numbered_by_document = draw(st.booleans())
    segment = st.tuples(st.sampled_from([TEXT, IMAGE, IMAGE, 3, PADDING]), st.integers(1, 5))
    batch: list[list[Token]] = []
    for _ in range(draw(st.integers(1, 2))):
        row = [Token(PADDING, document=draw(st.sampled_from([-1, 0])))] * draw(st.integers(0, 3))
        image = 0
        for document in range(draw(st.integers(1, 3))):
            image = 0 if numbered_by_document else image
            tokens: list[tuple[int, int]] = []
            for kind, length in draw(st.lists(segment, max_size=4)):
                tokens += [(kind, image if kind == IMAGE else -1)] * length
                image += kind == IMAGE
            prefix = draw(st.integers(0, len(tokens)))
            row += [Token(kind, image, document, i < prefix) for i, (kind, image) in enumerate(tokens)]
        batch.append(row)
    length = max(map(len, batch))
    tail = draw(st.sampled_from([2, 9]))  # the number of the padding's document: the last one's, or its own
    return [row + [Token(PADDING, document=tail)] * (length - len(row)) for row in batch]


windows = st.one_of(st.none(), st.integers(1, 12), st.just(2**40))

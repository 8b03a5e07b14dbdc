"""Text while it is generated: token ids in, printable pieces out."""

from collections.abc import Collection
from typing import Any

_INCOMPLETE = "\ufffd"  # what a character decodes to until its last byte is there


class TextStream:
    """Turns the tokens of one answer into pieces of text, as soon as these are certain.

    Joined, the pieces and `flush` are what the tokenizer's `decode` makes of all tokens. A token is decoded
    with those before it, for on these depend the spaces between words; a character whose bytes are not all
    there is held back. Nothing comes from the first end token on.

    Where a tokenizer falls back on bytes, one that fits nowhere makes the library's decoder give up the good
    characters right before it too; a stream has shown these already and keeps them.

    Args:
        tokenizer: of the model that generates, one of `tokenizers` or of transformers.
        end_token_ids: any of which ends the answer.

    Attributes:
        ended: whether an end token was pushed.
    """

    def __init__(self, tokenizer: Any, end_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._end_token_ids = end_token_ids
        self._ids: list[int] = []
        # Text up to `_printed` is out; decoding starts at `_context`, the tokens of the last piece.
        self._context = self._printed = 0
        self.ended = False

    def push(self, token_id: int) -> str:
        """The piece that one token more makes certain; often a word, or nothing."""
        if self.ended or token_id in self._end_token_ids:
            self.ended = True
            return ""
        self._ids.append(token_id)
        return self._next(final=False)

    def flush(self) -> str:
        """What was held back; the answer is over."""
        self.ended = True
        return self._next(final=True)

    def _next(self, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._printed])
        text = self._decode(self._ids[self._context :])
        piece = text[len(before) :]
        if not piece or (text.endswith(_INCOMPLETE) and not final):
            return ""
        self._context, self._printed = self._printed, len(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

"""Text while it is generated: token ids in, printable pieces out."""

from tokenizers import Tokenizer

from pyvlm.models.processor import Processor

_INCOMPLETE = "\ufffd"  # what a character decodes to until its last byte is there


class TextStream:
    """Turns the tokens of one answer into pieces of text, as soon as these are certain.

    Joined, the pieces and `flush` are what `Processor.decode` makes of all tokens. A token is decoded with
    those before it, for on these depend the spaces between words; a character whose bytes are not all there
    is held back. Nothing comes from the end token on.

    Where a tokenizer falls back on bytes, one that fits nowhere makes the library's decoder give up the good
    characters right before it too; a stream has shown these already and keeps them.

    Args:
        processor: of the model that generates.

    Attributes:
        ended: whether the end token was pushed.
    """

    def __init__(self, processor: Processor) -> None:
        self._tokenizer: Tokenizer = processor.tokenizer
        self._end_token_id = processor.end_token_id
        self._ids: list[int] = []
        # Text up to `_printed` is out; decoding starts at `_context`, the tokens of the last piece.
        self._context = self._printed = 0
        self.ended = False

    def push(self, token_id: int) -> str:
        """The piece that one token more makes certain; often a word, or nothing."""
        if self.ended or token_id == self._end_token_id:
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
        return self._tokenizer.decode(ids, skip_special_tokens=True)

"""Streamed pieces of an answer are its text."""

from functools import cache

import pytest
from chat_folders import FAMILIES, family_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvlm.models import ImageConfig, Processor, ProcessorConfig, word_level_tokenizer
from pyvlm.models.streaming import TextStream

TEXT = "It is schön, 你好 😀👍🏽!\n\nIt  is so."


@cache
def make(kind: str) -> Processor:
    image = ImageConfig(size=4)
    if kind == "words":
        tokenizer = word_level_tokenizer(["It is so, seven three!"])
        return Processor(tokenizer, ProcessorConfig(image=image, tokens_per_image=1))
    family = FAMILIES["qwen-2" if kind == "bytes" else "mistral"]
    tokenizer = family_tokenizer(family)
    tokenizer.add_special_tokens(["<image>"])
    config = ProcessorConfig(
        image=image,
        tokens_per_image=1,
        template="chat",
        chat_template=family.template,
        special_tokens={"bos_token": family.bos, "eos_token": family.eos},
        pad_token=family.eos,
        unknown_token=None,
    )
    return Processor(tokenizer, config)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_characters_come_whole_and_early(kind: str) -> None:
    processor = make(kind)
    ids = processor.tokenizer.encode(TEXT, add_special_tokens=False).ids
    stream = TextStream(processor.tokenizer, [processor.end_token_id])
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == TEXT == processor.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    # An emoji has four bytes, each a token here, and appears with the last.
    first = next(i for i, piece in enumerate(pieces) if "😀" in piece)
    assert pieces[first] == "😀"
    assert pieces[first - 3 : first] == [""] * 3
    assert stream.flush() == ""


def test_words_are_spaced() -> None:
    processor = make("words")
    stream = TextStream(processor.tokenizer, [processor.end_token_id])
    ids = processor.tokenizer.encode("it is so").ids
    assert [stream.push(i) for i in ids] == ["it", " is", " so"]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "words"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_tokens_give_their_text(kind: str, data: st.DataObject) -> None:
    """Special tokens in the middle too, and bytes that fit nowhere where each is decoded by itself."""
    processor = make(kind)
    names = {i: processor.tokenizer.id_to_token(i) for i in range(processor.vocab_size)}
    units = [[i] for i, name in names.items() if not name.startswith("<0x")]
    units += [processor.tokenizer.encode(char).ids for char in "é你😀"] * 20
    ids = [i for unit in data.draw(st.lists(st.sampled_from(units), max_size=8)) for i in unit]
    stream = TextStream(processor.tokenizer, [processor.end_token_id])
    assert "".join([*map(stream.push, ids), stream.flush()]) == processor.decode(ids)


def test_what_was_shown_stays_where_a_byte_breaks_the_rest() -> None:
    processor = make("sentencepiece")
    ids = [processor.tokenizer.token_to_id(name) for name in ("<0x41>", "<0xE4>", "It")]
    stream = TextStream(processor.tokenizer, [processor.end_token_id])
    assert [stream.push(i) for i in ids] == ["A", "", "\ufffdIt"]
    assert processor.decode(ids) == "\ufffd\ufffdIt"


def test_nothing_comes_from_the_end_on() -> None:
    processor = make("bytes")
    ids = processor.tokenizer.encode("It is").ids
    stream = TextStream(processor.tokenizer, [processor.end_token_id])
    pushed = [stream.push(i) for i in [*ids, processor.end_token_id, *ids]]
    assert "".join(pushed) == "It is"
    assert stream.ended
    assert stream.flush() == ""


def test_what_was_cut_off_is_flushed() -> None:
    processor = make("bytes")
    stream = TextStream(processor.tokenizer, [processor.end_token_id])
    ids = processor.tokenizer.encode("It😀").ids[:-1]
    assert "".join(map(stream.push, ids)) == "It"
    assert stream.flush() == "\ufffd"
    assert stream.push(ids[0]) == ""

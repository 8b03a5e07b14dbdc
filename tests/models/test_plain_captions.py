"""The form "plain": an image and its caption, token by token as LLaVA's first stage writes them."""

from pathlib import Path

import numpy as np
import pytest
from chat_folders import FAMILIES, write_folder
from transformers import PreTrainedTokenizerFast

from pyvlm.data.packing import encode, measure
from pyvlm.models import ImageConfig, Processor, ProcessorConfig, word_level_tokenizer
from pyvlm.models.processor import IGNORED

IMAGE = {"type": "image", "image": np.zeros((4, 4), dtype=np.uint8)}
TOKENS = 3  # of an image


def captioned(caption="It is a small cat", *more):
    content = [{"type": "text", "text": "What is in image 1?\n"}, IMAGE]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": caption}, *more]


def folder_processor(tmp_path: Path, family: str, **options) -> Processor:
    folder = write_folder(tmp_path / family, FAMILIES[family], added=("<image>",))
    image = ImageConfig(size=4, channels=1)
    return Processor.from_transformers(folder, image, TOKENS, **options).changed(form="plain")


def llava(tokenizer: PreTrainedTokenizerFast, bos: list[int], image_id: int, caption: str):
    """Ids and labels as `preprocess_plain` and `tokenizer_image_token` make them, the image expanded."""
    chunk = tokenizer(f"{caption}\n", add_special_tokens=False).input_ids
    before = [*bos, *[image_id] * TOKENS]
    return before + chunk, [IGNORED] * len(before) + chunk


@pytest.mark.parametrize(
    ("family", "begins"), [("vicuna", True), ("llama-3", True), ("qwen-2", False), ("chatml", False)]
)
@pytest.mark.parametrize("caption", ["It is a small cat", "  cats.\n\ndogs ", ""])
def test_tokens_and_labels_are_those_of_llava(tmp_path, family: str, begins: bool, caption: str) -> None:
    processor = folder_processor(tmp_path, family)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / family)
    bos = [tokenizer.bos_token_id] if begins else []
    ids, labels = llava(tokenizer, bos, processor.image_token_id, caption)
    sample = processor.encode(captioned(caption))
    assert sample["input_ids"].tolist() == ids
    assert sample["labels"].tolist() == labels
    assert sample["images"].shape == (1, 1, 4, 4)
    assert processor.length(captioned(caption)) == len(ids)
    assert processor.end_token_id == ids[-1]  # of a newline of its own
    prompt = processor.encode(captioned()[:1], add_generation_prompt=True)["input_ids"].tolist()
    assert prompt == [*bos, *[processor.image_token_id] * TOKENS]


def test_markers_of_images_stay_and_words_before_them_go(tmp_path) -> None:
    processor = folder_processor(
        tmp_path, "vicuna", image_start="<img>", image_end="</img>", image_words="Image {n}: "
    )
    ids = processor.encode(captioned())["input_ids"].tolist()
    names = [processor.tokenizer.id_to_token(i) for i in ids[: TOKENS + 3]]
    assert names == ["<s>", "<img>", *["<image>"] * TOKENS, "</img>"]


@pytest.fixture
def words() -> Processor:
    config = ProcessorConfig(image=ImageConfig(size=4, channels=1), tokens_per_image=TOKENS)
    return Processor(word_level_tokenizer(["it is a small cat", "?"]), config)


def test_role_tokens_write_the_end_token(words: Processor) -> None:
    processor = words.changed(form="plain")
    sample = processor.encode(captioned())
    names = [processor.tokenizer.id_to_token(i) for i in sample["input_ids"].tolist()]
    assert names == ["<image>"] * TOKENS + ["it", "is", "a", "small", "cat", "<end>"]
    assert sample["labels"].tolist() == [IGNORED] * TOKENS + sample["input_ids"].tolist()[TOKENS:]
    assert processor.decode(sample["input_ids"][TOKENS:]) == "it is a small cat"
    assert words.encode(captioned())["input_ids"].tolist() != sample["input_ids"].tolist()
    assert processor.changed(form="plain") is processor
    assert processor.changed(form="dialogue").encode(captioned())["labels"].tolist() == (
        words.encode(captioned())["labels"].tolist()
    )


def test_captions_are_cut_and_measured_as_dialogues_are(words: Processor) -> None:
    processor = words.changed(form="plain")
    assert measure(processor, captioned(), 5) == 5
    assert encode(processor, captioned(), 5)["labels"].tolist()[:3] == [IGNORED] * 3
    with pytest.raises(ValueError, match="nothing to learn within max_length"):
        measure(processor, captioned(), TOKENS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (captioned("cat", {"role": "user", "content": "?"}), "user and assistant, got user, assistant, user"),
        (captioned()[1:], "got assistant"),
        ([], "got none"),
        ([{"role": "user", "content": "?"}, captioned()[1]], "takes one image and its caption, got 0 images"),
        ([{"role": "user", "content": [IMAGE, IMAGE]}, captioned()[1]], "got 2 images"),
        ([captioned()[0], {"role": "assistant", "content": [IMAGE]}], "holds text only"),
        (captioned("cat <end>"), "message 1: the text holds '<end>'"),
        ([{"role": "system", "content": "?"}, *captioned()], "the role must be"),
    ],
)  # fmt: skip
def test_what_is_no_caption_is_refused(words: Processor, messages, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        words.changed(form="plain").encode(messages)


def test_chat_tokens_in_a_caption_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="message 1: the text holds '</s>'"):
        folder_processor(tmp_path, "vicuna").encode(captioned("a cat</s>"))


def test_the_form_is_saved(words: Processor, tmp_path) -> None:
    words.changed(form="plain").save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    assert again.config.form == "plain"
    assert again.encode(captioned())["labels"].tolist()[0] == IGNORED

"""Processors from the folders of language models, and how images are worded and written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_folders import FAMILIES, family_tokenizer, write_folder

from pyvlm.models import ImageConfig, Processor, ProcessorConfig, word_level_tokenizer
from pyvlm.models.pretrained_tokenizer import read_pretrained_tokenizer
from pyvlm.models.processor import IGNORED

IMAGE = {"type": "image", "image": np.zeros((4, 4), dtype=np.uint8)}
SIZE = ImageConfig(size=4, channels=1)
MESSAGES = [
    {"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": [{"type": "text", "text": "So "}, IMAGE]},
]
OPTIONS: dict[str, Any] = {"image_start": "<img>", "image_end": "</img>", "image_words": "Image {n}: "}


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None takes one away."""
    content = json.loads(path.read_text()) | changes if path.exists() else changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "lm", FAMILIES["qwen-2"])


def test_tokens_that_the_model_lacks_are_added_behind_its_own(folder: Path) -> None:
    size = family_tokenizer(FAMILIES["qwen-2"]).get_vocab_size()
    processor = Processor.from_transformers(folder, SIZE, 2)
    assert processor.image_token_id == size
    assert processor.vocab_size == size + 1
    assert processor.pad_token_id == processor.end_token_id  # the folder names no other
    assert processor.unknown_token_id is None
    assert processor.unknown_words("never ☃ seen") == []
    more = Processor.from_transformers(folder, SIZE, 2, **OPTIONS)
    assert more.vocab_size == size + 3


def test_an_image_token_of_the_tokenizer_is_kept(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, FAMILIES["qwen-2"], added=("<image>", "<other>"))
    size = Processor.from_transformers(folder, SIZE, 2).vocab_size
    processor = Processor.from_transformers(folder, SIZE, 2, image_token="<other>")
    assert (processor.vocab_size, processor.image_token_id) == (size, size - 1)


def test_images_in_words_and_between_tokens(folder: Path) -> None:
    processor = Processor.from_transformers(folder, SIZE, 2, **OPTIONS)
    sample = processor.encode(MESSAGES)
    text = processor.tokenizer.decode(sample["input_ids"].tolist(), skip_special_tokens=False)
    one = "<img><image><image></img>"
    assert text.split("<|im_start|>")[2:] == [
        f"user\nImage 1: {one}Image 2: {one}What?<|im_end|>\n",
        "assistant\nIt is.<|im_end|>\n",
        f"user\nSo Image 3: {one}<|im_end|>\n",
    ]
    assert processor.length(MESSAGES) == len(sample["input_ids"])
    for token in ("<img>", "</img>"):
        with pytest.raises(ValueError, match=f"the text holds '{token}'"):
            processor.encode([{"role": "user", "content": token}])


def test_role_tokens_take_the_same_options() -> None:
    special = ["<pad>", "<unk>", "<image>", "<user>", "<assistant>", "<end>", "<img>", "</img>"]
    tokenizer = word_level_tokenizer(["image 1 2 3: so"], special)
    processor = Processor(tokenizer, ProcessorConfig(image=SIZE, tokens_per_image=2, **OPTIONS))
    messages = [MESSAGES[2], {"role": "assistant", "content": [IMAGE, {"type": "text", "text": "so"}]}]
    sample = processor.encode(messages)
    one = "<img> <image> <image> </img>"
    assert " ".join(map(tokenizer.id_to_token, sample["input_ids"])) == (
        f"<user> so image 1 : {one} <end> <assistant> image 2 : {one} so <end>"
    )
    learnt = [tokenizer.id_to_token(i) for i in sample["labels"].tolist() if i != IGNORED]
    assert learnt == ["image", "2", ":", "so", "<end>"]
    assert processor.length(messages) == len(sample["input_ids"])


def test_length_reads_no_image(folder: Path) -> None:
    processor = Processor.from_transformers(folder, SIZE, 5)
    nowhere = [{"role": "user", "content": [{"type": "image", "image": Path("not/here.png")}]}]
    shown = [{"role": "user", "content": [IMAGE]}]
    assert processor.length(nowhere) == processor.length(shown) == len(processor.encode(shown)["input_ids"])
    with pytest.raises(ValueError, match="message 0, image 1"):
        processor.encode(nowhere)


def test_a_subclass_may_size_images(folder: Path) -> None:
    class Growing(Processor):
        def tokens_of(self, image: Any) -> int:
            return int(image.shape[0])

    tokenizer = Processor.from_transformers(folder, SIZE, 1)
    processor = Growing(tokenizer.tokenizer, tokenizer.config)
    big = {"type": "image", "image": np.zeros((7, 7), dtype=np.uint8)}
    messages = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}, big]}]
    ids = processor.encode(messages)["input_ids"].tolist()
    places = [i for i, token_id in enumerate(ids) if token_id == processor.image_token_id]
    assert len(places) == 11
    assert places[:4] == list(range(places[0], places[0] + 4))
    assert places[4] > places[3] + 1
    assert processor.length(messages) == len(ids)


def test_round_trip_on_disk(folder: Path, tmp_path: Path) -> None:
    processor = Processor.from_transformers(folder, SIZE, 2, **OPTIONS)
    processor.save_pretrained(tmp_path / "saved")
    loaded = Processor.from_pretrained(tmp_path / "saved")
    assert loaded.config == processor.config
    assert (loaded.end_token_id, loaded.vocab_size) == (processor.end_token_id, processor.vocab_size)
    for name, tensor in processor.encode(MESSAGES).items():
        assert torch.equal(tensor, loaded.encode(MESSAGES)[name])


def test_processors_saved_before_chat_templates_load(tmp_path: Path) -> None:
    processor = Processor(word_level_tokenizer(["seven"]), ProcessorConfig(image=SIZE, tokens_per_image=2))
    processor.save_pretrained(tmp_path)
    old = {
        "image": {"size": 4, "channels": 1, "mean": [0.5], "std": [0.5]},
        "tokens_per_image": 2,
        "image_token": "<image>",
        "user_token": "<user>",
        "assistant_token": "<assistant>",
        "end_token": "<end>",
        "pad_token": "<pad>",
        "unknown_token": "<unk>",
    }
    (tmp_path / "processor.json").write_text(json.dumps(old))
    assert Processor.from_pretrained(tmp_path).config == processor.config


def test_batches_are_padded(folder: Path) -> None:
    processor = Processor.from_transformers(folder, SIZE, 2)
    batch = processor.collate([processor.encode(MESSAGES[:1]), processor.encode(MESSAGES)])
    assert batch["attention_mask"].sum(1).tolist() == [
        processor.length(MESSAGES[:1]),
        processor.length(MESSAGES),
    ]
    assert (batch["labels"][~batch["attention_mask"]] == IGNORED).all()


def test_where_the_template_stands(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    template = FAMILIES["chatml"].template
    assert read_pretrained_tokenizer(folder).chat_template == FAMILIES["qwen-2"].template
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    edit(config, chat_template=several)
    assert read_pretrained_tokenizer(folder).chat_template == template
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    assert read_pretrained_tokenizer(folder).chat_template == "{{ 1 }}"
    given = Processor.from_transformers(folder, SIZE, 1, chat_template="chatml")
    assert given.config.chat_template == template
    assert Processor.from_transformers(folder, SIZE, 1, chat_template=template).config == given.config


def test_special_tokens_of_both_files(folder: Path) -> None:
    config, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    edit(older, eos_token="<|endoftext|>", pad_token={"content": "<|pad|>"})
    read = read_pretrained_tokenizer(folder)
    assert read.special_tokens["eos_token"] == "<|endoftext|>"
    size = family_tokenizer(FAMILIES["qwen-2"]).get_vocab_size()
    assert read.tokenizer.token_to_id("<|pad|>") == size  # transformers adds what is missing
    described = {str(size): {"content": "<|extra|>", "special": True}}
    edit(config, added_tokens_decoder=described)
    read = read_pretrained_tokenizer(folder)
    assert read.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    assert read.tokenizer.token_to_id("<|extra|>") == size
    edit(config, added_tokens_decoder={"3": {"content": "<|extra|>"}})
    with pytest.raises(ValueError, match=rf"gives '<\|extra\|>' the id 3, .* room for it at {size}"):
        read_pretrained_tokenizer(folder)


def test_folders_that_will_not_do(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    edit(config, chat_template=None)
    with pytest.raises(
        ValueError, match="has no chat template; give one, as text or by name: chatml, llama-2"
    ):
        Processor.from_transformers(folder, SIZE, 1)
    with pytest.raises(
        ValueError, match="no chat template 'alpaca': give Jinja text or one of chatml, llama-2"
    ):
        Processor.from_transformers(folder, SIZE, 1, chat_template="alpaca")
    edit(config, eos_token=None)
    with pytest.raises(ValueError, match="names neither a pad_token nor an eos_token"):
        Processor.from_transformers(folder, SIZE, 1, chat_template="chatml")
    edit(config, added_tokens_decoder={"1": "no"})
    with pytest.raises(ValueError, match="does not describe special tokens"):
        Processor.from_transformers(folder, SIZE, 1)
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json must hold one JSON object"):
        Processor.from_transformers(folder, SIZE, 1)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json cannot be read"):
        Processor.from_transformers(folder, SIZE, 1)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        Processor.from_transformers(folder, SIZE, 1)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer.json there.* AutoTokenizer.from_pretrained"):
        Processor.from_transformers(folder, SIZE, 1)


@pytest.mark.parametrize("given", [{"template": "chat"}, {"chat_template": "{{ 1 }}"}])
def test_a_template_and_its_kind_go_together(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match='chat_template goes with template "chat"'):
        ProcessorConfig(image=SIZE, tokens_per_image=1, **given)

"""Dialogues to tensors and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pyvlm.models import ImageConfig, Processor, ProcessorConfig, word_level_tokenizer
from pyvlm.models.processor import IGNORED

TEXTS = ["image 1 2 3 :", "Which digit is in it?", "seven three!"]


@pytest.fixture
def processor() -> Processor:
    config = ProcessorConfig(image=ImageConfig(size=4, channels=1), tokens_per_image=2)
    return Processor(word_level_tokenizer(TEXTS), config)


def image(value: int = 255) -> np.ndarray:
    return np.full((4, 4), value, dtype=np.uint8)


def dialogue() -> list[dict]:
    return [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "image 1 :"},
                {"type": "image", "image": image(255)},
                {"type": "text", "text": "image 2 :"},
                {"type": "image", "image": image(0)},
                {"type": "text", "text": "which digit ?"},
            ],
        },
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "which ?"},
        {"role": "assistant", "content": [{"type": "text", "text": "three !"}]},
    ]


def words(processor: Processor, ids: torch.Tensor) -> str:
    return " ".join(processor.tokenizer.id_to_token(i) for i in ids.tolist())


def test_a_dialogue_is_its_template(processor: Processor) -> None:
    sample = processor.encode(dialogue())
    assert words(processor, sample["input_ids"]) == (
        "<user> image 1 : <image> <image> image 2 : <image> <image> which digit ? <end> "
        "<assistant> seven <end> <user> which ? <end> <assistant> three ! <end>"
    )
    learnt = sample["labels"] != IGNORED
    assert words(processor, sample["labels"][learnt]) == "seven <end> three ! <end>"
    assert torch.equal(sample["labels"][learnt], sample["input_ids"][learnt])
    assert torch.equal(sample["images"], torch.stack([torch.ones(1, 4, 4), -torch.ones(1, 4, 4)]))


def test_generation_prompt(processor: Processor) -> None:
    sample = processor.encode(dialogue()[:1], add_generation_prompt=True)
    assert words(processor, sample["input_ids"]).endswith("? <end> <assistant>")
    assert (sample["labels"] == IGNORED).all()


def test_assistant_images_are_not_learnt(processor: Processor) -> None:
    content = [{"type": "image", "image": image()}, {"type": "text", "text": "seven"}]
    sample = processor.encode([{"role": "assistant", "content": content}])
    assert sample["labels"].tolist()[:3] == [IGNORED] * 3
    assert words(processor, sample["labels"][3:]) == "seven <end>"


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_and_keeps_reading_order(processor: Processor, side: str) -> None:
    first, second = processor.encode(dialogue()), processor.encode(dialogue()[2:])
    batch = processor.collate([second, first], padding_side=side)
    length = len(first["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, length)
    assert batch["attention_mask"].sum(1).tolist() == [len(second["input_ids"]), length]
    for row, sample in enumerate((second, first)):
        real = batch["attention_mask"][row]
        assert real[-1 if side == "left" else 0]
        assert torch.equal(batch["input_ids"][row][real], sample["input_ids"])
        assert torch.equal(batch["labels"][row][real], sample["labels"])
        assert (batch["input_ids"][row][~real] == processor.pad_token_id).all()
        assert (batch["labels"][row][~real] == IGNORED).all()
    assert torch.equal(batch["images"], first["images"])
    assert processor.collate([second])["images"] is None


def test_decode_stops_at_the_end(processor: Processor) -> None:
    ids = processor.encode([{"role": "assistant", "content": "Seven three"}])["input_ids"]
    assert processor.decode(ids) == "seven three"
    assert processor.decode([*ids.tolist(), *ids.tolist()]) == "seven three"


def test_unknown_words(processor: Processor) -> None:
    assert processor.unknown_words("Which LETTER is in image 9, seven?") == ["LETTER", "9", ","]
    assert processor.unknown_words("which digit?") == []
    sample = processor.encode([{"role": "user", "content": "letter"}])
    assert words(processor, sample["input_ids"]) == "<user> <unk> <end>"


def test_word_level_vocabulary_does_not_depend_on_order() -> None:
    forwards, backwards = word_level_tokenizer(TEXTS), word_level_tokenizer(reversed(TEXTS))
    assert forwards.to_str() == backwards.to_str()
    assert [forwards.id_to_token(i) for i in range(6)] == [
        "<pad>",
        "<unk>",
        "<image>",
        "<user>",
        "<assistant>",
        "<end>",
    ]


def test_round_trip_on_disk(processor: Processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path / "folder")
    loaded = Processor.from_pretrained(tmp_path / "folder")
    assert loaded.config == processor.config
    for ours, theirs in zip(
        processor.encode(dialogue()).values(), loaded.encode(dialogue()).values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_broken_files_are_named(processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not/here: there is no such folder"):
        Processor.from_pretrained(tmp_path / "not" / "here")
    with pytest.raises(ValueError, match=r"tokenizer.json: cannot be read"):
        Processor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "processor.json").write_text('{"tokens_per_image": 0}')
    with pytest.raises(
        ValueError, match=r"processor.json is not a valid ProcessorConfig: image: .*tokens_per_image"
    ):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        Processor.from_pretrained(tmp_path)


def test_any_tokenizer_of_the_library() -> None:
    """Bytes as tokens, and other names for the special ones."""
    special = ["[PAD]", "[IMG]", "[INST]", "[/INST]", "[EOS]", "[UNK]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    config = ProcessorConfig(
        image=ImageConfig(size=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)),
        tokens_per_image=3,
        pad_token="[PAD]",
        image_token="[IMG]",
        user_token="[INST]",
        assistant_token="[/INST]",
        end_token="[EOS]",
        unknown_token="[UNK]",
    )
    processor = Processor(tokenizer, config)
    content = [{"type": "image", "image": np.ones((2, 2, 3))}, {"type": "text", "text": "Was ist schön?"}]
    sample = processor.encode([{"role": "user", "content": content}])
    assert sample["input_ids"][:4].tolist() == [2, 1, 1, 1]
    assert processor.decode(sample["input_ids"]) == "Was ist schön?"
    mean, std = torch.tensor(config.image.mean), torch.tensor(config.image.std)
    expected = ((1 - mean) / std)[:, None, None].expand(3, 2, 2)
    assert torch.equal(sample["images"][0], expected)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            {"role": "system", "content": "hi"},
            'message 0: the role must be "user" or "assistant", got \'system\'',
        ),
        ({"content": "hi"}, "got None"),
        ({"role": "user"}, "content must be a string or a list of parts, got None"),
        ({"role": "user", "content": ["hi"]}, "a part must be"),
        ({"role": "user", "content": [{"type": "text", "image": "a.png"}]}, "a part must be"),
        ({"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, "a part must be"),
        (
            {"role": "user", "content": "an <image> ?"},
            "the text holds '<image>', which only the template may write",
        ),
        ({"role": "user", "content": "stop <end>"}, "the text holds '<end>'"),
    ],
)
def test_bad_messages_are_refused(processor: Processor, message: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        processor.encode([message])


def test_a_bad_image_is_named_by_its_place(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_text("no image")
    content = [{"type": "image", "image": image()}, {"type": "image", "image": path}]
    with pytest.raises(ValueError, match=r"message 1, image 2: image '.*broken.png': not an image"):
        processor.encode([{"role": "user", "content": "which ?"}, {"role": "user", "content": content}])


def test_what_does_not_fit_together_is_refused(processor: Processor) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        processor.collate([])
    with pytest.raises(ValueError, match="padding_side"):
        processor.collate([processor.encode(dialogue())], padding_side="top")
    tokenizer = word_level_tokenizer(TEXTS, ["<pad>", "<unk>", "<image>"])
    with pytest.raises(ValueError, match=r"lacks the special tokens \['<user>', '<assistant>', '<end>'\]"):
        Processor(tokenizer, processor.config)
    with pytest.raises(ValueError, match="one for each of 1 channels"):
        ImageConfig(size=4, channels=1, mean=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="must be positive"):
        ImageConfig(size=4, std=(0.0,))


def test_length_decodes_no_image(processor: Processor) -> None:
    assert processor.length(dialogue()) == len(processor.encode(dialogue())["input_ids"])
    shown = {"role": "user", "content": [{"type": "image", "image": "no/such.png"}]}
    assert processor.length([shown]) == 4  # the role, two placeholders, the end

"""Messages in, token ids, labels and pixels out: the tokenizer, the chat template, the image preprocessing.

Shapes: B batch, L tokens, n images of a sample, N images of a batch, C channels, H = W image size; with
tiling, m base views and tiles of an image or a sample, M of a batch.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import model_validator
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from pyvlm.models.checkpoint import find_folder, read_config, read_file, write_file
from pyvlm.models.images import image_size, load_image, to_pixels
from pyvlm.models.tiling import TilingConfig, cut_image
from pyvlm.models.tower_config import Config, ImageConfig, Size

IGNORED = -100
Message = Mapping[str, Any]
Sample = dict[str, Tensor]


class EncodedImage(NamedTuple):
    """The pixels of one image [m, C, H, W], its (height, width) before them, and its placeholders."""

    pixels: Tensor
    size: tuple[int, int]
    num_tokens: int


class ProcessorConfig(Config):
    """What `processor.json` holds. A turn is its role's token, its content, and `end_token`."""

    image: ImageConfig
    tiling: TilingConfig | None = None  # with it, tokens_per_image are those of a tile
    tokens_per_image: Size
    image_token: str = "<image>"
    user_token: str = "<user>"
    assistant_token: str = "<assistant>"
    end_token: str = "<end>"
    pad_token: str = "<pad>"
    unknown_token: str = "<unk>"

    @model_validator(mode="after")
    def _tiles_are_square(self) -> "ProcessorConfig":
        if self.tiling is not None:
            self.tiling.check(self.image.size, self.tokens_per_image)
        return self

    @property
    def template_tokens(self) -> list[str]:
        """The tokens that only the template may write: text that holds one would break it."""
        return [self.image_token, self.user_token, self.assistant_token, self.end_token, self.pad_token]


def word_level_tokenizer(texts: Iterable[str], special_tokens: Sequence[str] | None = None) -> Tokenizer:
    """A tokenizer whose vocabulary is the words and punctuation marks of `texts`, in lower case.

    Args:
        texts: everything that will be asked and answered; a word outside becomes <unk>.
        special_tokens: the first ids; None: those of `ProcessorConfig`. "<unk>" must be among them.
    """
    if special_tokens is None:
        special_tokens = ["<pad>", "<unk>", "<image>", "<user>", "<assistant>", "<end>"]
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    vocabulary = {word: i for i, word in enumerate([*special_tokens, *sorted(words - set(special_tokens))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


class Processor:
    """Turns dialogues about images into what the model takes, and token ids back into text.

    A message is `{"role": "user" | "assistant", "content": ...}`, its content a string or a list of parts
    `{"type": "text", "text": str}` and `{"type": "image", "image": path | PIL image | array}`. Each image
    becomes `tokens_of(image)` placeholders where it stands; words beside it ("image 1 :") are the caller's.

    Args:
        tokenizer: any tokenizer of the `tokenizers` library that knows the special tokens of `config`.
        config: image preprocessing and template.

    Raises:
        ValueError: the tokenizer lacks a special token.
    """

    def __init__(self, tokenizer: Tokenizer, config: ProcessorConfig) -> None:
        ids = {
            name: token_id
            for name in [*config.template_tokens, config.unknown_token]
            if (token_id := tokenizer.token_to_id(name)) is not None
        }
        if missing := [name for name in [*config.template_tokens, config.unknown_token] if name not in ids]:
            raise ValueError(
                f"the tokenizer lacks the special tokens {missing}: add them or name others in the config"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.image_token_id = ids[config.image_token]
        self.user_token_id = ids[config.user_token]
        self.assistant_token_id = ids[config.assistant_token]
        self.end_token_id = ids[config.end_token]
        self.pad_token_id = ids[config.pad_token]
        self.unknown_token_id = ids[config.unknown_token]
        self._template_ids = {ids[name]: name for name in config.template_tokens}

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def length(self, messages: Sequence[Message]) -> int:
        """Tokens of `encode(messages)`; no image is decoded."""
        return len(self._encode_turns(messages, None)[0])

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Sample:
        """One dialogue as tensors.

        Args:
            messages: the dialogue so far.
            add_generation_prompt: append the token that opens the assistant's turn.

        Returns:
            input_ids int64 [L]; labels int64 [L], aligned with them: the assistant's words and end tokens,
            and −100 elsewhere; images float32 [n, C, H, W], normalised. With tiling, images [m, C, H, W] are
            image by image the base view and the tiles, and image_sizes int64 [n, 2] their (height, width)
            before they were cut.

        Raises:
            ValueError: an unknown role or part, text with a template token, a bad image.
        """
        images: list[EncodedImage] = []
        ids, labels = self._encode_turns(messages, images)
        if add_generation_prompt:
            ids.append(self.assistant_token_id)
            labels.append(IGNORED)
        return {
            "input_ids": torch.tensor(ids, dtype=torch.int64),
            "labels": torch.tensor(labels, dtype=torch.int64),
            **self._stack_images(images),
        }

    def _encode_turns(
        self, messages: Sequence[Message], images: list[EncodedImage] | None
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels; the images are appended to `images`, or with None not even decoded."""
        ids: list[int] = []
        labels: list[int] = []
        role_ids = {"user": self.user_token_id, "assistant": self.assistant_token_id}
        for number, message in enumerate(messages):
            role = message.get("role")
            if role not in role_ids:
                raise ValueError(f'message {number}: the role must be "user" or "assistant", got {role!r}')
            content = [*self._encode_content(message.get("content"), number, images), self.end_token_id]
            ids += [role_ids[role], *content]
            spoken = [IGNORED if i == self.image_token_id else i for i in content]
            labels += [IGNORED, *(spoken if role == "assistant" else [IGNORED] * len(content))]
        return ids, labels

    def _encode_content(self, content: Any, number: int, images: list[EncodedImage] | None) -> list[int]:
        """Token ids of one message's content; its images are appended to `images` where that is given."""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence):
            raise ValueError(
                f"message {number}: content must be a string or a list of parts, got {content!r}"
            )
        ids: list[int] = []
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                ids += self._encode_text(part["text"], number)
            elif kind == "image" and "image" in part:
                if images is None:
                    ids += [self.image_token_id] * self.tokens_of(part["image"])
                    continue
                try:
                    images.append(self.encode_image(part["image"]))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"message {number}, image {len(images) + 1}: {error}") from error
                ids += [self.image_token_id] * images[-1].num_tokens
            else:
                raise ValueError(
                    f'message {number}: a part must be {{"type": "text", "text": str}} or '
                    f'{{"type": "image", "image": ...}}, got {part!r}'
                )
        return ids

    def _encode_text(self, text: str, number: int) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if written := [self._template_ids[i] for i in ids if i in self._template_ids]:
            raise ValueError(
                f"message {number}: the text holds {written[0]!r}, which only the template may write; "
                "give an image as a part of its own, and other tokens in other words"
            )
        return ids

    def tokens_of(self, image: Any) -> int:
        """Placeholders that an image takes; without tiling all take as many, and else its size is read."""
        config = self.config
        if config.tiling is None:
            return config.tokens_per_image
        return config.tiling.num_tokens(image_size(image), config.image.size, config.tokens_per_image)

    def encode_image(self, image: Any) -> EncodedImage:
        """One image with all that the model needs of it; a file is read once.

        Raises:
            TypeError, ValueError: not an image, or a bad one: see `pyvlm.models.images.read_pixels`.
        """
        if isinstance(image, (str, os.PathLike)):
            image = load_image(image)
        return EncodedImage(self.preprocess(image), image_size(image), self.tokens_of(image))

    def preprocess(self, image: Any) -> Tensor:
        """One image as the vision towers take it, float32 [m, C, H, W], normalised; m is 1 without tiling.

        See `pyvlm.models.images.to_pixels` and, with tiling, `pyvlm.models.tiling.cut_image`.
        """
        config = self.config.image
        if self.config.tiling is None:
            padding = config.mean if config.fit == "pad" else None
            pixels_mCHW = to_pixels(image, config.channels, config.size, padding)[None]
        else:
            pixels_mCHW = cut_image(image, self.config.tiling, config)
        mean, std = (torch.tensor(x)[:, None, None] for x in (config.mean, config.std))
        return (pixels_mCHW - mean) / std

    def _stack_images(self, images: Sequence[EncodedImage]) -> Sample:
        """The entries of a sample that its images make."""
        size, channels = self.config.image.size, self.config.image.channels
        none = torch.empty(0, channels, size, size)
        stacked = {"images": torch.cat([none, *(image.pixels for image in images)])}
        if self.config.tiling is not None:
            sizes = [image.size for image in images]
            stacked["image_sizes"] = torch.tensor(sizes, dtype=torch.int64).view(-1, 2)
        return stacked

    def collate(self, samples: Sequence[Sample], padding_side: str = "right") -> dict[str, Tensor | None]:
        """Samples of `encode` as one batch; pad on the left to generate.

        Returns:
            input_ids and labels int64 [B, L], attention_mask bool [B, L] (False: padding), and images
            float32 [N, C, H, W] in reading order, or None where there are none. With tiling, images
            [M, C, H, W] and image_sizes int64 [N, 2], both None where there are none. Where a sample is
            packed (`pyvlm.data.packing`), also documents int32 [B, L], -1 for padding.

        Raises:
            ValueError: no samples, or an unknown side.
        """
        if not samples:
            raise ValueError("a batch needs at least one sample")
        if padding_side not in ("left", "right"):
            raise ValueError(f'padding_side must be "left" or "right", got {padding_side!r}')
        real = [torch.ones_like(sample["input_ids"], dtype=torch.bool) for sample in samples]

        def pad(rows: list[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side)

        of_images = ["images", *(["image_sizes"] if self.config.tiling is not None else [])]
        joined = {name: torch.cat([sample[name] for sample in samples]) for name in of_images}
        batch = {
            "input_ids": pad([sample["input_ids"] for sample in samples], self.pad_token_id),
            "labels": pad([sample["labels"] for sample in samples], IGNORED),
            "attention_mask": pad(real, False),
            **{name: tensor if len(tensor) else None for name, tensor in joined.items()},
        }
        if any("documents" in sample for sample in samples):
            alone = [torch.zeros(len(row), dtype=torch.int32) for row in real]
            rows = [sample.get("documents", row) for sample, row in zip(samples, alone, strict=True)]
            batch["documents"] = pad(rows, -1)
        return batch

    def decode(self, token_ids: Tensor | Sequence[int]) -> str:
        """The text of token ids up to the first end token, special tokens left out."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        if self.end_token_id in ids:
            ids = ids[: ids.index(self.end_token_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text` that the vocabulary lacks, in order."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        offsets = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[start:stop] for i, (start, stop) in offsets if i == self.unknown_token_id]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and processor.json into `folder`, each aside first and then renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True).encode())
        write_file(folder / "processor.json", self.config.model_dump_json(indent=2).encode())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "Processor":
        """Reads what `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or broken; the message names it.
        """
        folder = find_folder(folder)
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_str(read_file(path).decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer ({error})") from error
        return cls(tokenizer, read_config(folder / "processor.json", ProcessorConfig))

"""Messages in, token ids, labels and pixels out: the tokenizer, the chat template, the image preprocessing.

Shapes: B batch, L tokens, n images of a sample, N images of a batch, C channels, H = W image size.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from pyvlm.models.chat_template import ChatTemplate, shipped_templates
from pyvlm.models.checkpoint import find_folder, read_config, write_file
from pyvlm.models.images import fit_image, image_size, load_image
from pyvlm.models.pretrained_tokenizer import read_pretrained_tokenizer, read_tokenizer
from pyvlm.models.tiling import TilingConfig, cut_image
from pyvlm.models.tower_config import Config, ImageConfig, Size
from pyvlm.models.turns import DialogueTemplate, PlainCaption, RoleTokens, Template, Turn

IGNORED = -100
Form = Literal["dialogue", "plain"]
Message = Mapping[str, Any]
Sample = dict[str, Tensor]


class EncodedImage(NamedTuple):
    """The pixels of one image [m, C, H, W], its (height, width) before them, and its placeholders."""

    pixels: Tensor
    size: tuple[int, int]
    num_tokens: int


class ProcessorConfig(Config):
    """What `processor.json` holds.

    With `template` "role_tokens" a turn is its role's token, its content, and `end_token`. With "chat" it is
    what the Jinja template `chat_template` writes, to which `special_tokens` are given by name; the role and
    end tokens are then the template's and not read here.

    Images stand between the tokens `image_start` and `image_end` where these are given, and behind
    `image_words`, ordinary text in which {n} is the image's number in the dialogue ("Image {n}: ").

    With `form` "plain" a sample is no dialogue but an image and its caption: see `PlainCaption`.
    """

    image: ImageConfig
    tiling: TilingConfig | None = None  # with it, tokens_per_image are those of a tile
    tokens_per_image: Size
    template: Literal["role_tokens", "chat"] = "role_tokens"
    form: Form = "dialogue"
    chat_template: str | None = None
    special_tokens: dict[str, str] = Field(default_factory=dict)
    image_token: str = "<image>"
    image_start: str | None = None
    image_end: str | None = None
    image_words: str | None = None
    user_token: str = "<user>"
    assistant_token: str = "<assistant>"
    end_token: str = "<end>"
    pad_token: str = "<pad>"
    unknown_token: str | None = "<unk>"

    @property
    def template_tokens(self) -> list[str]:
        """The tokens that only the template may write: text that holds one would break it."""
        roles = [self.user_token, self.assistant_token, self.end_token]
        names = [self.image_token, *(roles if self.template == "role_tokens" else []), self.pad_token]
        return names + [name for name in (self.image_start, self.image_end) if name is not None]

    @model_validator(mode="after")
    def _tiles_are_square(self) -> "ProcessorConfig":
        if self.tiling is not None:
            self.tiling.check(self.image.size, self.tokens_per_image)
        return self

    @model_validator(mode="after")
    def _has_its_template(self) -> "ProcessorConfig":
        if (self.template == "chat") != (self.chat_template is not None):
            raise ValueError('chat_template goes with template "chat", and only with it')
        return self


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

    A message is `{"role": "system" | "user" | "assistant", "content": ...}`, its content a string or a list
    of parts `{"type": "text", "text": str}` and `{"type": "image", "image": path | PIL image | array}`. Role
    tokens know no system. Each image becomes `tokens_of(image)` placeholders where it stands.

    Args:
        tokenizer: any tokenizer of the `tokenizers` library that knows the special tokens of `config`. A chat
            template takes its post-processor away: see `ChatTemplate`.
        config: image preprocessing and template.

    Raises:
        ValueError: the tokenizer lacks a special token, or the chat template cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, config: ProcessorConfig) -> None:
        unknown = [] if config.unknown_token is None else [config.unknown_token]
        names = [*config.template_tokens, *unknown]
        ids = {name: i for name in names if (i := tokenizer.token_to_id(name)) is not None}
        if missing := [name for name in names if name not in ids]:
            raise ValueError(
                f"the tokenizer lacks the special tokens {missing}: add them or name others in the config"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.image_token_id = ids[config.image_token]
        self.pad_token_id = ids[config.pad_token]
        self.unknown_token_id = ids[config.unknown_token] if config.unknown_token else None
        self._around_image = [
            [] if name is None else [ids[name]] for name in (config.image_start, config.image_end)
        ]
        dialogues: DialogueTemplate
        if config.chat_template is not None:
            dialogues = ChatTemplate(
                config.chat_template, tokenizer, config.special_tokens, config.image_token
            )
        else:
            dialogues = RoleTokens(
                tokenizer,
                {"user": ids[config.user_token], "assistant": ids[config.assistant_token]},
                ids[config.end_token],
                self.image_token_id,
                {ids[name]: name for name in config.template_tokens},
            )
        self._template: Template = dialogues
        if config.form == "plain":
            self._template = PlainCaption(dialogues, self.image_token_id)

    def changed(self, **changes: Any) -> "Processor":
        """The same tokenizer with other entries of the config, such as `form` or `image`.

        Raises:
            ValueError: they do not go together.
        """
        config = ProcessorConfig.model_validate(dict(self.config) | changes)
        return self if config == self.config else Processor(self.tokenizer, config)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return 1 + int(max(self.tokenizer.get_vocab().values()))

    @property
    def end_token_id(self) -> int:
        """The token that ends the assistant's turn."""
        return self._template.end_token_id

    @property
    def takes_parts(self) -> bool:
        """Whether there is a chat template that takes contents as lists of parts, and not as texts."""
        return isinstance(self._template, ChatTemplate) and self._template.takes_parts

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Sample:
        """One dialogue as tensors.

        Args:
            messages: the dialogue so far.
            add_generation_prompt: append what opens the assistant's turn.

        Returns:
            input_ids int64 [L]; labels int64 [L], aligned with them: the assistant's words and end tokens,
            and −100 elsewhere; images float32 [n, C, H, W], normalised. With tiling, images [m, C, H, W] are
            image by image the base view and the tiles, and image_sizes int64 [n, 2] their (height, width)
            before they were cut.

        Raises:
            ValueError: an unknown role or part, text with a template token, a bad image, or a dialogue that
                the chat template refuses.
        """
        turns, given = self._turns(messages)
        images: list[EncodedImage] = []
        for number, (owner, image) in enumerate(given, start=1):
            try:
                images.append(self.encode_image(image))
            except (ValueError, TypeError) as error:
                raise ValueError(f"message {owner}, image {number}: {error}") from error
        written = self._template.write(turns, add_generation_prompt)
        sizes = iter([image.num_tokens for image in images])
        ids: list[int] = []
        labels: list[int] = []
        for token_id, learnt in zip(*written, strict=True):
            if token_id == self.image_token_id:
                start, stop = self._around_image
                expanded = [*start, *[token_id] * next(sizes), *stop]
                ids += expanded
                labels += [IGNORED] * len(expanded)
            else:
                ids.append(token_id)
                labels.append(token_id if learnt else IGNORED)
        return {
            "input_ids": torch.tensor(ids, dtype=torch.int64),
            "labels": torch.tensor(labels, dtype=torch.int64),
            **self._stack_images(images),
        }

    def length(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> int:
        """The L of `encode`, without preprocessing images: for grouping and packing by length.

        Raises:
            ValueError: as `encode` does, but for what is wrong with an image.
        """
        turns, images = self._turns(messages)
        written = self._template.write(turns, add_generation_prompt)
        around = sum(map(len, self._around_image)) - 1  # the one placeholder that stood for all
        return len(written.ids) + sum(self.tokens_of(image) + around for _, image in images)

    def tokens_of(self, image: Any) -> int:
        """Placeholders that an image takes, `image_start` and `image_end` not counted.

        Without tiling all take as many; with it, the image's size is read.
        """
        config = self.config
        if config.tiling is None:
            return config.tokens_per_image
        return config.tiling.num_tokens(image_size(image), config.image.size, config.tokens_per_image)

    def _turns(self, messages: Sequence[Message]) -> tuple[list[Turn], list[tuple[int, Any]]]:
        """Messages as turns, and their images, each with the number of its message."""
        turns = []
        images: list[tuple[int, Any]] = []
        for number, message in enumerate(messages):
            if (role := message.get("role")) not in self._template.roles:
                *others, last = (f'"{name}"' for name in self._template.roles)
                raise ValueError(
                    f"message {number}: the role must be {', '.join(others)} or {last}, got {role!r}"
                )
            content = message.get("content")
            given = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(given, Sequence):
                raise ValueError(
                    f"message {number}: content must be a string or a list of parts, got {content!r}"
                )
            parts: list[str | None] = []
            for part in given:
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind == "text" and isinstance(part.get("text"), str):
                    parts.append(part["text"])
                elif kind == "image" and "image" in part:
                    images.append((number, part["image"]))
                    if self.config.image_words is not None:
                        parts.append(self.config.image_words.replace("{n}", str(len(images))))
                    parts.append(None)
                else:
                    raise ValueError(
                        f'message {number}: a part must be {{"type": "text", "text": str}} or '
                        f'{{"type": "image", "image": ...}}, got {part!r}'
                    )
            turns.append(Turn(role, tuple(parts)))
        return turns, images

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

        See `pyvlm.models.images.fit_image` and, with tiling, `pyvlm.models.tiling.cut_image`.
        """
        config = self.config.image
        if self.config.tiling is None:
            pixels_mCHW = fit_image(image, config)[None]
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
        """The words of `text` that the vocabulary lacks, in order; none of bytes."""
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
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        return cls(tokenizer, read_config(folder / "processor.json", ProcessorConfig))

    @classmethod
    def from_transformers(
        cls,
        folder: str | os.PathLike[str],
        image: ImageConfig,
        tokens_per_image: int,
        *,
        tiling: TilingConfig | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_start: str | None = None,
        image_end: str | None = None,
        image_words: str | None = None,
    ) -> "Processor":
        """The tokenizer and the chat template of a language model that transformers saved.

        Args:
            folder: a local folder with tokenizer.json; no code in it is run.
            image, tokens_per_image, tiling, image_words: as in `ProcessorConfig`.
            chat_template: in place of the folder's: Jinja text, or the name of one that pyvlm ships.
            image_token, image_start, image_end: added to the tokenizer where it lacks them, so that their ids
                may lie outside the language model's embedding: `vocab_size` tells.

        Raises:
            ValueError: no fast tokenizer, no chat template or an unknown name, no token that could pad, or a
                template that cannot be used: see `ChatTemplate`.
        """
        tokenizer, special_tokens, template = read_pretrained_tokenizer(folder)
        if chat_template is not None and "{" not in chat_template:
            if chat_template not in shipped_templates():
                raise ValueError(
                    f"there is no chat template {chat_template!r}: give Jinja text or one of "
                    f"{', '.join(shipped_templates())}"
                )
            chat_template = shipped_templates()[chat_template]
        if (template := chat_template or template) is None:
            raise ValueError(
                f"{folder}: the tokenizer has no chat template; give one, as text or by name: "
                f"{', '.join(shipped_templates())}"
            )
        pad_token = special_tokens.get("pad_token", special_tokens.get("eos_token"))
        if pad_token is None:
            raise ValueError(f"{folder}: tokenizer_config.json names neither a pad_token nor an eos_token")
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        wanted = [name for name in (image_token, image_start, image_end) if name is not None]
        tokenizer.add_special_tokens([name for name in wanted if name not in added])
        config = ProcessorConfig(
            image=image,
            tiling=tiling,
            tokens_per_image=tokens_per_image,
            template="chat",
            chat_template=template,
            special_tokens=special_tokens,
            image_token=image_token,
            image_start=image_start,
            image_end=image_end,
            image_words=image_words,
            pad_token=pad_token,
            unknown_token=special_tokens.get("unk_token"),
        )
        return cls(tokenizer, config)

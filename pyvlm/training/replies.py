"""What the model answers: to many conversations at once, or to one that goes on round by round."""

import os
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from pyvlm.models.generation import outlasts_its_prompt
from pyvlm.models.inputs import to_device
from pyvlm.models.processor import Processor, Sample
from pyvlm.models.speaker import Interrupted, Messages, Sampling
from pyvlm.models.streaming import TextStream
from pyvlm.models.vlm import VLM
from pyvlm.nn.attention import KeyValueCache
from pyvlm.training.pictures import read_picture

MAX_ANSWER_TOKENS = 48  # of a dialogue about digits: five words an image, of up to nine, and some more
PER_TOKEN = ("input_ids", "labels")  # what else a sample holds has entries for its images


def reply(
    model: VLM,
    processor: Processor,
    conversations: Sequence[Messages],
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> list[str]:
    """The model's greedy answers to conversations that end with a question."""
    samples = [processor.encode(messages, add_generation_prompt=True) for messages in conversations]
    return reply_to_samples(model, processor, samples, max_new_tokens)


def reply_to_samples(
    model: VLM, processor: Processor, samples: Sequence[Sample], max_new_tokens: int
) -> list[str]:
    """As `reply`, of conversations that `Processor.encode` has encoded."""
    inputs = _inputs(model, processor, samples)
    tokens_BN = model.generate(**inputs, max_new_tokens=max_new_tokens, eos_token_id=processor.end_token_id)
    return [processor.decode(row) for row in tokens_BN]


class VLMSpeaker:
    """A model of pyvlm that answers conversations, one of them round by round: see `pyvlm.models.speaker`.

    Keys and values of a round's tokens serve the next round, as far as its tokens and images are the same, so
    that an image is encoded once. The answers are those of computing everything again.

    Attributes:
        total_tokens, computed_tokens: of the last round, how many tokens its prompt and its answer have, and
            how many of the prompt had to be computed.
    """

    def __init__(self, model: VLM, processor: Processor, sampling: Sampling) -> None:
        self.model, self.processor, self.sampling = model, processor, sampling
        self.total_tokens = self.computed_tokens = 0
        device = next(model.parameters()).device
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._cache: list[KeyValueCache] | None = None
        self._held: list[int] = []  # the tokens in the cache
        self._sample: Sample = {}  # the prompt of the round before

    @property
    def max_length(self) -> int | None:
        return self.model.config.language.max_length

    @property
    def numbers_images(self) -> bool:
        """Role tokens are of models trained here, on pictures that are introduced by their number in the
        conversation; other templates, and `image_words`, say all that is to be said."""
        config = self.processor.config
        return config.template == "role_tokens" and config.image_words is None

    def read_picture(self, path: str | os.PathLike[str]) -> tuple[Any, bool]:
        """Models of grey images are models of strokes and take it as `read_strokes` reads it."""
        return read_picture(path, self.processor.config.image)

    def unknown_words(self, text: str) -> list[str]:
        return self.processor.unknown_words(text)

    def encode(self, messages: Messages) -> Sample:
        return self.processor.encode(messages, add_generation_prompt=True)

    def reply(self, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
        return reply_to_samples(self.model, self.processor, samples, max_new_tokens)

    def answer(self, messages: Messages, write: Callable[[str], None] | None = None) -> str:
        sample = self.encode(messages)
        prompt = sample["input_ids"].tolist()
        reused, room = self._reusable(sample), len(prompt) + self.sampling.max_new_tokens
        if reused and self._cache is not None:
            cache = [layer.first(reused, room) for layer in self._cache]
            seen = {name: len(old) for name, old in self._sample.items() if name not in PER_TOKEN}
            new = {name: tensor[seen.get(name, 0) :] for name, tensor in sample.items()}
        else:
            cache, new = self.model.new_cache(room), sample
        self.computed_tokens = len(prompt) - reused
        self._cache = None  # what an interruption leaves of it is of no use

        tokens: list[int] = []
        stream = TextStream(self.processor.tokenizer, [self.processor.end_token_id])

        def hear(token_B: Tensor) -> None:
            tokens.append(int(token_B))
            piece = stream.push(tokens[-1])
            if piece and write is not None:
                write(piece)

        try:
            self.model.generate(
                **_inputs(self.model, self.processor, [new]),
                max_new_tokens=self.sampling.max_new_tokens,
                eos_token_id=self.processor.end_token_id,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                generator=self._generator,
                callback=hear,
                cache=cache,
            )
        except KeyboardInterrupt:
            raise Interrupted(self.processor.decode(tokens)) from None
        self._cache, self._held, self._sample = cache, [*prompt, *tokens[:-1]], sample
        self.total_tokens = len(prompt) + len(tokens)
        rest = stream.flush()
        if rest and write is not None:
            write(rest)
        return self.processor.decode(tokens)

    def _reusable(self, sample: Sample) -> int:
        """How many of the cached tokens begin the prompt of `sample`; 0 where they are of no use to it."""
        if self._cache is None or not outlasts_its_prompt(self.model.config):
            return 0
        prompt = sample["input_ids"].tolist()
        pairs = zip(prompt, self._held, strict=False)
        common = min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)), len(prompt) - 1)
        same_images = all(
            torch.equal(tensor[: len(self._sample[name])], self._sample[name])
            for name, tensor in sample.items()
            if name not in PER_TOKEN
        )
        # Where not even the old prompt is whole, the cut could go through an image.
        return common if same_images and common >= len(self._sample["input_ids"]) else 0


def _inputs(model: VLM, processor: Processor, samples: Sequence[Sample]) -> dict[str, Any]:
    """The arguments of `VLM.generate`, on the model's device."""
    batch = processor.collate(samples, padding_side="left")
    del batch["labels"]
    return to_device(batch, next(model.parameters()).device)

"""Checkpoints of transformers in `pyvlm chat` and `pyvlm eval`."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from pyvlm.models.images import load_image, to_picture
from pyvlm.models.speaker import Interrupted, Messages, Sampling
from pyvlm.models.streaming import TextStream
from pyvlm.models.turns import reserved_token_error


class Prompt(NamedTuple):
    """A conversation as the checkpoint's chat template writes it, and its pictures in their order."""

    text: str
    images: list[Image.Image]


class CheckpointSpeaker:
    """A vision-language model of transformers that answers conversations: see `pyvlm.models.speaker`.

    Its chat template writes them, its processor takes the pictures, and its `generate` answers. Settings of
    its generation_config.json hold but for those of `sampling`. Each round is computed from the start.

    Args:
        model, processor: see `pyvlm.integrations.transformers.checkpoints.load_checkpoint`.
        sampling: how tokens are chosen.
    """

    numbers_images = False  # the chat template says all that is to be said

    def __init__(self, model: PreTrainedModel, processor: Any, sampling: Sampling) -> None:
        self.model, self.processor, self.sampling = model, processor, sampling
        self.total_tokens = 0
        self._answers = 0
        self._tokenizer = processor.tokenizer
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        named = [getattr(processor, name, None) for name in ("image_token", "video_token", "audio_token")]
        self._placeholders = [token for token in named if token]
        ends = model.generation_config.eos_token_id
        ends = self._tokenizer.eos_token_id if ends is None else ends
        self._ends: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else [*ends]

    @property
    def max_length(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def read_picture(self, path: str | os.PathLike[str]) -> tuple[Image.Image, bool]:
        return to_picture(load_image(path), channels=3), False

    def unknown_words(self, text: str) -> list[str]:
        return []  # their tokenizers spell what they do not know

    def encode(self, messages: Messages) -> Prompt:
        images: list[Image.Image] = []
        conversation = []
        for number, message in enumerate(messages):
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for token in self._placeholders:
                if any(token in part.get("text", "") for part in parts):
                    raise reserved_token_error(number, token)
            images += [to_picture(part["image"], channels=3) for part in parts if part["type"] == "image"]
            written = [{"type": "image"} if part["type"] == "image" else part for part in parts]
            conversation.append({"role": message["role"], "content": written})
        try:
            text = self.processor.apply_chat_template(conversation, add_generation_prompt=True)
        except Exception as error:  # a template can raise anything
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return Prompt(text, images)

    def reply(self, samples: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        inputs = self._inputs(samples)
        tokens_BL = self._generate(inputs, Sampling(max_new_tokens))
        texts = []
        for row in tokens_BL[:, inputs["input_ids"].shape[1] :].tolist():
            stream = TextStream(self._tokenizer, self._ends)
            texts.append("".join([*map(stream.push, row), stream.flush()]))
        return texts

    def answer(self, messages: Messages, write: Callable[[str], None] | None = None) -> str:
        inputs = self._inputs([self.encode(messages)])
        heard = _Pieces(TextStream(self._tokenizer, self._ends), write)
        try:
            # The seed's own numbers for every answer, and those of the process as they were.
            with torch.random.fork_rng():
                torch.manual_seed(self.sampling.seed + self._answers)
                tokens_BL = self._generate(inputs, self.sampling, streamer=heard)
        except KeyboardInterrupt:
            heard.end()
            raise Interrupted(heard.text) from None
        self._answers += 1
        self.total_tokens = tokens_BL.shape[1]
        return heard.text

    def _inputs(self, samples: Sequence[Prompt]) -> Any:
        """The arguments of `generate`, on the model's device."""
        texts, images = [prompt.text for prompt in samples], [prompt.images for prompt in samples]
        # As transformers does it: a template that leaves the first token to the tokenizer does not write it.
        starts = self._tokenizer.bos_token
        inputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            padding=len(texts) > 1,
            add_special_tokens=not (starts and texts[0].startswith(starts)),
            return_tensors="pt",
        )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _generate(self, inputs: Any, sampling: Sampling, **options: Any) -> Tensor:
        warm = sampling.temperature > 0
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if warm else {}
        plain = {"temperature": None, "top_p": None, "top_k": None}
        tokens_BL: Tensor = self.model.generate(  # type: ignore[operator]  # a mixin's
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=warm,
            num_beams=1,
            pad_token_id=self._tokenizer.pad_token_id,
            **(plain | chosen),
            **options,
        )
        return tokens_BL


class _Pieces(BaseStreamer):
    """Hands the text on piece by piece while `generate` runs; `text` is all of it so far."""

    def __init__(self, stream: TextStream, write: Callable[[str], None] | None) -> None:
        self.stream, self.write, self.text = stream, write, ""
        self._of_prompt = True

    def put(self, value: Tensor) -> None:
        if self._of_prompt:
            self._of_prompt = False
            return
        for token_id in value.flatten().tolist():
            self._hand_on(self.stream.push(token_id))

    def end(self) -> None:
        self._hand_on(self.stream.flush())

    def _hand_on(self, piece: str) -> None:
        self.text += piece
        if piece and self.write is not None:
            self.write(piece)

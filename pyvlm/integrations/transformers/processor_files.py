"""The processor of an exported model: tokenizer, chat template and image processor of transformers."""

import json
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from pyvlm.models.encoders import Channels
from pyvlm.models.pretrained_vlm import RESAMPLE
from pyvlm.models.processor import Processor

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Before a template that takes texts: makes texts of contents in parts, and writes what stands for an image.
_AS_TEXT = """
{%- set ns = namespace(images=0, text='', messages=[]) -%}
{%- for message in messages -%}
    {%- set ns.text = message['content'] if message['content'] is string else '' -%}
    {%- for part in (message['content'] if message['content'] is not string else []) -%}
        {%- if part['type'] == 'image' -%}
            {%- set ns.images = ns.images + 1 -%}
            {%- set ns.text = ns.text + WORDS + IMAGE -%}
        {%- else -%}
            {%- set ns.text = ns.text + (SPACE if ns.text else '') + part['text'] -%}
        {%- endif -%}
    {%- endfor -%}
    {%- set ns.messages = ns.messages + [{'role': message['role'], 'content': ns.text}] -%}
{%- endfor -%}
{%- set messages = ns.messages %}"""
# Before a template that takes parts: the words before each image become one.
_AS_PARTS = """
{%- set ns = namespace(images=0, parts=[], messages=[]) -%}
{%- for message in messages -%}
    {%- set is_text = message['content'] is string -%}
    {%- set ns.parts = [{'type': 'text', 'text': message['content']}] if is_text else [] -%}
    {%- for part in (message['content'] if message['content'] is not string else []) -%}
        {%- if part['type'] == 'image' -%}
            {%- set ns.images = ns.images + 1 -%}
            {%- set ns.parts = ns.parts + [{'type': 'text', 'text': WORDS}] -%}
        {%- endif -%}
        {%- set ns.parts = ns.parts + [part] -%}
    {%- endfor -%}
    {%- set ns.messages = ns.messages + [{'role': message['role'], 'content': ns.parts}] -%}
{%- endfor -%}
{%- set messages = ns.messages %}"""
_ROLE_TOKENS = """{% for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] -%}
        {{- raise_exception('the role must be "user" or "assistant"') -}}
    {%- endif -%}
    {{- (USER if message['role'] == 'user' else ASSISTANT) + message['content'] + END -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ASSISTANT -}}{%- endif -%}"""


def make_processor(processor: Processor, config: PreTrainedConfig, mean: Channels, std: Channels) -> Any:
    """The processor of transformers that writes and preprocesses as ours does.

    Args:
        processor: ours.
        config: of the exported model.
        mean, std: how its encoder wants pixels normalised; ours normalises them anew in the tower.
    """
    tiles, vision = processor.config.tiling is not None, config.vision_config
    kind = transformers.LlavaNextProcessor if tiles else transformers.LlavaProcessor
    strategy = config.vision_feature_select_strategy
    return kind(
        image_processor=_image_processor(processor, config, mean, std),
        tokenizer=_tokenizer(processor),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        image_token=processor.config.image_token,
        num_additional_image_tokens=int(strategy == "default"),  # the class token, which is then left out
        chat_template=chat_template(processor),
    )


def special_token_ids(processor: Processor) -> dict[str, int | None]:
    """Ids by the names that configurations of transformers have for them."""
    bos = processor.config.special_tokens.get("bos_token")
    return {
        "bos_token_id": None if bos is None else processor.tokenizer.token_to_id(bos),
        "eos_token_id": processor.end_token_id,
        "pad_token_id": processor.pad_token_id,
    }


def _tokenizer(processor: Processor) -> PreTrainedTokenizerFast:
    config = processor.config
    tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())
    tokenizer.post_processor = None  # the template alone writes special tokens
    named = dict(config.special_tokens)
    named.setdefault("eos_token", str(tokenizer.id_to_token(processor.end_token_id)))
    named["pad_token"] = config.pad_token
    if config.unknown_token is not None:
        named["unk_token"] = config.unknown_token
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": config.image_token},
        **{name: token for name, token in named.items() if name in NAMES},
    )


def chat_template(processor: Processor) -> str:
    """A template that takes contents as transformers' processors do, in parts."""
    config = processor.config
    words = "''"
    if config.image_words is not None:
        words = f"{json.dumps(config.image_words)}|replace('{{n}}', ns.images|string)"
    if config.chat_template is None:
        source = _filled(_AS_TEXT, WORDS=words, IMAGE=config.image_token, SPACE=" ") + _filled(
            _ROLE_TOKENS, USER=config.user_token, ASSISTANT=config.assistant_token, END=config.end_token
        )
    elif not processor.takes_parts:
        prelude = _filled(_AS_TEXT, WORDS=words, IMAGE=config.image_token, SPACE="")
        source = prelude + config.chat_template
    elif config.image_words is not None:
        source = _filled(_AS_PARTS, WORDS=words) + config.chat_template
    else:
        source = config.chat_template
    around = (config.image_start or "") + config.image_token + (config.image_end or "")
    if around == config.image_token:
        return source
    image = json.dumps(config.image_token)
    return (
        "{%- set written -%}" + source + "{%- endset -%}"
        "{{- written|replace(" + image + ", " + json.dumps(around) + ") -}}"
    )


def _filled(template: str, **names: str) -> str:
    """The template with texts, as Jinja writes them, in place of names; that of WORDS is Jinja already."""
    for name, value in names.items():
        template = template.replace(name, value if name == "WORDS" else json.dumps(value))
    return template.lstrip("\n")


def _image_processor(processor: Processor, config: PreTrainedConfig, mean: Channels, std: Channels) -> Any:
    image, tiling = processor.config.image, processor.config.tiling
    resample = tiling.resample if tiling is not None else image.resample or "bilinear"
    side = config.vision_config.image_size
    given: dict[str, Any] = {
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": next(number for number, name in RESAMPLE.items() if name == resample),
    }
    square = {"height": side, "width": side}
    cropped: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": square}
    if tiling is not None:
        pinpoints = [list(canvas) for canvas in tiling.grid_pinpoints]
        return transformers.LlavaNextImageProcessorPil(**given, **cropped, image_grid_pinpoints=pinpoints)
    if image.fit == "pad":
        return transformers.LlavaImageProcessorPil(**given, **cropped, do_pad=True)
    if image.fit == "crop":
        return transformers.CLIPImageProcessorPil(**given, **cropped)
    return transformers.SiglipImageProcessorPil(**given, size=square)


def check_same_tokens(ours: Processor, theirs: Any) -> None:
    """Raises ValueError where a dialogue of two rounds becomes other tokens there than here."""
    side = ours.config.image.size
    image: dict[str, Any] = {"type": "image", "image": Image.new("RGB", (side, side))}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [_text("Here, one:"), image, _text("and what is this?")]},
        {"role": "assistant", "content": [_text("It is one.")]},
        {"role": "user", "content": [image, _text("Is it 1?")]},
    ]
    expected = ours.encode(messages, add_generation_prompt=True)["input_ids"]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True)
    given = theirs(text=[text], images=[[image["image"]] * 2], add_special_tokens=False, return_tensors="pt")[
        "input_ids"
    ][0]
    if not torch.equal(expected, given):
        written, learnt = (
            ours.tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in (given, expected)
        )
        raise ValueError(
            f"the chat template cannot be exported: transformers' processor would write {written!r} where "
            f"the model was trained on {learnt!r}"
        )


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}

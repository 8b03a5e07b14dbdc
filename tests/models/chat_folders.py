"""Public chat templates, and tokenizer folders as transformers saves them, without the vocabularies."""

# ruff: noqa: E501 (templates as they are published)

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from pyvlm.models.chat_template import shipped_templates

CORPUS = [
    "What is in image 1, and what is in the other image? It is a small white cat on the table.",
    "USER: ASSISTANT: system user assistant model [INST] [/INST] You are a helpful assistant.\n\nIt is so.",
]


@dataclass(frozen=True)
class Family:
    """`ending` is what an answer ends with, `swallows` a role token that takes the newline behind it."""

    template: str
    ending: str
    tokens: tuple[str, ...]
    bos: str = "<s>"
    eos: str = "</s>"
    system: bool = True
    trims: bool = False
    sentencepiece: bool = False
    swallows: tuple[str, ...] = field(default=())


LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 "
    "%}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Chat markup with the answers marked, newlines and indentation left to the environment.
MARKED = """{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# As those of models with images: content is a list, and the template writes what stands for an image.
LISTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' or 'image' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")
IM_FAMILY = {"tokens": IM, "bos": "<|endoftext|>", "eos": "<|im_end|>"}

FAMILIES = {
    "vicuna": Family(shipped_templates()["vicuna"], "</s>", (), sentencepiece=True),
    "llama-2": Family(shipped_templates()["llama-2"], " </s>", (), sentencepiece=True, trims=True),
    "llama-3": Family(
        LLAMA_3,
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        trims=True,
    ),
    "chatml": Family(shipped_templates()["chatml"], "<|im_end|>", **IM_FAMILY),
    "qwen-2": Family(QWEN_2, "<|im_end|>", **IM_FAMILY),
    "mistral": Family(MISTRAL, "</s>", (), sentencepiece=True, system=False),
    "phi-3": Family(
        PHI_3,
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        sentencepiece=True,
        swallows=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "gemma": Family(
        GEMMA,
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        system=False,
        trims=True,
    ),
    "marked": Family(MARKED, "<|im_end|>", **IM_FAMILY),
}


@cache
def _trained(special: tuple[str, ...], sentencepiece: bool, swallows: tuple[str, ...]) -> str:
    if sentencepiece:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ("<unk>", *special)
        extra = [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        extra, alphabet = [], pre_tokenizers.ByteLevel.alphabet()
    # Without a splitter the sentencepiece kind would learn whole sentences by heart.
    texts = [word for text in CORPUS for word in text.split()] if sentencepiece else CORPUS
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*special, *extra], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token | {"rstrip": token["content"] in swallows}
        for token in content["added_tokens"]
        if token["content"] in special
    ]
    return json.dumps(content)


def family_tokenizer(family: Family) -> Tokenizer:
    """A small tokenizer of the family's kind, with its special tokens."""
    special = tuple(dict.fromkeys((family.bos, family.eos, *family.tokens)))
    return Tokenizer.from_str(_trained(special, family.sentencepiece, family.swallows))


def write_folder(folder: Path, family: Family, added: tuple[str, ...] = ()) -> Path:
    """A tokenizer folder of the family; `added` are further special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = family_tokenizer(family)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.bos,
        "eos_token": {"content": family.eos, "__type": "AddedToken"},
        "chat_template": family.template,
        **({"unk_token": "<unk>"} if family.sentencepiece else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

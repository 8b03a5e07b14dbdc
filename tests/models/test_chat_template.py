"""Chat templates write what transformers writes, and only the assistant's words are learnt."""

import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from chat_folders import FAMILIES, LISTS, MARKED, Family, family_tokenizer, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pyvlm.models import ImageConfig, Processor
from pyvlm.models.chat_template import ChatTemplate, shipped_templates
from pyvlm.models.processor import IGNORED
from pyvlm.models.turns import Turn

IMAGE = np.zeros((4, 4), dtype=np.uint8)
LIST_FAMILY = replace(
    FAMILIES["chatml"],
    template=LISTS,
    tokens=(*FAMILIES["chatml"].tokens, "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
)
# Words of the templates themselves among them, and characters of several bytes.
PIECES = [
    "It",
    " is",
    "\n",
    " ",
    "USER: ",
    "ASSISTANT:",
    "[/INST]",
    "assistant\n",
    "é",
    "你",
    "😀",
    "(",
    ":",
    ".",
]
texts = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
questions = texts.filter(str.strip)  # a template that trims system and question together takes no blank one


@cache
def pair(name: str) -> tuple[Processor, PreTrainedTokenizerFast]:
    """Ours and transformers', of one folder."""
    with TemporaryDirectory() as folder:
        path = write_folder(Path(folder) / name, FAMILIES[name], added=("<image>",))
        ours = Processor.from_transformers(path, ImageConfig(size=4, channels=1), tokens_per_image=1)
        return ours, PreTrainedTokenizerFast.from_pretrained(path)


@st.composite
def dialogues(draw: st.DrawFn, system: bool) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": draw(questions)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(questions)})
        messages.append({"role": "assistant", "content": draw(texts)})
    return messages if draw(st.booleans()) else messages[:-1]


def learnt_runs(sample: dict[str, Any]) -> list[list[int]]:
    """The ids of each unbroken run of labels."""
    runs: list[list[int]] = [[]]
    for label in sample["labels"].tolist():
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_ids_are_those_of_transformers_and_labels_the_answers(name: str, data: st.DataObject) -> None:
    family, (processor, theirs) = FAMILIES[name], pair(name)
    messages = data.draw(dialogues(family.system))
    prompt = messages[-1]["role"] == "user"
    sample = processor.encode(messages, add_generation_prompt=prompt)
    expected = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt)["input_ids"]
    assert sample["input_ids"].tolist() == expected
    assert processor.length(messages, add_generation_prompt=prompt) == len(expected)
    learnt = sample["labels"] != IGNORED
    assert sample["labels"][learnt].tolist() == sample["input_ids"][learnt].tolist()
    # A token may cover the space before an answer as well, and role tokens may swallow one: compare without.
    runs = [processor.tokenizer.decode(run, skip_special_tokens=False) for run in learnt_runs(sample)]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    wanted = [(a.strip() if family.trims else a) + family.ending for a in answers]
    assert [run.lstrip() for run in runs] == [text.lstrip() for text in wanted]


@pytest.mark.parametrize("content", ["It is white.", "éé", "(yes)"])
@pytest.mark.parametrize("name", FAMILIES)
def test_learning_starts_where_the_prompt_ends(name: str, content: str) -> None:
    processor, _ = pair(name)
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": content}]
    prompt = processor.encode(messages[:1], add_generation_prompt=True)["input_ids"].tolist()
    sample = processor.encode(messages)
    assert sample["input_ids"].tolist()[: len(prompt)] == prompt
    assert sample["labels"].tolist()[: len(prompt)] == [IGNORED] * len(prompt)
    assert learnt_runs(sample) == [[i for i in sample["labels"].tolist()[len(prompt) :] if i != IGNORED]]
    assert sample["labels"][len(prompt)] != IGNORED
    assert processor.decode(sample["input_ids"][len(prompt) :]).strip() == content
    assert learnt_runs(sample)[0][-1] == processor.end_token_id


def test_a_space_of_the_prompt_is_not_learnt(tmp_path: Path) -> None:
    """The tokenizer's post-processor would put the lone space at the answer's place."""
    template = "{% for m in messages %}{{ 'A: ' + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    folder = write_folder(tmp_path, replace(FAMILIES["chatml"], template=template))
    processor = Processor.from_transformers(folder, ImageConfig(size=4), 1)
    sample = processor.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}])
    assert processor.tokenizer.decode(learnt_runs(sample)[0], skip_special_tokens=False) == "é<|im_end|>"


def test_generation_marks_are_those_of_transformers() -> None:
    processor, theirs = pair("marked")
    messages = [
        {"role": role, "content": text}
        for role, text in [("user", "a\n"), ("assistant", "é 你 "), ("user", "a"), ("assistant", "It is.")]
    ]
    mask = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)["assistant_masks"]
    assert (processor.encode(messages)["labels"] != IGNORED).int().tolist() == mask
    assert sum(mask) > 8


def test_what_is_marked_is_learnt_to_the_letter(tmp_path: Path) -> None:
    """A template may mark the newline behind its end token too."""
    template = MARKED.replace("'<|im_end|>' }}", "'<|im_end|>\\n' }}").replace("{{- '\n' }}", "")
    folder = write_folder(tmp_path, replace(FAMILIES["marked"], template=template))
    processor = Processor.from_transformers(folder, ImageConfig(size=4), 1)
    sample = processor.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "It"}])
    assert processor.tokenizer.decode(learnt_runs(sample)[0], skip_special_tokens=False) == "It<|im_end|>\n"


def test_no_space_is_learnt_that_is_not_marked(tmp_path: Path) -> None:
    header = "assistant\n' }}"
    template = MARKED.replace(header, "assistant: ' }}", 1).replace(header, "assistant:' }}")
    folder = write_folder(tmp_path, replace(FAMILIES["marked"], template=template))
    processor = Processor.from_transformers(folder, ImageConfig(size=4), 1)
    sample = processor.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}])
    assert processor.tokenizer.decode(learnt_runs(sample)[0], skip_special_tokens=False) == "é<|im_end|>"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.system])
def test_a_system_message_is_refused_where_the_template_refuses_it(name: str) -> None:
    processor, _ = pair(name)
    with pytest.raises(ValueError, match=r"the chat template refuses the dialogue: .*[Rr]ole"):
        processor.encode([{"role": "system", "content": "be"}, {"role": "user", "content": "It"}])


def parts(*given: str | None) -> list[dict[str, Any]]:
    return [
        {"type": "image", "image": IMAGE} if part is None else {"type": "text", "text": part}
        for part in given
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_images_stand_in_strings(name: str) -> None:
    processor, theirs = pair(name)
    messages = [{"role": "user", "content": parts("in ", None, None, "\nWhat?")}]
    expected = [{"role": "user", "content": "in <image><image>\nWhat?"}]
    sample = processor.encode(messages)
    assert sample["input_ids"].tolist() == theirs.apply_chat_template(expected)["input_ids"]
    assert len(sample["images"]) == 2


def test_images_stand_in_lists(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LIST_FAMILY)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [
        {"role": "user", "content": parts("in ", None, "What?")},
        {"role": "assistant", "content": parts("It", None, " is")},
        {"role": "user", "content": parts(None)},
    ]
    processor = Processor.from_transformers(folder, ImageConfig(size=4), 1, image_token="<|image_pad|>")
    sample = processor.encode(messages)
    assert sample["input_ids"].tolist() == theirs.apply_chat_template(messages)["input_ids"]
    said = [processor.tokenizer.decode(run, skip_special_tokens=False) for run in learnt_runs(sample)]
    assert said == ["It<|vision_start|>", "<|vision_end|> is<|im_end|>"]
    three = Processor.from_transformers(folder, ImageConfig(size=4), 3, image_token="<|image_pad|>")
    ids = three.encode(messages)["input_ids"].tolist()
    assert ids.count(three.image_token_id) == 9
    assert three.length(messages) == len(ids) == len(sample["input_ids"]) + 6


@pytest.mark.parametrize("name", FAMILIES)
def test_text_never_becomes_a_control_token(name: str) -> None:
    processor, _ = pair(name)
    family = FAMILIES[name]
    for token in {family.bos, family.eos, *family.tokens, "<image>"}:
        for content in (f"It{token} is", parts(token[:3], token[3:]), parts(None, token)):
            with pytest.raises(ValueError, match="message 1: the text holds") as error:
                processor.encode(
                    [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
                )
            assert repr(token) in str(error.value)
    with pytest.raises(ValueError, match=r"message 0: the text holds U\+FDD0"):
        processor.encode([{"role": "user", "content": "\ufdd0"}])


def test_an_unknown_word_is_no_control_token() -> None:
    tokenizer = family_tokenizer(FAMILIES["mistral"])
    tokenizer.model.byte_fallback = False
    tokenizer.add_special_tokens(["<image>"])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate(FAMILIES["mistral"].template, tokenizer, special, "<image>")
    assert tokenizer.token_to_id("<unk>") in template.write([Turn("user", ("☃",))], True).ids
    with pytest.raises(ValueError, match="the text holds '<unk>'"):
        template.write([Turn("user", ("☃ <unk>",))], True)


ROUND = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ENDING }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ messages.foo.bar }}", "refuses the dialogue"),
        (ROUND.replace("ENDING", "'\\n'"), "could not learn to stop: give another template"),
        # What opens a turn must not pass for what ends the one before.
        ("{% for m in messages %}{{ '<|im_start|>' + m.content + '\\n' }}{% endfor %}", "learn to stop"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}", "learn to stop"),
        (ROUND.replace("ENDING", "m['content'] + eos_token"), "2 times, expected once"),
        ("{% for m in messages[1:] %}{{ m.content + eos_token }}{% endfor %}", "0 times, expected once"),
        ("{% for m in messages[::-1] %}{{ m.content + eos_token }}{% endfor %}", "in their order"),
        (
            MARKED.replace("'<|im_end|>' }}", "'' }}").replace("'\n' }}", "'<|im_end|>\n' }}"),
            "must hold every",
        ),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ dict.__init__.__globals__ }}", "unsafe"),
        ("{% set n = namespace(_x=1) %}", "cannot set '_x'"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
)
def test_templates_that_leave_doubt_are_refused(template: str, error: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, FAMILIES["chatml"])
    with pytest.raises(ValueError, match=error):
        Processor.from_transformers(folder, ImageConfig(size=4), 1, chat_template=template)


@pytest.mark.parametrize(
    ("change", "messages", "error"),
    [
        ("m.content | replace('It', 'Is')", ["a", "It"], "alters contents beyond trimming"),
        ("m.content[:2]", ["a", "It is"], "refuses the dialogue|expected once|alters contents"),
    ],
)
def test_a_content_that_the_template_alters_is_refused(
    change: str, messages: list[str], error: str, tmp_path: Path
) -> None:
    template = ROUND.replace("m['content']", f"({change})").replace("ENDING", "eos_token")
    folder = write_folder(tmp_path, FAMILIES["chatml"])
    with pytest.raises(ValueError, match=error):
        Processor.from_transformers(folder, ImageConfig(size=4), 1, chat_template=template).encode(
            [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), messages, strict=True)
            ]
        )


def test_a_template_that_drops_the_system_message_is_refused(tmp_path: Path) -> None:
    template = ROUND.replace("in messages", "in messages if m['role'] != 'system'").replace(
        "ENDING", "eos_token"
    )
    folder = write_folder(tmp_path, FAMILIES["chatml"])
    processor = Processor.from_transformers(folder, ImageConfig(size=4), 1, chat_template=template)
    with pytest.raises(ValueError, match="message 0: the chat template writes the content of this 'system'"):
        processor.encode([{"role": "system", "content": "be"}, {"role": "user", "content": "It"}])


def test_what_templates_may_call(tmp_path: Path) -> None:
    template = (
        "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}"
        "{% if n.i > 9 %}{% break %}{% endif %}"
        "{{ dict(a='<').a + strftime_now('%%') + (['<é'] | tojson) + m.content + eos_token }}"
        "{% endfor %}\n  {% if true %}\n {# nothing #}\nend\n  {% endif %}\n"
    )
    folder = write_folder(tmp_path, replace(FAMILIES["chatml"], template=template))
    processor = Processor.from_transformers(folder, ImageConfig(size=4), 1)
    messages = [{"role": "user", "content": "It"}]
    ids = processor.encode(messages)["input_ids"].tolist()
    assert ids == PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(messages)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == '<%["<é"]Itend\n'


def test_processors_go_to_other_processes() -> None:
    processor, _ = pair("gemma")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It"}]
    copied = pickle.loads(pickle.dumps(processor))
    assert copied.encode(messages)["labels"].tolist() == processor.encode(messages)["labels"].tolist()


def test_shipped_templates_are_named() -> None:
    assert sorted(shipped_templates()) == ["chatml", "llama-2", "vicuna"]


def test_vicuna_is_that_of_fastchat() -> None:
    _, theirs = pair("vicuna")
    messages = [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "It."},
        {"role": "user", "content": "So?"},
    ]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat? ASSISTANT: It.</s>USER: So? ASSISTANT:"
    )


def test_an_image_token_of_letters_is_refused() -> None:
    family: Family = FAMILIES["chatml"]
    special = {"bos_token": family.bos, "eos_token": family.eos}
    with pytest.raises(ValueError, match="would split the image token '<image>'"):
        ChatTemplate(family.template, family_tokenizer(family), special, "<image>")

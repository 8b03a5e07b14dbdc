"""Checkpoints of transformers in chat: what they answer is what transformers makes of it."""

import json
from pathlib import Path

import pytest
import torch
from llava_folders import IMAGES_FIRST, QUESTION, picture, save_llava, transformers

from pyvlm.integrations.transformers.chat import CheckpointSpeaker
from pyvlm.integrations.transformers.checkpoints import load_checkpoint, local_folder
from pyvlm.models.speaker import Interrupted, Sampling
from pyvlm.training.chat import Chat, load_speaker

TOKENS = 6
PAIRS = {
    "clip and llama": ("llama", "clip_vision_model"),
    "siglip and qwen2": ("qwen2", "siglip_vision_model"),
}


@pytest.fixture(scope="module", params=[*PAIRS, "tiles"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder, *PAIRS.get(request.param, ()), tiles=request.param == "tiles")
    return folder


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for seed, path in enumerate(paths):
        picture(30, 17, seed).save(path)
    return paths


def expected(folder: Path, messages: list) -> str:
    """By transformers' own way from messages to an answer."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_rounds_and_pictures_are_answered_as_by_transformers(folder, pictures):
    speaker = load_speaker(folder, sampling=Sampling(TOKENS))
    chat = Chat(speaker, pictures[:1], lambda line: None)
    images = [{"type": "image", "image": picture(30, 17, seed)} for seed in range(2)]
    text = {"type": "text", "text": QUESTION}
    messages = []
    for shown in (images[:1], images[1:], []):
        for path in pictures[1:] if shown == images[1:] else []:
            chat.add_image(path)
        messages.append({"role": "user", "content": [*shown, text]})
        pieces = []
        answer = chat.ask(QUESTION, pieces.append)
        assert answer == "".join(pieces) == expected(folder, messages)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    assert answer
    assert speaker.total_tokens > 3 * 9


@pytest.mark.parametrize("writes_it", [True, False])
def test_the_first_token_is_written_once(writes_it, tmp_path):
    """By the template, or by the tokenizer where the template leaves it out."""
    template = ("{{ bos_token }}" if writes_it else "") + IMAGES_FIRST
    save_llava(tmp_path, template=template)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    first, text = (
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    of_first = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text],
        "special_tokens": {"<|endoftext|>": of_first},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    speaker = load_speaker(tmp_path, sampling=Sampling(TOKENS))
    messages = [{"role": "user", "content": QUESTION}]
    ids = speaker._inputs([speaker.encode(messages)])["input_ids"][0].tolist()
    assert ids[0] == 0
    assert ids.count(0) == 1
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    assert speaker.answer(messages) == expected(tmp_path, parts)


def test_the_picture_counts(folder, pictures):
    answers = set()
    for path in pictures:
        chat = Chat(load_speaker(folder, sampling=Sampling(TOKENS)), [path], lambda line: None)
        answers.add(chat.ask(QUESTION))
    assert len(answers) == 2


def test_together_they_are_answered_as_alone(folder):
    speaker = load_speaker(folder)
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": picture(20, 20, i)}, *words]}]
        for i, words in enumerate(([{"type": "text", "text": QUESTION}], [{"type": "text", "text": "table"}]))
    ]
    samples = [speaker.encode(messages) for messages in conversations]
    alone = [speaker.reply([sample], TOKENS)[0] for sample in samples]
    assert speaker.reply(samples, TOKENS) == alone
    assert len(set(alone)) == 2


def test_draws_come_from_the_seed_alone(folder):
    model, processor = load_checkpoint(str(folder))
    messages = [{"role": "user", "content": QUESTION}]

    def answers(seed):
        speaker = CheckpointSpeaker(model, processor, Sampling(TOKENS, temperature=5.0, seed=seed))
        return [speaker.answer(messages) for _ in range(2)]

    before = torch.random.get_rng_state()
    first = answers(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == answers(1) != answers(2)
    assert first[0] != first[1]


def test_ctrl_c_keeps_what_was_said(folder, monkeypatch):
    chat = Chat(load_speaker(folder, sampling=Sampling(TOKENS)), [], lambda line: None)
    whole = chat.ask(QUESTION)
    chat.reset()
    pieces = []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stop:
        chat.ask(QUESTION, write)
    assert stop.value.text
    assert whole.startswith(stop.value.text)
    assert chat.messages[-1]["content"] == stop.value.text


def test_what_cannot_be_encoded_is_a_mistake_that_is_told(folder, tmp_path):
    chat = Chat(load_speaker(folder), [], lambda line: None)
    with pytest.raises(ValueError, match="no such file"):
        chat.add_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="the text holds '<image>'"):
        chat.ask("what is <image>?")
    assert chat.messages == []


def test_it_is_given_to_accelerate(folder, monkeypatch):
    given = []
    monkeypatch.setattr("pyvlm.integrations.transformers.accelerate", lambda m: given.append(m) or m)
    model, _ = load_checkpoint(str(folder))
    assert given == [model]
    assert not model.training


def change_config(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def test_code_of_a_checkpoint_is_refused_by_name(tmp_path):
    save_llava(tmp_path)
    (tmp_path / "modeling_odd.py").write_text("raise SystemExit('it ran')")
    code = {"AutoModelForImageTextToText": "modeling_odd.OddModel"}
    change_config(tmp_path, model_type="odd", auto_map=code)
    with pytest.raises(
        ValueError, match=r"model_type 'odd', and its own code \(modeling_odd.OddModel\) is not"
    ):
        load_speaker(tmp_path)
    # Where transformers has a class of its own, that one is taken.
    change_config(tmp_path, model_type="llava", auto_map=code)
    load_speaker(tmp_path)


def test_models_without_images_are_refused(tmp_path):
    change = {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match="model_type 'llama' is no vision-language model"):
        load_speaker(tmp_path)


def test_only_safetensors_are_read(tmp_path):
    model = save_llava(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot load it.*safetensors"):
        load_speaker(tmp_path)


def test_a_name_of_the_hub_without_a_network_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"nobody/nothing: there is no such folder.*Hugging Face hub.*network"
    ):
        load_speaker("nobody/nothing")


@pytest.mark.parametrize("path", ["nothing", "a/b/c", "no such/thing here", "runs/demo", "/nothing"])
def test_what_is_neither_a_folder_nor_a_name_is_not_looked_for(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # elsewhere there may be a demo's run
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=r"holds no model|no config.json there"):
        load_speaker(path)


def test_a_folder_beside_is_meant_as_a_folder(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="runs/typo holds no model"):
        load_speaker("runs/typo")
    with pytest.raises(ValueError, match=r"no config.json there"):
        local_folder("runs")

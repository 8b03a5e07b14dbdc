import json

import numpy as np
import pytest
import torch
from PIL import Image

from pyvlm.models.processor import Processor
from pyvlm.models.speaker import Interrupted, Sampling
from pyvlm.models.vlm import VLM
from pyvlm.training.chat import Chat, load_model
from pyvlm.training.conversation import answer, ask, open_conversation
from pyvlm.training.digits import load_split
from pyvlm.training.pictures import write_pictures
from pyvlm.training.replies import VLMSpeaker, reply
from pyvlm.training.samples import read_samples

TOKENS = 6


@pytest.fixture
def model(small_recipe):
    """A model and its processor, in float64 and with weights so large that its answers differ."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        recipe = small_recipe(model={"initializer_range": 0.5, **changes})
        return VLM(recipe.model).double(), recipe.processor()

    return make


@pytest.fixture
def paths(tmp_path):
    return write_pictures(list(load_split("test")[0][:4]), [f"{i}.png" for i in range(4)], tmp_path)


def chat_of(model_and_processor, paths=(), told=None, **options):
    tell = [].append if told is None else told.append
    sampling = options.pop("sampling", Sampling(max_new_tokens=TOKENS))
    return Chat(VLMSpeaker(*model_and_processor, sampling), paths, tell, **options)


def texts(message):
    return [part.get("text", "(picture)") for part in message["content"]]


@pytest.mark.parametrize(
    ("language", "reuses"),
    [
        ({}, True),
        ({"attention_rule": "causal"}, True),
        ({"attention_rule": "bidirectional_image"}, True),
        ({"attention_rule": "prefix"}, False),
        ({"moe": {"image_router": "token_choice", "eval_token_capacity_factor": 1.0}}, False),
    ],
)
def test_rounds_are_answered_as_if_all_were_computed_again(model, language, reuses):
    vlm, processor = model(language=language)
    speaker = VLMSpeaker(vlm, processor, Sampling(max_new_tokens=TOKENS))
    images = load_split("test")[0]
    conversation = open_conversation(list(images[:2]), "which digit is in image 1?")
    answers = []
    for further in ("how many images show a 3?", "what is the sum of images 1 and 2?", "which digit"):
        text = speaker.answer(conversation)
        assert text == reply(vlm, processor, [conversation], TOKENS)[0]
        answers.append(text)
        pictures = [{"type": "image", "image": images[len(answers) + 2]}] if len(answers) == 1 else []
        conversation = answer(conversation, text)
        conversation.append({"role": "user", "content": [*pictures, {"type": "text", "text": further}]})
        if len(answers) > 1:
            assert (speaker.computed_tokens < speaker.total_tokens - TOKENS - 8) == reuses
    assert len(set(answers)) > 1


def test_another_picture_in_the_same_place_is_seen(model):
    vlm, processor = model()
    speaker = VLMSpeaker(vlm, processor, Sampling(max_new_tokens=TOKENS))
    images, question = load_split("test")[0], "which digit is in image 1?"
    differs = []
    for one, other in zip(images[:6], images[6:12], strict=True):
        text = speaker.answer(open_conversation([one], question))
        same, changed = (ask(answer(open_conversation([i], question), text), question) for i in (one, other))
        expected = reply(vlm, processor, [changed, same], TOKENS)
        assert speaker.answer(changed) == expected[0]
        assert speaker.computed_tokens == speaker.total_tokens - TOKENS
        differs.append(expected[0] != expected[1])
    assert any(differs)


def test_answers_come_piece_by_piece(model, paths):
    chat, pieces = chat_of(model(), paths[:1]), []
    text = chat.ask("which digit is in image 1?", pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert chat.messages[-1] == {"role": "assistant", "content": text}


def test_sampling_is_that_of_the_seed(model):
    def answers(seed, **options):
        chat = chat_of(model(), sampling=Sampling(12, 3.0, seed=seed, **options))
        return [chat.ask("which digit") for _ in range(3)]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    greedy = chat_of(model(), sampling=Sampling(12))
    assert answers(1, top_p=1e-9) == [greedy.ask("which digit") for _ in range(3)]


def test_pictures_are_numbered_through_the_conversation(model, paths):
    chat = chat_of(model(), paths[:2])
    chat.ask("which digit is in image 1?")
    chat.ask("which digit is in image 2?")
    chat.add_image(paths[2])
    assert len(chat.pending) == 1
    chat.ask("which digit is in image 3?")
    asked = [message["content"] for message in chat.messages if message["role"] == "user"]
    opened = open_conversation(["", ""], "which digit is in image 1?")
    assert texts(chat.messages[0]) == texts(opened[0])  # as it was trained
    assert asked[1] == "which digit is in image 2?"
    assert texts(chat.messages[4]) == ["image 3:", "(picture)", "which digit is in image 3?"]
    chat.reset()
    assert (chat.messages, chat.pending) == ([], [])
    chat.add_image(paths[0])
    chat.ask("which digit")
    assert texts(chat.messages[0])[0] == "image 1:"


def test_pictures_are_introduced_only_where_the_processor_does_not(model, paths):
    vlm, processor = model()
    config = processor.config.model_copy(update={"image_words": "which image {n}"})
    chat = chat_of((vlm, Processor(processor.tokenizer, config)), paths[:1])
    chat.ask("which digit")
    assert texts(chat.messages[0]) == ["(picture)", "which digit"]


def test_chat_without_a_picture(model):
    chat = chat_of(model())
    assert chat.ask("what is the sum of 1 and 2?") == reply(*model(), [chat.messages[:1]], TOKENS)[0]


def test_what_was_said_before_an_interruption_stays(model, paths):
    vlm, processor = model()
    whole = chat_of((vlm, processor), paths[:1]).ask("which digit is in image 1?")
    chat, pieces = chat_of((vlm, processor), paths[:1]), []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        chat.ask("which digit is in image 1?", write)
    said = chat.messages[-1]["content"]
    assert whole.startswith(said)
    assert said == "".join(pieces)
    assert not chat.pending
    text = chat.ask("which digit")
    assert text == reply(vlm, processor, [chat.messages[:-1]], TOKENS)[0]


def test_a_question_without_an_answer_was_not_asked(model, paths, monkeypatch):
    vlm, processor = model()
    chat = chat_of((vlm, processor), paths[:1])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vlm, "image_features", interrupted)
        with pytest.raises(Interrupted):
            chat.ask("which digit is in image 1?")
    with pytest.raises(ValueError, match="<image>"):
        chat.ask("what is <image>?")
    assert (chat.messages, len(chat.pending)) == ([], 1)
    assert chat.ask("which digit is in image 1?") == chat_of((vlm, processor), paths[:1]).ask(
        "which digit is in image 1?"
    )


class WithSystem(Processor):
    """Takes a system message as one of the user's."""

    def encode(self, messages, add_generation_prompt=False):
        return super().encode([{**m, "role": m["role"].replace("system", "user")} for m in messages], True)


def test_system_message(model):
    vlm, processor = model()
    chat = chat_of((vlm, WithSystem(processor.tokenizer, processor.config)), system="which image")
    chat.ask("which digit")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    chat.set_system("how many")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "how many"}]
    chat.set_system(None)
    assert chat.messages == []


def test_a_template_without_system_messages_refuses_them(model):
    chat = chat_of(model())
    with pytest.raises(ValueError, match="role"):
        chat.set_system("be kind")
    assert chat.messages == []
    chat.ask("which digit")
    with pytest.raises(ValueError, match="role"):
        chat_of(model(), system="be kind")


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_a_saved_conversation_can_be_read_again(model, paths, tmp_path, name):
    vlm, processor = model()
    chat = chat_of((vlm, processor), paths[:2])
    chat.ask("which digit is in image 1?")
    chat.add_image(paths[2])
    chat.ask("which digit is in image 3?")
    chat.save(tmp_path / name)
    saved = json.loads((tmp_path / name).read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"] * 2
    assert saved[2]["content"][1] == {"type": "image", "image": str(paths[2])}
    if name.endswith("l"):
        (read,) = read_samples(str(tmp_path / name), processor, 5)
        expected = processor.encode(chat.messages)
        assert torch.equal(read["input_ids"], expected["input_ids"])
        assert torch.equal(read["images"], expected["images"])


def test_conversations_of_a_file_show_models_of_colour_the_pictures_themselves(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    parts = [{"type": "image", "image": "rgb.png"}, {"type": "text", "text": "which digit"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "3"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}))
    _, processor = model(image={"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    (read,) = read_samples(str(tmp_path / "chat.jsonl"), processor, 5)
    shown = [{"type": "image", "image": pixels}, parts[1]]
    expected = processor.encode([{"role": "user", "content": shown}, turns[1]])
    assert torch.equal(read["images"], expected["images"])


@pytest.mark.parametrize(
    ("name", "message"), [("0.png", r"ends in \.json"), ("no/such/folder.json", "cannot be written")]
)
def test_a_conversation_is_not_saved_over_a_picture(model, paths, tmp_path, name, message):
    before = paths[0].read_bytes()
    with pytest.raises(ValueError, match=message):
        chat_of(model()).save(tmp_path / name)
    assert paths[0].read_bytes() == before


def test_long_conversations_are_told_of(model):
    told = []
    chat = chat_of(model(language={"max_length": 20}), told=told)
    chat.ask("which digit")
    assert told == []
    chat.ask("which digit")
    assert told == [
        "the conversation has 22 tokens, and the model was trained on at most 20: its answers may suffer; "
        "begin a new one"
    ]


def test_pictures_are_read_once_and_as_the_model_takes_them(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    chat = chat_of(
        model(image={"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}), [tmp_path / "rgb.png"]
    )
    np.testing.assert_array_equal(np.asarray(chat.pending[0]["image"]), pixels)
    (tmp_path / "rgb.png").unlink()
    chat.ask("which digit is in image 1?")
    told = []
    Image.new("L", (20, 20), "white").save(tmp_path / "paper.png")
    chat_of(model(), [tmp_path / "paper.png"], told)
    assert told == [f"{tmp_path / 'paper.png'}: dark on bright, inverted"]


def test_models_are_loaded_onto_a_device(model, tmp_path):
    vlm, processor = model()
    vlm.save_pretrained(tmp_path / "model", processor)
    loaded, _ = load_model(tmp_path, "cpu")
    assert next(loaded.parameters()).device.type == "cpu"
    for device in ("cuda:99", "toaster"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
            load_model(tmp_path, device)

"""Packed samples learn what they learn alone: losses, gradients and logits, and samples cut to a length."""

import numpy as np
import pytest
import torch
from tiny_vlm import IMAGE_ID, TOKENS_PER_IMAGE, VOCAB, pictures, tiny_config, tiny_vlm
from tolerance import assert_conforms

from pyvlm.data.packing import encode, learns, pack_samples, truncate
from pyvlm.layout import PADDING, RULES
from pyvlm.models import VLM, Processor, ProcessorConfig, VLMConfig, word_level_tokenizer
from pyvlm.models.inputs import default_layout, next_labels, to_device
from pyvlm.models.processor import IGNORED, Sample

CAUSAL_RULES = [rule for rule in RULES if rule != "bidirectional"]
WORDS = [f"w{i}" for i in range(VOCAB - 6)]


@pytest.fixture
def processor() -> Processor:
    config = tiny_config()
    return Processor(
        word_level_tokenizer(WORDS),
        ProcessorConfig(image=config.image, tokens_per_image=config.tokens_per_image),
    )


def words(count: int) -> str:
    return " ".join(np.random.choice(WORDS, count))


def dialogue(processor: Processor, *images_a_round: int) -> Sample:
    """A sample of one round an entry, with so many images, side by side."""
    messages = []
    for count in images_a_round:
        parts = [{"type": "text", "text": words(2)}]
        parts += [{"type": "image", "image": np.random.rand(8, 8)} for _ in range(count)]
        messages += [
            {"role": "user", "content": [*parts, {"type": "text", "text": words(3)}]},
            {"role": "assistant", "content": words(2)},
        ]
    return processor.encode(messages)


@pytest.fixture
def samples(processor: Processor) -> list[Sample]:
    """Text alone, one image, two side by side, images in two rounds."""
    return [dialogue(processor, *counts) for counts in ((0,), (1,), (2,), (1, 0, 2))]


def loss_and_gradients(model, processor, samples, dtype):
    batch = to_device(processor.collate(samples), torch.device("cpu"))
    batch["images"] = batch["images"].to(dtype)
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("rule", CAUSAL_RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_samples_learn_what_they_learn_alone(processor, samples, rule, dtype) -> None:
    options = {"attention_rule": rule, "window": 9, "window_layers": [0]}
    if dtype == torch.float32:
        options["moe"] = None  # else rounding decides between experts that are as good
    # In float64 with experts, which images choose their tokens by expert, each within itself.
    model = tiny_vlm(dtype, "reference", **options).train()
    alone, expected = loss_and_gradients(model, processor, samples, dtype)
    text, one, two, many = samples
    packed, gradients = loss_and_gradients(model, processor, [pack_samples([one, text, many]), two], dtype)
    assert_conforms(packed.cross_entropy, alone.cross_entropy)
    assert_conforms(packed.loss, alone.loss)
    for name, gradient in gradients.items():
        assert_conforms(gradient, expected[name], name, gradient=True)
    for ours, theirs in zip(packed.moe_stats, alone.moe_stats, strict=True):
        assert torch.equal(ours.dispatched, theirs.dispatched)


@pytest.mark.parametrize("scheme", ["all", "share-all", "share-by-row"])
def test_logits_are_those_of_each_sample_alone(processor, samples, scheme) -> None:
    model = tiny_vlm(attention_rule="bidirectional_image")
    model.config = model.config.model_copy(update={"position_scheme": scheme})
    batch = processor.collate([pack_samples(samples)])
    logits = model(
        batch["input_ids"], batch["images"].double(), batch["attention_mask"], documents=batch["documents"]
    ).logits[0]
    alone = []
    for sample in samples:
        images = sample["images"].double() if len(sample["images"]) else None
        alone.append(model(sample["input_ids"][None], images).logits[0])
    assert_conforms(logits, torch.cat(alone))


def test_a_pack_is_its_samples_one_after_another(processor, samples) -> None:
    packed = pack_samples(samples)
    sizes = [len(sample["input_ids"]) for sample in samples]
    assert packed["documents"].tolist() == [i for i, size in enumerate(sizes) for _ in range(size)]
    assert packed["documents"].dtype == torch.int32
    for name in ("input_ids", "labels", "images"):
        assert torch.equal(packed[name], torch.cat([sample[name] for sample in samples]))
    assert pack_samples(samples[:1])["documents"].unique().tolist() == [0]
    with pytest.raises(ValueError, match="at least one sample"):
        pack_samples([])


def test_nothing_is_learnt_about_the_first_token_of_a_document(processor, samples) -> None:
    begun = {**samples[0], "labels": samples[0]["input_ids"].clone()}  # labels from its first token on
    packed = pack_samples([samples[1], begun])
    assert packed["labels"][len(samples[1]["labels"])] == IGNORED
    layout = default_layout(
        tiny_config(),
        packed["input_ids"][None],
        labels=packed["labels"][None],
        documents=packed["documents"][None],
    )
    assert next_labels(packed["labels"][None], layout)[0, len(samples[1]["labels"]) - 1] == IGNORED
    assert begun["labels"][0] != IGNORED  # the sample itself stays as it was


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_documents(processor, samples, side) -> None:
    packed, alone = pack_samples(samples), samples[1]
    batch = processor.collate([packed, alone], padding_side=side)
    real = batch["attention_mask"]
    assert batch["documents"].dtype == torch.int32
    assert (batch["documents"][~real] == -1).all()
    assert torch.equal(batch["documents"][0], packed["documents"])
    assert (batch["documents"][1][real[1]] == 0).all()
    assert "documents" not in processor.collate(samples)
    layout = default_layout(tiny_config(), batch["input_ids"], documents=batch["documents"])
    assert torch.equal(layout.kind == PADDING, ~real)  # the mask follows from the documents


def test_the_prefix_of_each_document_ends_at_its_first_label(processor, samples) -> None:
    packed = pack_samples(samples)
    config = tiny_config(attention_rule="prefix")
    ids, labels, documents = (packed[name][None] for name in ("input_ids", "labels", "documents"))
    expected = [
        default_layout(config, s["input_ids"][None], None, s["labels"][None]).prefix[0] for s in samples
    ]
    prefix = default_layout(config, ids, None, labels, None, documents).prefix
    assert torch.equal(prefix[0], torch.cat(expected))


def test_a_layout_has_its_own_documents() -> None:
    model = tiny_vlm()
    ids = torch.tensor([[5, 6, 7]])
    layout = default_layout(model.config, ids)
    with pytest.raises(ValueError, match="neither attention_mask nor documents"):
        model(ids, layout=layout, documents=torch.zeros(1, 3, dtype=torch.int32))


def cut(sample: Sample, max_length: int) -> Sample:
    return truncate(sample, max_length, IMAGE_ID, [TOKENS_PER_IMAGE] * len(sample["images"]))


def test_a_cut_never_falls_into_an_image(processor) -> None:
    sample = dialogue(processor, 2, 1)
    ids = sample["input_ids"]
    for length in range(1, len(ids) + 3):
        short = cut(sample, length)
        kept = len(short["input_ids"])
        assert torch.equal(short["input_ids"], ids[:kept])
        assert torch.equal(short["labels"], sample["labels"][:kept])
        places = int((short["input_ids"] == IMAGE_ID).sum())
        assert places == TOKENS_PER_IMAGE * len(short["images"])
        assert torch.equal(short["images"], sample["images"][: len(short["images"])])
        # No shorter than it must be: the next token is the end, or the first of an image.
        assert kept == min(length, len(ids)) or (kept < length and ids[kept] == IMAGE_ID)
        assert kept > length - TOKENS_PER_IMAGE or kept == len(ids)


def test_a_cut_takes_the_tiles_of_an_image_with_it(processor) -> None:
    first, second = TOKENS_PER_IMAGE, TOKENS_PER_IMAGE + 2
    ids = torch.tensor([5, *[IMAGE_ID] * first, *[IMAGE_ID] * second, 6])
    sample = {"input_ids": ids, "labels": ids, "images": pictures(5), "image_sizes": torch.ones(2, 2)}
    short = truncate(sample, len(ids) - 2, IMAGE_ID, [first, second], image_maps=[2, 3])
    assert short["input_ids"].tolist() == ids[: 1 + first].tolist()
    assert torch.equal(short["images"], sample["images"][:2])
    assert short["image_sizes"].shape == (1, 2)
    for sizes, maps in (([first], [5]), ([first, second], [2, 2])):
        with pytest.raises(ValueError, match="they must agree"):
            truncate(sample, 3, IMAGE_ID, sizes, image_maps=maps)


def test_images_of_any_size_are_packed_and_cut_whole() -> None:
    config = tiny_config().model_dump() | {"tiling": {"grid_pinpoints": [(8, 16), (16, 8), (16, 16)]}}
    model = VLM(VLMConfig.model_validate(config)).double().eval()
    keys = ("image", "tiling", "tokens_per_image")
    options = {key: getattr(model.config, key) for key in keys}
    processor = Processor(word_level_tokenizer(WORDS), ProcessorConfig(**options))

    def messages(*sizes: tuple[int, int]) -> list[dict]:
        parts = [{"type": "image", "image": np.random.rand(*size)} for size in sizes]
        content = [*parts, {"type": "text", "text": words(3)}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": words(2)}]

    def logits(sample: Sample) -> torch.Tensor:
        batch = {name: x for name, x in processor.collate([sample]).items() if name != "labels"}
        return model(
            **{**batch, "images": None if batch["images"] is None else batch["images"].double()}
        ).logits[0]

    given = [messages((8, 8), (9, 30)), messages((30, 9)), messages()]
    samples = [encode(processor, one) for one in given]
    assert [processor.length(one) for one in given] == [len(sample["input_ids"]) for sample in samples]
    assert_conforms(logits(pack_samples(samples)), torch.cat([logits(sample) for sample in samples]))
    whole = logits(samples[0])
    for length in range(1, len(whole)):
        short = encode(processor, given[0], length)  # the model checks that its images are whole
        assert_conforms(logits(short), whole[: len(short["input_ids"])])


def test_a_first_token_alone_is_nothing_to_learn() -> None:
    labels = torch.tensor([4, IGNORED, IGNORED])
    assert not learns({"labels": labels})
    labels[2] = 4
    assert learns({"labels": labels})

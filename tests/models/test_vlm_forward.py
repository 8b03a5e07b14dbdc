"""The model's forward pass: loss, gradients, who depends on whom, and what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_vlm import IMAGE_ID, TOKENS_PER_IMAGE, VOCAB, batch, pictures, tiny_config, tiny_vlm, tokens
from tolerance import assert_conforms

from pyvlm.layout import RULES, TokenLayout
from pyvlm.models import VLM, VLMConfig
from pyvlm.models.inputs import default_layout, to_device

CAUSAL_RULES = [rule for rule in RULES if rule != "bidirectional"]


def labelled(input_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Every word is to be learnt; images and padding are not."""
    return input_ids.masked_fill((input_ids == IMAGE_ID) | (real == 0), -100)


def test_a_batch_goes_to_a_device_but_for_what_the_host_reads() -> None:
    input_ids, real = batch(tokens(2, "image", 3), tokens(5))
    given = {"input_ids": input_ids, "images": None, "attention_mask": real, "image_sizes": torch.ones(1, 2)}
    on_cpu = to_device(given, torch.device("cpu"))
    assert all(on_cpu[name] is tensor for name, tensor in given.items())
    moved = to_device(given, torch.device("meta"))
    assert moved["image_sizes"] is given["image_sizes"]
    assert moved["images"] is None
    assert moved["input_ids"].is_meta
    assert moved["attention_mask"].is_meta


def test_shapes_and_statistics() -> None:
    model = tiny_vlm()
    input_ids, real = batch(tokens(2, "image", 3, "image", 1), tokens(5))
    output = model(input_ids, pictures(2), real)
    assert output.logits.shape == (2, 14, VOCAB)
    assert output.loss is None
    (stats,) = output.moe_stats
    assert stats.dispatched.shape == (2, 3)
    assert stats.dispatched[0].sum() == 2 * (6 + 5)  # text: top 2, padding routed nowhere


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_loss_is_the_cross_entropy_of_the_logits(tie_embeddings: bool, softcap: float | None) -> None:
    model = tiny_vlm(tie_embeddings=tie_embeddings, logit_softcap=softcap)
    input_ids, real = batch(tokens(2, "image", 3), tokens(1, "image", "image", 6), side="right")
    images, labels = pictures(3), labelled(input_ids, real)
    output = model(input_ids, images, real, labels)
    logits = model(input_ids, images, real).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_conforms(output.cross_entropy, expected)
    assert_conforms(output.loss, expected + output.moe_stats[0].aux_loss)
    assert output.aux_loss > 0
    assert output.logits is None


def test_gradients_reach_every_parameter() -> None:
    model = tiny_vlm(tie_embeddings=False).train()
    input_ids, real = batch(tokens(2, "image", 9), tokens(1, "image", "image", 6))
    model(input_ids, pictures(3), real, labelled(input_ids, real)).loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny_vlm().train()
    input_ids, real = batch(tokens(2, "image", 9), tokens(1, "image", 6))
    images, labels = pictures(2), labelled(input_ids, real)
    gradients = []
    for checkpointing in (False, True):
        model.language.gradient_checkpointing = checkpointing
        model.zero_grad()
        model(input_ids, images, real, labels).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_conforms(checkpointed, plain)


def test_parts_hold_each_parameter_once() -> None:
    model = tiny_vlm()
    parts = model.parts()
    assert list(parts) == ["vision", "fusion", "connector", "language", "moe"]
    assert all(parts.values())
    ids = [id(p) for parameters in parts.values() for p in parameters]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("rule", CAUSAL_RULES)
def test_rows_do_not_depend_on_their_batch(rule: str) -> None:
    model = tiny_vlm(attention_rule=rule, window=7, window_layers=[0])
    rows = [tokens(2, "image", 3, "image", 2), tokens(1, "image", 2), tokens(3)]
    images = pictures(3)
    for side in ("left", "right"):
        input_ids, real = batch(*rows, side=side)
        together = model(input_ids, images, real).logits
        for i, own in enumerate((images[:2], images[2:], None)):
            alone = model(torch.tensor([rows[i]]), own).logits[0]
            assert_conforms(together[i][real[i] == 1], alone, f"row {i} padded on the {side}")


def test_packed_documents_equal_separate_rows() -> None:
    model = tiny_vlm()
    first, second = tokens(2, "image", 3), tokens(1, "image", "image", 4)
    images = pictures(3)
    packed = torch.tensor([first + second])
    positions = torch.tensor([[*range(len(first)), *range(len(second))]])
    image = torch.where(packed == IMAGE_ID, ((packed == IMAGE_ID).cumsum(1) - 1) // TOKENS_PER_IMAGE, -1)
    layout = TokenLayout.from_input_ids(packed, IMAGE_ID, position_ids=positions)
    layout = replace(layout, image=image.int())
    logits = model(packed, images, layout=layout).logits[0]
    expected = [
        model(torch.tensor([first]), images[:1]).logits[0],
        model(torch.tensor([second]), images[1:]).logits[0],
    ]
    assert_conforms(logits, torch.cat(expected))

    # The first token of the second document is not what the last of the first one learns.
    labels = labelled(packed, torch.ones_like(packed))
    learnt = torch.cat([labels[0, : len(first)], labels[0, len(first) :]])
    learnt[len(first)] = -100
    expected_loss = F.cross_entropy(logits[:-1], learnt[1:])
    assert_conforms(model(packed, images, labels=labels, layout=layout).cross_entropy, expected_loss)


@pytest.mark.parametrize("rule", CAUSAL_RULES)
def test_no_row_depends_on_later_text(rule: str) -> None:
    model = tiny_vlm(attention_rule=rule)
    prompt, answer = tokens(2, "image", 3, "image", 2), tokens(4)
    images = pictures(2)
    labels = torch.tensor([[-100] * len(prompt) + answer])  # rule "prefix": the answer is not of the prefix
    before = torch.tensor([prompt + answer])
    after = before.clone()
    after[0, -2:] = (after[0, -2:] + 1) % (VOCAB - 3) + 3
    first, second = (
        model.hidden_states(ids, images, default_layout(model.config, ids, labels=labels))[0][0]
        for ids in (before, after)
    )
    assert torch.equal(first[:-2], second[:-2])
    assert not torch.equal(first[-2:], second[-2:])


def test_no_row_depends_on_a_later_image() -> None:
    model = tiny_vlm()
    input_ids = torch.tensor([tokens(2, "image", 3, "image", 2)])
    images = pictures(2)
    first = model(input_ids, images).logits[0]
    images[1] += 1
    second = model(input_ids, images).logits[0]
    assert torch.equal(first[:9], second[:9])
    assert not torch.isclose(first[-1], second[-1]).any()


def test_images_side_by_side_stay_two() -> None:
    """Under mmca_image the tokens of an image see each other, and not those of its neighbour."""
    model = tiny_vlm(attention_rule="mmca_image", moe=None)
    input_ids, images = torch.tensor([tokens("image", "image", 1)]), pictures(2)
    first = model(input_ids, images).logits[0]
    images[0] += 1
    second = model(input_ids, images).logits[0]
    assert torch.equal(first[4:8], second[4:8])
    assert not torch.isclose(first[8], second[8]).any()


@pytest.mark.parametrize("rule", CAUSAL_RULES)
def test_backends_agree(rule: str) -> None:
    options = {"attention_rule": rule, "attention_softcap": 20.0, "window": 7, "window_layers": [2]}
    input_ids, real = batch(tokens(2, "image", 3, "image", 2), tokens(1, "image", 2))
    images, labels = pictures(3), labelled(input_ids, real)
    results = []
    for backend in ("auto", "reference"):
        model = tiny_vlm(backend=backend, **options)
        model(input_ids, images, real, labels).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([model(input_ids, images, real).logits, *gradients])
    assert len(results[0]) > 50
    for auto, reference in zip(*results, strict=True):
        assert_conforms(auto, reference, gradient=True)


def test_a_backend_that_is_not_there_is_an_error() -> None:
    model = tiny_vlm(backend="triton")
    with pytest.raises(RuntimeError, match='backend="triton" cannot run on cpu'):
        model(torch.tensor([tokens(3)]))
    with pytest.raises(ValueError, match="backend"):
        VLM(tiny_config(), backend="cuda")


def test_fusion_by_sequence_and_concatenated_levels() -> None:
    config = tiny_config().model_dump()
    config["fusion"] = {"method": "sequence", "hidden_size": 10}
    config["vision_towers"][0] |= {"merge": "concat", "align_dim": 7}
    config["vision_towers"][1]["patches"] = 8
    config["connector"] = "linear"
    model = VLM(VLMConfig.model_validate(config))
    assert model.config.tokens_per_image == 4 + 2
    assert model.image_features(pictures(3, torch.float32)).shape == (3, 6, 16)


def test_autocast() -> None:
    model = tiny_vlm(torch.float32)
    input_ids, real = batch(tokens(2, "image", 3), tokens(4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids, pictures(1, torch.float32), real, labelled(input_ids, real)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_bad_inputs_are_refused_by_name() -> None:
    model = tiny_vlm()
    input_ids, real = batch(tokens(2, "image", 3), tokens(1, "image", "image", 2))
    images = pictures(3)
    nan = images.clone()
    nan[1, 0, 3, 3] = torch.nan
    short = input_ids.clone()
    short[1, -3] = 5  # one placeholder of sample 1 overwritten
    cases = [
        (
            r"3 images \(sample 0: 1, sample 1: 2; 4 placeholders an image\), but 2 images",
            (input_ids, images[:2], real),
        ),
        ("but 0 images were given", (input_ids, None, real)),
        (r"for 0 images \(none; .*, but 3 images", (torch.tensor([[5, 6]]), images)),
        ("sample 1 has 7 image placeholders, and each image takes 4", (short, images, real)),
        ("image 1 of the batch has NaN", (input_ids, nan, real)),
        (
            r"images must be \[images, 1, 8, 8\].*got \[3, 3, 8, 8\]",
            (input_ids, images.expand(-1, 3, -1, -1), real),
        ),
        (r"got \[3, 1, 8, 9\]", (input_ids, F.pad(images, (0, 1)), real)),
        ("images must be floating", (input_ids, images.to(torch.uint8), real)),
        (r"input_ids\[0, 1\] is 23, outside the vocabulary of 23", (torch.tensor([[5, 23]]),)),
        ("input_ids must be int64", (torch.tensor([[5.0]]),)),
        ("labels must have the shape of input_ids", (input_ids, images, real, real[:, 1:])),
        ("attention_mask must have the shape of input_ids", (input_ids, images, real[:, 1:])),
    ]
    for message, arguments in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            model(*arguments)

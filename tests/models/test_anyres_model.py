"""A model of images of any size: their tokens, who sees whom, generation, files, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vlm import IMAGE_ID, VOCAB, batch, tiny_config, tokens
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.layout import RULES
from pyvlm.models import VLM, ImageConfig, Processor, ProcessorConfig, VLMConfig, word_level_tokenizer
from pyvlm.models.inputs import default_layout
from pyvlm.models.language import slice_layout
from pyvlm.models.positions import position_ids
from pyvlm.training.evaluate import reply

CAUSAL_RULES = [rule for rule in RULES if rule != "bidirectional"]
TILING = {"grid_pinpoints": [(8, 16), (16, 8), (16, 16), (24, 8), (8, 24)]}
SQUARE, WIDE, TALL, STRIP = (8, 8), (9, 30), (30, 9), (1, 1000)
NEW = 5


def anyres_vlm(dtype: torch.dtype = torch.float64, tiling: Any = TILING, **options: Any) -> VLM:
    """The tiny model with tiles of 2 × 2 tokens, and weights so large that its rows differ."""
    torch.manual_seed(7)
    scheme = {"position_scheme": options.pop("position_scheme", "all")}
    config = tiny_config(**options).model_dump() | scheme | {"tiling": tiling}
    model = VLM(VLMConfig.model_validate(config)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.language.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def length_of(model: VLM, size: tuple[int, int]) -> int:
    return model.image_packer.num_tokens(size)


def row_of(model: VLM, *parts: int | tuple[int, int]) -> list[int]:
    """Ids from numbers of random words and sizes of images."""
    ids: list[int] = []
    for part in parts:
        ids += tokens(part) if isinstance(part, int) else [IMAGE_ID] * length_of(model, part)
    return ids


def maps_of(model: VLM, *sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Random base views and tiles of images, and their sizes."""
    count = sum(map(model.image_packer.num_maps, sizes))
    return torch.randn(count, 1, 8, 8, dtype=torch.float64), torch.tensor(sizes)


def prompts(model: VLM) -> dict[str, Tensor]:
    """Left-padded rows with images side by side, one at the end, a strip, and none."""
    rows = [row_of(model, 2, SQUARE, WIDE, 3, TALL, 2), row_of(model, 1, STRIP), row_of(model, 3)]
    input_ids, real = batch(*rows)
    images, sizes = maps_of(model, SQUARE, WIDE, TALL, STRIP)
    return {"input_ids": input_ids, "attention_mask": real, "images": images, "image_sizes": sizes}


def alone(model: VLM, inputs: dict[str, Tensor], row: int, images: range) -> dict[str, Any]:
    """One row of a batch without its padding, with its own images (numbers of the batch)."""
    counts = [model.image_packer.num_maps(size) for size in map(tuple, inputs["image_sizes"].tolist())]
    maps = inputs["images"].split(counts)
    own = {"input_ids": inputs["input_ids"][row][inputs["attention_mask"][row] == 1][None]}
    if images:
        own["images"] = torch.cat([maps[i] for i in images])
        own["image_sizes"] = inputs["image_sizes"][images.start : images.stop]
    return own


def test_images_have_as_many_tokens_as_their_size_takes() -> None:
    lengths = {size: length_of(anyres_vlm(), size) for size in (SQUARE, WIDE, TALL, STRIP)}
    # 4 of the base view; then the rows of the tiles that are no padding, each a newline longer.
    assert lengths == {SQUARE: 4 + 2 * 3, WIDE: 4 + 2 * 7, TALL: 4 + 6 * 3, STRIP: 4}


def test_the_language_model_reads_what_llava_next_packs() -> None:
    """A tower, a connector and a newline of transformers, with images of very different shapes."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    vision |= {"model_type": "clip_vision_model", "image_size": 12, "patch_size": 4}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    pinpoints = [[12, 24], [24, 12], [24, 24]]
    torch.manual_seed(3)
    theirs = transformers.LlavaNextModel(
        transformers.LlavaNextConfig(
            vision_config=vision,
            text_config=text | {"model_type": "llama", "vocab_size": VOCAB},
            image_grid_pinpoints=pinpoints,
            image_token_index=IMAGE_ID,
        )
    ).eval()
    pixels = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    tower = {"type": "transformers", "name": "clip", "encoder": vision, "levels": [-2], **pixels}
    config = tiny_config(moe=None).model_dump() | {
        "image": {"size": 12} | pixels,
        "tiling": {"grid_pinpoints": pinpoints},
        "vision_towers": [tower],
        "fusion": {},
    }
    ours = VLM(VLMConfig.model_validate(config)).eval()
    encoder = ours.vision_towers["clip"].encoder
    weights = theirs.vision_tower.state_dict()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    linear = [theirs.multi_modal_projector.linear_1, theirs.multi_modal_projector.linear_2]
    for mine, other in zip(
        [module for module in ours.connector.modules() if isinstance(module, torch.nn.Linear)],
        linear,
        strict=True,
    ):
        mine.load_state_dict(other.state_dict())
    ours.image_packer.load_state_dict({"newline": theirs.image_newline})

    of = Processor(
        word_level_tokenizer(["what"]),
        ProcessorConfig(
            image=ours.config.image, tiling=ours.config.tiling, tokens_per_image=ours.config.tokens_per_image
        ),
    )
    sizes = [(12, 12), (1, 1000), (1000, 1), (50, 33)]
    images = [{"type": "image", "image": np.random.rand(*size, 3)} for size in sizes]
    samples = [of.encode([{"role": "user", "content": part}]) for part in (images[:3], images[3:])]
    given = of.collate(samples, padding_side="left")
    packed = theirs.get_image_features(given["images"], given["image_sizes"]).pooler_output
    expected = ours.language.embed_tokens(given["input_ids"])
    expected[given["input_ids"] == IMAGE_ID] = torch.cat(packed)

    read: list[Tensor] = []
    ours.language.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    ours(**{name: tensor for name, tensor in given.items() if name != "labels"})
    assert_conforms(read[0], expected)


@pytest.mark.parametrize("position_scheme", ["all", "share-all"])
@pytest.mark.parametrize("rule", CAUSAL_RULES)
def test_rows_do_not_depend_on_their_batch(rule: str, position_scheme: str) -> None:
    model = anyres_vlm(attention_rule=rule, position_scheme=position_scheme, window=9, window_layers=[0])
    inputs = prompts(model)
    together = model(**inputs).logits
    for row, images in enumerate((range(3), range(3, 4), range(0))):
        expected = model(**alone(model, inputs, row, images)).logits[0]
        assert_conforms(together[row][inputs["attention_mask"][row] == 1], expected, f"row {row}")


def test_images_side_by_side_stay_two() -> None:
    """Under mmca_image the tokens of an image see each other, and not those of its longer neighbour."""
    model = anyres_vlm(attention_rule="mmca_image", moe=None)
    images, sizes = maps_of(model, SQUARE, WIDE)
    input_ids = torch.tensor([row_of(model, SQUARE, WIDE, 1)])
    layout = default_layout(model.config, input_ids, image_sizes=sizes)
    first, second = length_of(model, SQUARE), length_of(model, WIDE)
    assert layout.image[0].tolist() == [0] * first + [1] * second + [-1]
    before = model(input_ids, images, image_sizes=sizes).logits[0]
    images[0] += 1
    after = model(input_ids, images, image_sizes=sizes).logits[0]
    assert torch.equal(before[first:-1], after[first:-1])
    assert not torch.isclose(before[:first], after[:first]).all(1).any()
    assert not torch.isclose(before[-1], after[-1]).any()


def test_an_image_has_one_position_where_they_are_shared() -> None:
    """The words after it stand as far from the start whatever its size is."""
    model = anyres_vlm(position_scheme="share-all")
    for size in (SQUARE, WIDE):
        input_ids = torch.tensor([row_of(model, 1, size, size, 2)])
        layout = default_layout(model.config, input_ids, image_sizes=torch.tensor([size, size]))
        length = length_of(model, size)
        expected = [0, *[1] * length, *[2] * length, 3, 4]
        assert position_ids(layout, model.config.position_scheme)[0].tolist() == expected


def test_gradients_reach_every_parameter() -> None:
    model = anyres_vlm(tie_embeddings=False).train()
    inputs = prompts(model)
    labels = inputs["input_ids"].masked_fill(
        (inputs["input_ids"] == IMAGE_ID) | (inputs["attention_mask"] == 0), -100
    )
    model(**inputs, labels=labels).loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []
    assert any(p is model.image_packer.newline for p in model.parts()["connector"])
    held = [id(p) for parameters in model.parts().values() for p in parameters]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("rule", ["causal", "mmca", "mmca_image", "bidirectional_image", "prefix"])
def test_generate_equals_full_recomputation(rule: str) -> None:
    """From left-padded rows, with images read once and kept in the cache."""
    model = anyres_vlm(attention_rule=rule)
    inputs = prompts(model)
    input_ids, real = inputs["input_ids"], inputs["attention_mask"]
    answer = input_ids[:, :0]
    for _ in range(NEW):
        whole = torch.cat([input_ids, answer], dim=1)
        mask = torch.cat([real, torch.ones_like(answer)], dim=1)
        layout = default_layout(model.config, whole, mask, image_sizes=inputs["image_sizes"])
        if layout.prefix is not None:
            layout.prefix[:, input_ids.shape[1] :] = False
        full = model(whole, inputs["images"], layout=layout, image_sizes=inputs["image_sizes"]).logits[:, -1]
        full[:, IMAGE_ID] = -torch.inf
        answer = torch.cat([answer, full.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW), answer)
    assert len(answer.unique()) > 3  # not one word over and over, which would prove little
    single = model.generate(**alone(model, inputs, 0, range(3)), max_new_tokens=NEW)
    assert torch.equal(single, answer[:1])


def test_a_dialogue_goes_on_with_new_images_in_the_cache() -> None:
    model = anyres_vlm()
    turns = [torch.tensor([row_of(model, 2, WIDE, 3)]), torch.tensor([row_of(model, 1, TALL, SQUARE, 2)])]
    first, sizes = maps_of(model, WIDE)
    second, more_sizes = maps_of(model, TALL, SQUARE)
    whole, all_sizes = torch.cat(turns, dim=1), torch.cat([sizes, more_sizes])
    layout = default_layout(model.config, whole, image_sizes=all_sizes)
    full = model(whole, torch.cat([first, second]), layout=layout, image_sizes=all_sizes).logits
    cache = model.new_cache(layout.length)
    so_far = slice_layout(layout, 0, turns[0].shape[1])
    pieces = [
        model(turns[0], first, layout=so_far, cache=cache, image_sizes=sizes).logits,
        model(turns[1], second, layout=layout, cache=cache, image_sizes=more_sizes).logits,
    ]
    assert_conforms(torch.cat(pieces, dim=1), full)


def test_a_model_and_its_processor_come_back(tmp_path: Path) -> None:
    model = anyres_vlm(torch.float32, moe=None)
    words = ["what is it ?", *(f"word{i}" for i in range(12))]
    of = Processor(
        word_level_tokenizer(words),
        ProcessorConfig(
            image=ImageConfig(size=8, channels=1), tiling=model.config.tiling, tokens_per_image=4
        ),
    )
    assert of.vocab_size <= VOCAB
    model.save_pretrained(tmp_path / "model", of)
    loaded, processor = VLM.from_pretrained(tmp_path / "model"), Processor.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded.image_packer.newline, model.image_packer.newline)
    images = [{"type": "image", "image": np.random.rand(*size)} for size in (STRIP, TALL)]
    question = {"type": "text", "text": "what is it ?"}
    asked = [[{"role": "user", "content": [*parts, question]}] for parts in (images, images[:1], [])]
    assert reply(loaded, processor, asked, 3) == reply(model, of, asked, 3)


def test_autocast_and_half_precision() -> None:
    model = anyres_vlm(torch.float32)
    inputs = prompts(model)
    inputs["images"] = inputs["images"].float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert model.image_packer.newline.grad.isfinite().all()
    assert model.bfloat16()(**inputs).logits.isfinite().all()


def test_batches_that_do_not_fit_are_refused_by_name() -> None:
    model = anyres_vlm()
    inputs = prompts(model)
    sizes, images, input_ids = inputs["image_sizes"], inputs["images"], inputs["input_ids"]
    short = input_ids.clone()
    short[0, -1] = IMAGE_ID  # a placeholder too many in sample 0
    swapped = sizes[[0, 2, 1, 3]]  # as many placeholders, but in another order
    fewer = sizes[:3]
    cases: list[tuple[str, dict[str, Any]]] = [
        (
            r"sample 0 has 51 image placeholders, but its images have 54 features \(image 0, \(8, 8\): 10; .*"
            r"image 3, \(1, 1000\): 4\)",
            {"input_ids": short},
        ),
        (
            r"sample 1 has 4 image placeholders, but its images have 0 features \(none is left\)",
            {"image_sizes": fewer, "images": images[:-3]},
        ),
        (r"have 14 base views and tiles, but images has 13", {"images": images[:-1]}),
        (r"have 11 base views and tiles, but images has 14", {"image_sizes": fewer}),
        (r"needs image_sizes, the \(height, width\) of each image", {"image_sizes": None}),
        (r"image_sizes must be integer \[images, 2\], got torch.int64 \[4\]", {"image_sizes": sizes[:, 0]}),
        (r"image_sizes must be integer", {"image_sizes": sizes.float()}),
        (r"\(0, 8\) is not a size", {"image_sizes": sizes * torch.tensor([0, 1])}),
        (r"sample 0 has 50 image placeholders, but its images have 0", {"images": None, "image_sizes": None}),
        (r"images must be \[images, 1, 8, 8\]", {"images": images[..., :4]}),
        (r"image 1 of row 0 lies in more than one piece", {"image_sizes": swapped}),
    ]
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            model(**(inputs | changes))
        with pytest.raises(ValueError, match=message):
            model.generate(**(inputs | changes), max_new_tokens=1)
    one_more = maps_of(model, SQUARE, SQUARE)
    with pytest.raises(ValueError, match="placeholders for 1 images, but 2 images were given"):
        model(torch.tensor([row_of(model, SQUARE, 2)]), one_more[0], image_sizes=one_more[1])
    plain = VLM(tiny_config()).double()
    with pytest.raises(ValueError, match="the model has no tiling"):
        plain(torch.tensor([[5, 6]]), image_sizes=sizes)

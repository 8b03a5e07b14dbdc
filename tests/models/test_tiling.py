"""How images of any size are cut and counted: as transformers' LLaVA-NeXT processors do."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given
from PIL import Image
from pydantic import ValidationError
from tiny_vlm import tiny_config

from pyvlm.models import (
    ImageConfig,
    Processor,
    ProcessorConfig,
    TilingConfig,
    VLMConfig,
    word_level_tokenizer,
)
from pyvlm.models.images import image_size
from pyvlm.models.tiling import check_lengths, cut_image, fitted_size, number_images

TILE, SIDE = 28, 4
PINPOINTS = [(28, 56), (56, 28), (56, 56), (84, 28), (28, 84)]
TILING = TilingConfig(grid_pinpoints=PINPOINTS)
SIZES = [(1, 1000), (1000, 1), (28, 28), (1, 1), (55, 57), (113, 40), (40, 113), (300, 200), (9, 31)]
sizes = st.tuples(st.integers(1, 2000), st.integers(1, 2000))


def photo(height: int, width: int) -> np.ndarray:
    """A picture whose every corner differs, with edges that overshoot where they are resized."""
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    return np.where((np.arange(height) // 5 % 2 == 0)[:, None, None], ramp, noise).astype(np.uint8)


def processor(tiling: TilingConfig | None = TILING, channels: int = 3) -> Processor:
    config = ProcessorConfig(
        image=ImageConfig(size=TILE, channels=channels), tiling=tiling, tokens_per_image=SIDE**2
    )
    return Processor(word_level_tokenizer(["what is it ?"]), config)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_those_of_transformers(size: tuple[int, int], resample: str) -> None:
    """Equal to the last level of 8 bits, with the same base view, tiles, padding and order."""
    llava = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    picture = Image.fromarray(photo(*size))
    theirs = llava.LlavaNextImageProcessorPil(
        image_grid_pinpoints=[list(canvas) for canvas in PINPOINTS],
        size={"height": TILE, "width": TILE},
        crop_size={"height": TILE, "width": TILE},
        resample=Image.Resampling[resample.upper()],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )(picture, return_tensors="pt")
    tiling = TilingConfig(grid_pinpoints=PINPOINTS, resample=resample)
    encoded = processor(tiling).encode_image(picture)
    assert encoded.size == tuple(theirs["image_sizes"][0].tolist()) == size
    assert torch.allclose(encoded.pixels.double(), theirs["pixel_values"][0].double(), rtol=0, atol=1e-6)


@given(size=sizes, canvas=st.tuples(st.integers(1, 2000), st.integers(1, 2000)))
@example(size=(1, 1000), canvas=(336, 672))
def test_an_image_fits_its_canvas_as_in_transformers(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    from transformers.image_processing_utils import get_patch_output_size
    from transformers.image_utils import ChannelDimension

    image = np.broadcast_to(np.zeros((1, 1, 1)), (3, *size))
    assert fitted_size(size, canvas) == get_patch_output_size(image, canvas, ChannelDimension.FIRST)


@given(size=sizes)
@example(size=(1, 1000))
@example(size=(1000, 1))
def test_an_image_takes_the_placeholders_of_transformers(size: tuple[int, int]) -> None:
    """As transformers' processor counts them from the size alone."""
    from types import SimpleNamespace

    from transformers import LlavaNextProcessor

    of = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=PINPOINTS),
        patch_size=TILE // SIDE,
        num_additional_image_tokens=0,
        _get_unpadded_features=lambda *given: LlavaNextProcessor._get_unpadded_features(None, *given),
    )
    expected = LlavaNextProcessor._get_number_of_features(of, *size, TILE, TILE)
    image = np.broadcast_to(np.zeros((1, 1), np.uint8), size)
    assert processor().tokens_of(image) == expected


def test_a_sample_has_the_tiles_and_sizes_of_its_images() -> None:
    of = processor()
    parts = [{"type": "image", "image": photo(*size)} for size in SIZES[:3]]
    content = [parts[0], {"type": "text", "text": "what is"}, *parts[1:]]
    sample = of.encode([{"role": "user", "content": content}])
    tokens = [of.tokens_of(part["image"]) for part in parts]
    assert len(set(tokens)) == 3  # or nothing would be tested
    assert sample["image_sizes"].tolist() == [list(size) for size in SIZES[:3]]
    expected = torch.cat([of.preprocess(part["image"]) for part in parts])
    assert torch.equal(sample["images"], expected)
    placeholders = sample["input_ids"] == of.image_token_id
    assert placeholders.tolist() == (
        [False] + [True] * tokens[0] + [False] * 2 + [True] * sum(tokens[1:]) + [False]
    )

    words = of.encode([{"role": "user", "content": "what is it ?"}])
    assert words["images"].shape == (0, 3, TILE, TILE)
    assert words["image_sizes"].shape == (0, 2)
    batch = of.collate([words, sample, sample])
    assert torch.equal(batch["image_sizes"], torch.cat([sample["image_sizes"]] * 2))
    assert torch.equal(batch["images"], torch.cat([sample["images"]] * 2))
    assert of.collate([words])["image_sizes"] is None
    assert "image_sizes" not in processor(tiling=None).encode([])


@pytest.mark.parametrize(
    ("suffix", "orientation"),
    [("gif", None), *((suffix, o) for suffix in ("png", "jpg", "webp", "tiff") for o in (None, 1, 3, 6, 8))],
)
def test_sizes_of_files_are_read_from_their_heads(
    tmp_path: Path, suffix: str, orientation: int | None
) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(photo(20, 70)).save(path, **({} if suffix == "gif" else {"exif": exif}))
    turned = orientation in (6, 8)
    assert image_size(path) == ((70, 20) if turned else (20, 70))
    encoded = processor().encode_image(path)
    assert encoded.size == image_size(path)
    assert encoded.num_tokens == processor().tokens_of(str(path))
    assert len(encoded.pixels) == 4


def test_bad_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.png': there is no such file"):
        processor().tokens_of(tmp_path / "nowhere.png")
    path = tmp_path / "notes.png"
    path.write_text("no image")
    for read in (processor().tokens_of, processor().encode_image):
        with pytest.raises(ValueError, match=r"notes.png': not an image"):
            read(path)
        with pytest.raises(TypeError, match="got int"):
            read(5)
        with pytest.raises(ValueError, match=r"must be \[H, W\].*got \[5\]"):
            read(np.zeros(5, np.uint8))


def test_greys_floats_and_16_bits_are_cut_alike() -> None:
    levels = photo(40, 90)[..., 0]
    expected = cut_image(levels, TILING, ImageConfig(size=TILE, channels=1))
    assert expected.shape == (4, 1, TILE, TILE)
    for image in (
        levels / 255.0,
        torch.from_numpy(levels),
        Image.fromarray(levels),
        Image.fromarray(levels.astype(np.uint16) * 257),
    ):
        assert torch.equal(cut_image(image, TILING, ImageConfig(size=TILE, channels=1)), expected)
    coloured = cut_image(levels, TILING, ImageConfig(size=TILE))
    assert torch.equal(coloured, expected.expand(-1, 3, -1, -1))


def test_round_trip_on_disk(tmp_path: Path) -> None:
    first = processor(TilingConfig(grid_pinpoints=PINPOINTS, newline=False, resample="bilinear"))
    first.save_pretrained(tmp_path)
    second = Processor.from_pretrained(tmp_path)
    assert second.config == first.config
    image = photo(40, 90)
    assert torch.equal(second.preprocess(image), first.preprocess(image))
    assert second.tokens_of(image) == first.tokens_of(image) < processor().tokens_of(image)


@given(rows=st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=4), gap=st.booleans())
def test_images_are_told_apart_by_their_lengths(rows: list[list[int]], gap: bool) -> None:
    """Also side by side, and counted from 0 in every row."""
    expected = [
        [number for image, length in enumerate(row) for number in [image] * length + [-1] * gap]
        for row in rows
    ]
    width = max(map(len, expected)) + 2
    expected = [[-1] * (width - len(row)) + row for row in expected]
    image = torch.tensor(expected, dtype=torch.int32)
    lengths = [length for row in rows for length in row]
    assert torch.equal(number_images(image >= 0, lengths), image)
    placeholders = (image >= 0).sum(1).tolist()
    check_lengths(placeholders, [(1, 1)] * len(lengths), lengths)
    if lengths:
        with pytest.raises(ValueError, match="placeholders"):
            check_lengths(placeholders, [(1, 1)] * len(lengths), [*lengths[:-1], lengths[-1] + 1])


TOWER: dict[str, Any] = {"type": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiling": {"grid_pinpoints": [[8, 12]]}}, r"grid_pinpoints \[\(8, 12\)\] are no multiples of .* 8"),
        ({"tiling": {"grid_pinpoints": []}}, "at least 1 item"),
        ({"tiling": {"grid_pinpoints": [[8, 0]]}}, "greater than 0"),
        ({"tiling": {"strategy": "crop", "grid_pinpoints": [[8, 8]]}}, "anyres"),
        ({"tiling": {"pinpoints": [[8, 8]]}}, "pinpoints"),
        ({"position_scheme": "share-by-row"}, "'share-by-row' does not go with tiling"),
        ({"position_scheme": "share-by-row-and-column"}, "does not go with tiling"),
        (
            {
                "vision_towers": [TOWER | {"name": "a"}, TOWER | {"name": "b"}],
                "fusion": {"method": "sequence", "hidden_size": 8},
            },
            r"one square map of tokens a tile, and an image has the maps \[\(2, 2\), \(2, 2\)\]",
        ),
        (
            {
                "vision_towers": [TOWER | {"name": "a", "patches": 2}],
                "fusion": {"method": "sequence", "hidden_size": 8},
            },
            r"has the maps \[\(2, 1\)\]",
        ),
    ],
)
def test_models_that_cannot_be_tiled(changes: dict[str, Any], message: str) -> None:
    good = tiny_config().model_dump() | {"tiling": {"grid_pinpoints": [(8, 16)]}}
    assert VLMConfig.model_validate(good).tiling is not None
    with pytest.raises(ValidationError, match=message):
        VLMConfig.model_validate(good | changes)


def test_a_processor_needs_a_square_of_tokens() -> None:
    with pytest.raises(ValidationError, match="square of tokens a tile, and an image has 8"):
        ProcessorConfig(image=ImageConfig(size=TILE), tiling=TILING, tokens_per_image=8)
    with pytest.raises(ValidationError, match="no multiples of the image size 20"):
        ProcessorConfig(image=ImageConfig(size=20), tiling=TILING, tokens_per_image=4)

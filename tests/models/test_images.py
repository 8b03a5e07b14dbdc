"""Image files and arrays: what they become, and the one error that each defect gives."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyvlm.models import ImageConfig, load_image
from pyvlm.models.images import fit_image, to_pixels


def grey(height: int = 9, width: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp"])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(grey(64, 64)).save(path)
    assert load_image(path).size == (64, 64)
    data = path.read_bytes()
    for length in (len(data) * 2 // 3, 30, 4, *([len(data) - 6] if suffix == "png" else [])):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=f"photo.{suffix}"):
            load_image(path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(grey(64, 64)).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"photo.png': damaged or truncated"):
        load_image(path)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("not an image at all\n" * 20)
    empty = tmp_path / "empty.png"
    empty.touch()
    for path in (text, empty):
        with pytest.raises(ValueError, match=f"{path.name}': not an image"):
            load_image(path)
    for path in (tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(ValueError, match="there is no such file"):
            load_image(path)


def bomb(path: Path, side: int) -> None:
    """A PNG of some hundred bytes that claims side × side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8_001, 10_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    bomb(path, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match=r"bomb.png': .*(8001 by 8001|10000 by 10000|3600000000) pixels"):
            load_image(path)


def test_a_smaller_limit_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(grey()).save(path)
    assert load_image(path, max_pixels=63).size == (7, 9)
    with pytest.raises(ValueError, match="7 by 9 pixels, and at most 62"):
        load_image(path, max_pixels=62)


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(grey()).save(path, exif=exif)
    assert load_image(path).size == (9, 7)


def test_pixels_of_every_kind_of_image_agree(tmp_path: Path) -> None:
    array = grey(8, 8)
    path = tmp_path / "digit.png"
    Image.fromarray(array).save(path)
    expected = torch.from_numpy(array).float()[None] / 255
    floating = array.astype(np.float64) / 255
    for image in (
        array,
        array[..., None],
        floating,
        torch.from_numpy(array),
        Image.fromarray(array),
        path,
        str(path),
    ):
        assert torch.equal(to_pixels(image, channels=1, size=8), expected)
    assert torch.equal(to_pixels(array, channels=3, size=8), expected.expand(3, 8, 8))
    assert torch.equal(to_pixels(array.T[::-1], channels=1, size=8), expected.mT.flip(1))


def test_colour_becomes_grey_as_pillow_does_it() -> None:
    colour = np.random.default_rng(1).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(colour).convert("L"), dtype=np.float32) / 255
    difference = to_pixels(colour, channels=1, size=5)[0] - torch.from_numpy(expected)
    assert difference.abs().max() <= 1 / 255  # Pillow rounds to whole levels


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    Image.fromarray(np.array([[0, 65535], [32768, 256]], dtype=np.uint16)).save(path)
    pixels = to_pixels(path, channels=1, size=2)
    assert torch.equal(pixels, torch.tensor([[[0, 1], [32768 / 65535, 256 / 65535]]]))


def test_resizing_averages_what_it_shrinks() -> None:
    stripes = np.tile(
        np.arange(64) % 8 < 2, (64, 1)
    )  # two of eight columns, which eight single samples may miss
    pixels = to_pixels(stripes.astype(np.float32), channels=1, size=8)
    assert pixels.shape == (1, 8, 8)
    assert ((pixels - 0.25).abs() < 0.1).all()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, TypeError, "got NoneType"),
        (np.zeros((2, 2, 4), np.uint8), ValueError, r"got \[2, 2, 4\]"),
        (np.zeros(4, np.uint8), ValueError, r"got \[4\]"),
        (np.zeros((0, 4), np.uint8), ValueError, r"not empty, got \[0, 4\]"),
        (np.zeros((2, 2), np.int64), ValueError, "uint8 or floating"),
        (np.full((2, 2), np.nan), ValueError, "without NaN"),
        (np.full((2, 2), 16.0), ValueError, "values from 16 to 16"),
        (np.full((2, 2), -0.1), ValueError, "values from -0.1 to -0.1"),
        (Image.new("F", (2, 2)), ValueError, "mode 'F' has no fixed range"),
    ],
)
def test_what_is_no_image_is_refused(image: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_pixels(image, channels=1, size=2)


@pytest.mark.parametrize(("height", "width"), [(4, 8), (8, 4), (5, 8), (8, 8)])
def test_padding_keeps_proportions(height: int, width: int) -> None:
    image = np.random.default_rng(1).random((height, width, 3), dtype=np.float32)
    pixels = to_pixels(image, channels=3, size=8, padding=(0.25, 0.5, 0.75))
    top, left = (8 - height) // 2, (8 - width) // 2
    inside = pixels[:, top : top + height, left : left + width]
    assert torch.equal(inside, torch.from_numpy(image).permute(2, 0, 1))
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[top : top + height, left : left + width] = False
    for channel, value in zip(pixels, (0.25, 0.5, 0.75), strict=True):
        assert (channel[outside] == value).all()


@pytest.mark.parametrize("resample", [None, "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_middle_is_cut_out(resample: str | None, channels: int) -> None:
    picture = np.zeros((8, 20, channels), np.uint8)
    picture[:, 6:14] = 255
    config = ImageConfig(size=4, channels=channels, fit="crop", resample=resample)
    assert fit_image(Image.fromarray(picture.squeeze()), config).min() > 0.7  # softened at the cut in 8 bits
    inner = np.kron(np.arange(16).reshape(4, 4) * 16, np.ones((2, 2))).astype(np.uint8)
    wide = np.pad(inner, ((0, 0), (6, 6)))
    if resample is None:
        square = fit_image(inner, ImageConfig(size=4, channels=channels))
        assert torch.equal(fit_image(wide, config), square)

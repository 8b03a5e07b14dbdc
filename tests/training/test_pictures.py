import numpy as np
import pytest
from PIL import Image

from pyvlm.training.digits import load_split
from pyvlm.training.pictures import read_strokes, write_pictures


@pytest.fixture
def digits():
    return list(load_split("test")[0][:5])


def test_written_pictures_are_read_as_they_were(tmp_path, digits):
    paths = write_pictures(digits, [f"{i}.png" for i in range(5)], tmp_path / "images")
    for digit, path in zip(digits, paths, strict=True):
        strokes, inverted = read_strokes(path, 8)
        assert strokes.dtype == np.float32
        assert not inverted
        np.testing.assert_allclose(strokes, digit, atol=0.5 / 255 + 1e-6)


def test_dark_on_bright_is_inverted(tmp_path, digits):
    write_pictures([1 - digits[0]], ["dark.png"], tmp_path)
    strokes, inverted = read_strokes(tmp_path / "dark.png", 8)
    assert inverted
    np.testing.assert_allclose(strokes, digits[0], atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "I;16"])
def test_modes_of_pictures(tmp_path, mode):
    digit = np.zeros((32, 32), np.uint8)
    digit[2:30, 12:20] = 255
    picture = Image.fromarray(digit)
    if mode in ("RGBA", "LA"):  # black strokes on nothing: as on paper
        picture = Image.merge("LA", (Image.new("L", picture.size), picture)).convert(mode)
    elif mode == "I;16":
        picture = Image.fromarray(digit.astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / "picture.png")
    strokes, inverted = read_strokes(tmp_path / "picture.png", 8)
    assert inverted == (mode in ("RGBA", "LA"))
    np.testing.assert_allclose(strokes[2:6, 3:5], 1.0, atol=1e-3)
    np.testing.assert_allclose(strokes[:, [0, 1, 6, 7]], 0.0, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(200, 200), (300, 160), (50, 90)])
def test_small_digit_is_cut_out(tmp_path, digits, height, width):
    small = digits[3].repeat(4, 0).repeat(4, 1)
    canvas = np.zeros((height, width), np.float32)
    canvas[10:42, 30:62] = small
    Image.fromarray((canvas * 255).astype(np.uint8)).save(tmp_path / "page.png")
    strokes, _ = read_strokes(tmp_path / "page.png", 8)
    # All of the strokes are there, and they reach from edge to edge.
    assert strokes.max(1)[[0, -1]].min() > 0.3
    correlation = np.corrcoef(strokes.ravel(), digits[3].ravel())[0, 1]
    assert correlation > 0.9


def test_blank_picture_has_no_strokes(tmp_path):
    Image.new("L", (20, 30), "white").save(tmp_path / "blank.png")
    strokes, _ = read_strokes(tmp_path / "blank.png", 8)
    np.testing.assert_array_equal(strokes, 0)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png"):
        read_strokes(path, 8)

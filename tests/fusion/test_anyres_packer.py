"""The packer of any-resolution images: the tokens of transformers' LLaVA-NeXT, packed and placed alike."""

import math

import hypothesis.strategies as st
import pytest
import torch
from fusion.test_anyres import packed_by_transformers
from hypothesis import example, given
from torch import Tensor

from pyvlm.nn import AnyResPacker
from pyvlm.ops.tiling import anyres_index, anyres_tokens

PINPOINTS = [(28, 56), (56, 28), (56, 56), (84, 28), (28, 84)]
TILE, SIDE, WIDTH = 28, 3, 5
SIZES = [(28, 28), (1, 1000), (1000, 1), (37, 60), (200, 130)]
sizes = st.tuples(st.integers(1, 2000), st.integers(1, 2000))


def packer(dtype: torch.dtype = torch.float64, **options: bool) -> AnyResPacker:
    return AnyResPacker(WIDTH, PINPOINTS, TILE, SIDE, **options).to(dtype)


def features_of(image_sizes: list[tuple[int, int]], module: AnyResPacker) -> Tensor:
    return torch.randn(sum(map(module.num_maps, image_sizes)), SIDE**2, WIDTH, dtype=torch.float64)


@given(image_sizes=st.lists(sizes, min_size=1, max_size=4), newline=st.booleans())
@example(image_sizes=SIZES, newline=True)
def test_packs_as_transformers_does(image_sizes: list[tuple[int, int]], newline: bool) -> None:
    module = packer(newline=newline)
    features = features_of(image_sizes, module)
    maps = features.split([module.num_maps(size) for size in image_sizes])
    expected, expected_lengths = packed_by_transformers(maps, image_sizes, PINPOINTS, TILE, module.newline)
    packed, lengths = module(features, image_sizes)
    assert torch.equal(packed, torch.cat(expected))
    assert lengths == expected_lengths == [module.num_tokens(size) for size in image_sizes]


@given(image_size=sizes, newline=st.booleans(), unpad=st.booleans())
def test_the_number_of_tokens_is_the_length_of_the_index(
    image_size: tuple[int, int], newline: bool, unpad: bool
) -> None:
    _, (length,) = anyres_index([image_size], PINPOINTS, TILE, SIDE, newline, unpad=unpad)
    assert anyres_tokens(image_size, PINPOINTS, TILE, SIDE, newline, unpad) == length


def test_padding_stays_on_demand() -> None:
    module, image_size = packer(unpad=False), (28, 40)  # on a canvas of (28, 56)
    features = features_of([image_size], module)
    packed, (length,) = module(features, [image_size])
    assert length == module.num_tokens(image_size) == SIDE**2 + SIDE * (2 * SIDE + 1)
    first_row = torch.cat([features[1, :SIDE], features[2, :SIDE], module.newline[None]])
    assert torch.equal(packed[SIDE**2 :][: 2 * SIDE + 1], first_row)
    assert packer().num_tokens(image_size) == SIDE**2 + SIDE * (2 * SIDE + 1 - 2)


def test_a_base_view_may_stand_alone() -> None:
    module = packer()
    features = features_of([(28, 50)], module)[:1]
    packed, lengths = module(features, [(28, 50)], num_maps=[1])
    assert torch.equal(packed, torch.cat([features[0], module.newline[None]]))
    assert lengths == [SIDE**2 + 1]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_placing_is_packing_into_the_text(backend: str) -> None:
    module = AnyResPacker(WIDTH, PINPOINTS, TILE, SIDE, backend=backend).double()
    features = features_of(SIZES, module)
    packed, lengths = module(features, SIZES)
    first = torch.tensor([False] * 2 + [True] * sum(lengths[:3]) + [False])  # three images side by side
    second = torch.tensor([True] * lengths[3] + [False] * 4 + [True] * lengths[4])
    mask = torch.nn.utils.rnn.pad_sequence([first, second], batch_first=True)
    text = torch.randn(*mask.shape, WIDTH, dtype=torch.float64)
    placed = module.place(text, features, mask, SIZES)
    assert torch.equal(placed[mask], packed)
    assert torch.equal(placed[~mask], text[~mask])


@pytest.mark.parametrize("placed", [False, True])
def test_gradients(placed: bool) -> None:
    """Of the newline, the features and the text."""
    module = packer()
    image_sizes = [(28, 50), (60, 20)]
    features = features_of(image_sizes, module).requires_grad_()
    mask = torch.ones(1, 3 + sum(map(module.num_tokens, image_sizes)), dtype=torch.bool)
    mask[:, :3] = False
    text = torch.randn(*mask.shape, WIDTH, dtype=torch.float64, requires_grad=True)

    def run(newline: Tensor, features: Tensor, text: Tensor) -> Tensor:
        assert newline is module.newline  # which gradcheck changes in place
        if placed:
            return module.place(text, features, mask, image_sizes)
        return module(features, image_sizes)[0]

    inputs = (module.newline, features, text)
    assert torch.autograd.gradcheck(run, inputs, check_undefined_grad=False)
    run(*inputs).sum().backward()
    newlines = sum(num_newlines(size, module) for size in image_sizes)
    assert torch.equal(module.newline.grad, torch.full((WIDTH,), float(newlines), dtype=torch.float64))


def num_newlines(image_size: tuple[int, int], module: AnyResPacker) -> int:
    without = AnyResPacker(WIDTH, PINPOINTS, TILE, SIDE, newline=False)
    return module.num_tokens(image_size) - without.num_tokens(image_size)


def test_the_newline_begins_as_that_of_transformers() -> None:
    wide = AnyResPacker(4096, PINPOINTS, TILE, SIDE)
    assert wide.newline.shape == (4096,)
    assert math.isclose(wide.newline.detach().std().item(), 4096**-0.5, rel_tol=0.05)
    assert packer(newline=False).newline is None


def test_what_does_not_fit_is_refused() -> None:
    module = packer()
    features = features_of([(28, 50), (28, 50)], module)
    with pytest.raises(ValueError, match=r"features must be \[3, 9, 5\].*1 images.*got \[6, 9, 5\]"):
        module(features, [(28, 50)])
    with pytest.raises(ValueError, match=r"features must be \[6, 9, 5\].*got \[6, 9, 4\]"):
        module(features[..., :4], [(28, 50), (28, 50)])
    with pytest.raises(ValueError, match=r"not all multiples of the tile of 28"):
        AnyResPacker(WIDTH, [(28, 57)], TILE, SIDE)
    mask = torch.ones(1, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match="sample 0 has 7 image placeholders"):
        module.place(torch.randn(1, 7, WIDTH).double(), features[:3], mask, [(28, 50)])

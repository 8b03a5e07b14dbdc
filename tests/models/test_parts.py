"""Which parameters belong to which part, and that a locked part stays bit for bit."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_vlm_forward import labelled
from tiny_vlm import batch, pictures, tiny_vlm, tokens

from pyvlm.models import VLM, LoRAConfig, PartialLoRAConfig, hash_parts, with_adapters

COARSE = ["vision", "fusion", "connector", "language", "moe"]
FINER = ("vision.conv", "language.embeddings")


def model_of(kind: str) -> VLM:
    model = tiny_vlm(tie_embeddings=False)
    if kind == "plain":
        return model
    adapters: dict[str, Any] = {
        "lora": {"lora": LoRAConfig(rank=2)},
        "partial_lora": {"partial_lora": PartialLoRAConfig(rank=2)},
    }
    return with_adapters(model, **adapters[kind])


def step(model: VLM, parts: list[str], finer: Sequence[str] = ()) -> None:
    """One optimizer step in which only `parts` learn."""
    learning = []
    for name, parameters in model.parts(finer).items():
        for parameter in parameters:
            parameter.requires_grad_(name in parts)
        learning += parameters if name in parts else []
    input_ids, real = batch(tokens(2, "image", 9), tokens(1, "image", "image", 6))
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.1)
    model.train()(input_ids, pictures(3), real, labelled(input_ids, real)).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("finer", [(), FINER])
@pytest.mark.parametrize("kind", ["plain", "lora", "partial_lora"])
def test_each_parameter_is_in_one_part(kind: str, finer: Sequence[str]) -> None:
    model = model_of(kind)
    parts = model.parts(finer)
    assert set(parts) == {*COARSE, *finer, kind} - {"plain"}
    assert all(parts.values())
    ids = [id(p) for parameters in parts.values() for p in parameters]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}
    if finer:
        assert parts["vision.conv"] == list(model.vision_towers["conv"].parameters())
        assert parts["vision"] == list(model.vision_towers["vit"].parameters())
        heads = [model.language.embed_tokens.weight, model.language.lm_head.weight]
        assert {id(p) for p in parts["language.embeddings"]} == {id(p) for p in heads}


def test_an_unknown_piece_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'vision\.vat' is unknown; expected one of language\.embeddings"):
        model_of("plain").parts(["vision.vat"])


@pytest.mark.parametrize("part", [*COARSE, *FINER, "lora", "partial_lora"])
def test_what_is_locked_stays_bit_for_bit(part: str) -> None:
    model = model_of(part if "lora" in part else "plain")
    finer = [part] if "." in part else []
    before = hash_parts(model, finer)
    step(model, [part], finer)
    after = hash_parts(model, finer)
    assert [name for name in before if before[name] != after[name]] == [part]


def test_locked_image_tuning() -> None:
    """LiT (arXiv 2111.07991): all but the encoders learns; here, all but one of them too."""
    model = model_of("plain")
    before = hash_parts(model, ["vision.vit"])
    step(model, [name for name in before if name != "vision.vit"], ["vision.vit"])
    after = hash_parts(model, ["vision.vit"])
    assert [name for name in before if before[name] == after[name]] == ["vision.vit"]


def test_a_hash_sees_one_bit_the_type_and_the_shape() -> None:
    model = model_of("plain")
    before = hash_parts(model)
    assert hash_parts(model) == before
    parameter = model.connector[0].bias
    with torch.no_grad():
        parameter.view(torch.int64)[3] ^= 1
    assert [name for name, digest in hash_parts(model).items() if digest != before[name]] == ["connector"]
    with torch.no_grad():
        parameter.view(torch.int64)[3] ^= 1
    assert hash_parts(model) == before
    flat = torch.nn.Parameter(model.connector[0].weight.detach().flatten())
    model.connector[0].weight = flat
    assert hash_parts(model)["connector"] != before["connector"]
    assert hash_parts(model.bfloat16()).keys() == before.keys()

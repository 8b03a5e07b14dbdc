"""What a connector's parts take of a whole training step, and so what making them faster can gain.

    python docs/connector_share.py [--images 4] [--layers 24] [--dtype bf16]

A LLaVA-like model of random weights: CLIP-L/14 at 336 pixels (frozen, all 24 levels kept), `merge_levels`,
the merge into the text, a language model of Qwen2-0.5B's shape, and its head and loss with 15 % of all rows
supervised. Each part is run forward and backward by itself, in plain PyTorch and by pyvlm, and its median
time stands beside the sum over all parts.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvlm.ops import linear_cross_entropy, merge_levels, place_image_tokens

PATCHES, VISION_WIDTH, VISION_LEVELS = 576, 1024, 24
WIDTH, WORDS, TEXT, SUPERVISED = 896, 151_936, 128, 107
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Part(NamedTuple):
    name: str
    inputs: list[Tensor]
    plain: Callable[..., Tensor]
    pyvlm: Callable[..., Tensor] | None  # None: pyvlm leaves this part to others


def encoder(images: int, dtype: torch.dtype) -> Part:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4096,
        num_hidden_layers=VISION_LEVELS,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    model = CLIPVisionModel(config).to(dtype).requires_grad_(False)
    pixels = torch.randn(images, 3, 336, 336, dtype=dtype)
    return Part("vision encoder, forward only", [], lambda: model(pixels).last_hidden_state, None)


def fusion(images: int, dtype: torch.dtype) -> Part:
    levels = [torch.randn(images, PATCHES, VISION_WIDTH, dtype=dtype) for _ in range(VISION_LEVELS)]
    weight = torch.randn(WIDTH, VISION_WIDTH, dtype=dtype) * VISION_WIDTH**-0.5
    alpha, bias = (
        torch.full((VISION_LEVELS,), 1 / VISION_LEVELS, dtype=dtype),
        torch.zeros(WIDTH, dtype=dtype),
    )

    def plain(alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        merged = torch.zeros(())
        for i, level in enumerate(levels):
            merged = merged + alpha[i] * F.linear(F.layer_norm(level, level.shape[-1:]), weight, bias)
        return merged

    return Part(
        f"fusion of {VISION_LEVELS} levels",
        [alpha, weight, bias],
        plain,
        lambda alpha, weight, bias: merge_levels(levels, alpha, weight, bias),
    )


def placement(images: int, dtype: torch.dtype) -> Part:
    mask = torch.zeros(images, PATCHES + TEXT, dtype=torch.bool)
    mask[:, 8 : 8 + PATCHES] = True
    text = torch.randn(*mask.shape, WIDTH, dtype=dtype)
    features = torch.randn(images * PATCHES, WIDTH, dtype=dtype)

    def plain(text: Tensor, features: Tensor) -> Tensor:
        return text.masked_scatter(mask.unsqueeze(-1).expand_as(text), features)

    return Part(
        "merge into the text",
        [text, features],
        plain,
        lambda text, features: place_image_tokens(text, features, mask),
    )


def language(images: int, layers: int, dtype: torch.dtype) -> Part:
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        hidden_size=WIDTH,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=8,
    )
    model = Qwen2Model(config).to(dtype)
    embeds = torch.randn(images, PATCHES + TEXT, WIDTH, dtype=dtype)
    return Part(
        f"language model, {layers} layers",
        [embeds, *model.parameters()],
        lambda embeds, *_: model(inputs_embeds=embeds, use_cache=False).last_hidden_state,
        None,
    )


def loss(images: int, dtype: torch.dtype) -> Part:
    tokens = images * (PATCHES + TEXT)
    labels = torch.full((tokens,), -100)
    labels.view(images, -1)[:, -SUPERVISED:] = torch.randint(WORDS, (images, SUPERVISED))
    hidden = torch.randn(tokens, WIDTH, dtype=dtype)
    weight = torch.randn(WORDS, WIDTH, dtype=dtype) * WIDTH**-0.5
    return Part(
        f"head and loss, {images * SUPERVISED} of {tokens} rows",
        [hidden, weight],
        lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight).float(), labels),
        lambda hidden, weight: linear_cross_entropy(hidden, weight, labels),
    )


def seconds(function: Callable[..., Tensor], inputs: Sequence[Tensor], repeats: int) -> float:
    """Median time of one forward and backward."""
    times = []
    for _ in range(repeats + 1):  # the first warms up
        begin = time.perf_counter()
        out = function(*inputs)
        if inputs:
            torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)
        times.append(time.perf_counter() - begin)
        del out
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    torch.manual_seed(0)
    rows = []
    for build in (
        lambda: encoder(args.images, dtype),
        lambda: fusion(args.images, dtype),
        lambda: placement(args.images, dtype),
        lambda: language(args.images, args.layers, dtype),
        lambda: loss(args.images, dtype),
    ):
        part = build()  # one at a time: none of them stays in memory
        inputs = [tensor.requires_grad_() for tensor in part.inputs]
        plain = seconds(part.plain, inputs, args.repeats)
        own = plain if part.pyvlm is None else seconds(part.pyvlm, inputs, args.repeats)
        rows.append((part.name, plain, own))
    plain_total, own_total = (sum(row[i] for row in rows) for i in (1, 2))
    print("| part | PyTorch, s | share | with pyvlm, s | share |")
    print("| --- | --- | --- | --- | --- |")
    for name, plain, own in [*rows, ("all", plain_total, own_total)]:
        shares = f"{plain / plain_total:.1%}", f"{own / own_total:.1%}"
        print(f"| {name} | {plain:.3f} | {shares[0]} | {own:.3f} | {shares[1]} |")


if __name__ == "__main__":
    main()

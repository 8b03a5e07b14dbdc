"""What a batch is and whether it fits: its device, layout and next-token labels, and all checks of values.

Shapes: B samples, L new tokens, K all tokens so far, N images in reading order.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyvlm.layout import IMAGE, PADDING, TokenLayout
from pyvlm.models.config import VLMConfig
from pyvlm.models.processor import IGNORED
from pyvlm.models.tiling import check_lengths, check_sizes, host_sizes, image_lengths, number_images


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What `Processor.collate` gives, on a device; image sizes stay on the CPU, where they are read.

    A GPU is not waited for: from memory that the system may move, a copy would wait for all that was asked of
    the GPU before.
    """
    on_gpu = device.type == "cuda"

    def moved(tensor: Tensor) -> Tensor:
        source = tensor.pin_memory() if on_gpu and tensor.is_cpu else tensor
        return source.to(device, non_blocking=on_gpu)

    return {
        name: value if value is None or name == "image_sizes" else moved(value)
        for name, value in batch.items()
    }


def default_layout(
    config: VLMConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    image_sizes: Tensor | None = None,
    documents: Tensor | None = None,
) -> TokenLayout:
    """The layout of a batch, whose rows are one document each where no `documents` are given.

    Every `tokens_per_image` placeholders are one image; with tiling, an image has as many as its size in
    `image_sizes` [N, 2] takes. For rule "prefix", the prefix is all of a document that is before its first
    label, or all where there are no labels.
    """
    if attention_mask is None and documents is not None:
        attention_mask = documents >= 0
    layout = TokenLayout.from_input_ids(input_ids, config.image_token_id, attention_mask)
    is_image = layout.kind == IMAGE
    # By count and not by runs of placeholders: two images may stand side by side.
    if config.tiling is not None:
        image = number_images(is_image, image_lengths(config, host_sizes(image_sizes)))
    else:
        image = torch.where(is_image, (is_image.cumsum(1) - 1) // config.tokens_per_image, -1).int()
    document = layout.document if documents is None else documents
    prefix = None
    if config.language.attention_rule == "prefix":
        prefix = layout.kind != PADDING
        if labels is not None:
            prefix &= _count_in_documents(labels != IGNORED, document) == 0
    return TokenLayout(layout.kind, image, document, prefix)


def _count_in_documents(counted: Tensor, document: Tensor) -> Tensor:
    """How many tokens of its document are counted up to each token, itself included: int64 [B, L]."""
    count = counted.cumsum(1)
    starts = torch.ones_like(counted)
    starts[:, 1:] = document.diff(dim=1) != 0
    return count - torch.where(starts, count - counted.long(), 0).cummax(1).values


def next_labels(labels: Tensor, layout: TokenLayout) -> Tensor:
    """Each token's label, int64 [B, L]: the next token's, unless that one begins another document."""
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:].masked_fill(layout.document.diff(dim=1) != 0, IGNORED)
    return shifted


def check_inputs(
    config: VLMConfig,
    input_ids: Tensor,
    images: Tensor | None,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    image_sizes: Tensor | None = None,
) -> None:
    """Raises TypeError or ValueError where the tensors of a batch do not fit the model or each other.

    Values are read on the CPU only: reading them would stall another device.
    """
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise ValueError(
            f"input_ids must be int64 [batch, length], got {input_ids.dtype} {list(input_ids.shape)}"
        )
    for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {list(input_ids.shape)}, got {list(tensor.shape)}"
            )
    size, channels = config.image.size, config.image.channels
    if images is not None and (images.dim() != 4 or images.shape[1:] != (channels, size, size)):
        raise ValueError(
            f"images must be [images, {channels}, {size}, {size}] for this model, got {list(images.shape)}"
        )
    if images is not None and not images.is_floating_point():
        raise TypeError(f"images must be floating, as Processor gives them, got {images.dtype}")
    check_sizes(config, images, image_sizes)
    if not input_ids.is_cpu or torch.compiler.is_compiling():
        return
    outside = (input_ids < 0) | (input_ids >= config.language.vocab_size)
    if outside.any():
        sample, token = outside.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids[{sample}, {token}] is {input_ids[sample, token]}, outside the vocabulary of "
            f"{config.language.vocab_size}: was it made with another tokenizer?"
        )
    if images is not None and not (finite := images.isfinite().flatten(1).all(1)).all():
        number = finite.logical_not().nonzero()[0].item()
        raise ValueError(f"image {number} of the batch has NaN or infinite pixels")
    placeholders = (input_ids == config.image_token_id).sum(1).tolist()
    if config.tiling is None:
        _check_counts(config.tokens_per_image, placeholders, 0 if images is None else len(images))
    else:
        sizes = host_sizes(image_sizes)
        check_lengths(placeholders, sizes, image_lengths(config, sizes))


def _check_counts(each: int, placeholders: list[int], num_images: int) -> None:
    for sample, count in enumerate(placeholders):
        if count % each:
            raise ValueError(
                f"sample {sample} has {count} image placeholders, and each image takes {each}: "
                "expand every image to whole blocks of placeholders"
            )
    if sum(placeholders) != num_images * each:
        wanted = ", ".join(f"sample {i}: {count // each}" for i, count in enumerate(placeholders) if count)
        raise ValueError(
            f"input_ids has placeholders for {sum(placeholders) // each} images ({wanted or 'none'}; "
            f"{each} placeholders an image), but {num_images} images were given"
        )

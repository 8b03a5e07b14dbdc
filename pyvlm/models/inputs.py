"""What a batch is and whether it fits: its layout, its next-token labels, and every check of its values.

Shapes: B samples, L new tokens, K all tokens so far, N images in reading order.
"""

import torch
from torch import Tensor

from pyvlm.layout import IMAGE, PADDING, TokenLayout
from pyvlm.models.config import VLMConfig
from pyvlm.models.processor import IGNORED
from pyvlm.models.tiling import check_lengths, check_sizes, host_sizes, image_lengths, number_images


def default_layout(
    config: VLMConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    image_sizes: Tensor | None = None,
) -> TokenLayout:
    """The layout of rows that are one document each; every `tokens_per_image` placeholders are one image.

    With tiling, an image has as many placeholders as its size in `image_sizes` [N, 2] takes.

    For rule "prefix", the prefix is all that is before the first label, or all where there are no labels.
    """
    layout = TokenLayout.from_input_ids(input_ids, config.image_token_id, attention_mask)
    is_image = layout.kind == IMAGE
    # By count and not by runs of placeholders: two images may stand side by side.
    if config.tiling is not None:
        image = number_images(is_image, image_lengths(config, host_sizes(image_sizes)))
    else:
        image = torch.where(is_image, (is_image.cumsum(1) - 1) // config.tokens_per_image, -1).int()
    prefix = None
    if config.language.attention_rule == "prefix":
        prefix = layout.kind != PADDING
        if labels is not None:
            prefix &= (labels != IGNORED).cumsum(1) == 0
    return TokenLayout(layout.kind, image, layout.document, prefix)


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

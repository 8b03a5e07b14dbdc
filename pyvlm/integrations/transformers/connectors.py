"""Connectors of transformers' models on pyvlm's ops: the few that have passes over memory to lose.

- Mistral 3's patch merger (also LightOnOCR's and Mistral Large 4's) loops over images and copies each three
  times, across the grain: here one gather and one transposition serve all images, to the same bits. On one
  CPU thread 1.1 (fp32) and 1.5 times (bf16) as fast for four images of 24 × 24 patches, 1.5 and 1.7 times
  for one of 110 × 110, no faster for one of 10 × 10. Beside the two larger products that follow, 1.0.
- Gemma 3's projector (also T5Gemma 2's) transposes the whole map to pool it: here it is pooled as it lies. On
  one CPU thread 1.3 to 1.6 (fp32) and 1.8 to 2.4 times (bf16) as fast for one image of 64 × 64 patches.

The others stay as they are. Those of LLaVA, LLaVA-NeXT and -OneVision and PaliGemma are linear layers, which
are served as such. Qwen-VL's mergers and ViP-LLaVA's projector add one norm. The pixel shuffle of Idefics 3
and SmolVLM would be one copy instead of two, which is lost beside the product that follows: 0.98 to 1.04
times as fast. More products follow InternVL's and Llama 4's. Molmo 2 pools by attention.

Two passes over memory have no official hook: a line of the models' own forwards merges image features into
the text embeddings (`masked_scatter`), and LLaVA-NeXT's `pack_image_features` is a method of the model. The
class of a model itself is not replaced: transformers finds by it which outputs the model can give.

`accelerate` calls `apply` on a model that is there. `register` is for models yet to be made.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.monkey_patching import (
    get_patch_mapping,
    register_patch_mapping,
    unregister_patch_mapping,
)

from pyvlm.integrations.transformers.changes import Change
from pyvlm.integrations.transformers.replacement import home_of, replacement, swap
from pyvlm.ops.grids import fuse_grids
from pyvlm.ops.placement import pack_image_tokens
from pyvlm.ops.tiling import pixel_shuffle_index


class PatchMerger(nn.Module):
    """`Mistral3PatchMerger`: k × k neighbouring patches become one token, by a linear layer."""

    KERNEL = "pyvlm.ops.pack_image_tokens"
    merging_layer: nn.Linear
    patch_size: int
    spatial_merge_size: int

    def forward(self, image_features: Tensor, image_sizes: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Patches [R, C] of all images, whose sizes are given in pixels [images, 2] → [R / k², C].

        Raises:
            ValueError: the sizes stand for another number of patches.
        """
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        grids = [(int(height) // self.patch_size, int(width) // self.patch_size) for height, width in sizes]
        patches = sum(rows * columns for rows, columns in grids)
        if patches != image_features.shape[0]:
            raise ValueError(
                f"image_features has {image_features.shape[0]} patches, but image_sizes stand for {patches}"
            )
        index = _block_index(grids, self.spatial_merge_size).to(image_features.device, non_blocking=True)
        blocks = pack_image_tokens(image_features, index)
        # The weight's columns go channel by channel, the patches of a block lie side by side.
        merged: Tensor = self.merging_layer(
            blocks.unflatten(1, (index.shape[1], -1)).transpose(1, 2).flatten(1)
        )
        return merged


class PoolingProjector(nn.Module):
    """`Gemma3MultiModalProjector`: average pool, norm, product."""

    KERNEL = "pyvlm.ops.fuse_grids"
    mm_input_projection_weight: nn.Parameter
    mm_soft_emb_norm: nn.Module
    patches_per_image: int
    kernel_size: int

    def forward(self, vision_outputs: Tensor) -> Tensor:
        """A square map [N, T, C] → [N, T / k², H]."""
        if self.patches_per_image % self.kernel_size:  # the rest is dropped, where pyvlm's pool would stretch
            kept: Tensor = super().forward(vision_outputs)
            return kept
        side, tokens = self.patches_per_image, self.patches_per_image // self.kernel_size
        pooled = fuse_grids([vision_outputs], [(side, side)], (tokens, tokens), mode="area")
        projected = torch.matmul(self.mm_soft_emb_norm(pooled), self.mm_input_projection_weight)
        return projected.type_as(vision_outputs)


Form = type[PatchMerger] | type[PoolingProjector]
# class -> the folder of transformers.models that it lives in, and what takes its place
SERVED: dict[str, tuple[str, Form]] = {
    "Mistral3PatchMerger": ("mistral3", PatchMerger),
    "MistralLarge4PatchMerger": ("mistral_large4", PatchMerger),
    "LightOnOcrPatchMerger": ("lighton_ocr", PatchMerger),
    "Gemma3MultiModalProjector": ("gemma3", PoolingProjector),
    "T5Gemma2MultiModalProjector": ("t5gemma2", PoolingProjector),
}


def apply(model: nn.Module) -> list[Change]:
    """Gives the connectors of a model that is there pyvlm's forward; nothing but their class changes."""
    changes = []
    for path, module in model.named_modules():
        name = type(module).__name__
        if name not in SERVED or type(module).__module__ not in (_home(name), __name__):
            continue
        form = SERVED[name][1]
        reason = _why_not(module)
        if reason is not None:
            changes.append(Change(path, "connector", None, reason))
        elif isinstance(module, form):
            changes.append(Change(path, "connector", form.KERNEL, "by the registered mapping"))
        else:
            changes.append(Change(path, "connector", form.KERNEL, undo=swap(module, _replacement(name))))
    return changes


def register() -> None:
    """Has `from_pretrained` and `from_config` make models with pyvlm's connectors from now on.

    It holds for everyone in this process, so nothing in pyvlm calls it. If making a model raises meanwhile,
    transformers leaves the replaced classes in its own modules.

    Raises:
        ValueError: another replacement is registered for one of the classes.
        ImportError: this transformers cannot apply a mapping here, as 5.17 without torchvision.
    """
    _check_that_modules_can_be_listed()
    present, ours = get_patch_mapping(), _mapping()
    taken = [key for key in ours if present.get(key, ours[key]) is not ours[key]]
    if taken:
        raise ValueError(f"a replacement other than pyvlm's is registered for {', '.join(taken)}")
    register_patch_mapping(ours, overwrite=True)


def unregister() -> None:
    """Takes back what `register` did; models made meanwhile stay as they are."""
    present = get_patch_mapping()
    unregister_patch_mapping([key for key, made in _mapping().items() if present.get(key) is made])


def __getattr__(name: str) -> Any:
    """The replacements by the names of the originals: pickle looks for them here."""
    if name not in SERVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _replacement(name)


def _replacement(name: str) -> Any:
    form: Any  # to mypy a union of classes has no hash
    folder, form = SERVED[name]
    return replacement(form, folder, name, __name__)


def _why_not(module: Any) -> str | None:
    """Why a module of a served class keeps the forward that it has."""
    if "forward" in vars(module):
        return "a hook has taken the place of its forward"
    if "kernel_size" in vars(module) and module.patches_per_image % module.kernel_size:
        return (
            f"windows of {module.kernel_size} leave a rest of its {module.patches_per_image} patches a side, "
            "which pyvlm's pool would not drop"
        )
    return None


def _mapping() -> dict[str, type[nn.Module]]:
    """What is registered, for the models that are installed. A key is a pattern that matches whole names."""
    installed = [name for name, (folder, _) in SERVED.items() if find_spec(f"transformers.models.{folder}")]
    return {f"^{name}$": _replacement(name) for name in installed}


def _check_that_modules_can_be_listed() -> None:
    """To apply a mapping transformers lists its modules; some of old versions import what may be missing."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("transformers"):
            try:
                dir(module)
            except ImportError as error:
                raise ImportError(
                    f"transformers {transformers.__version__} cannot apply a patch mapping here ({error}): "
                    "install what is missing, or call pyvlm.accelerate on the model instead"
                ) from error


def _home(name: str) -> str:
    return home_of(SERVED[name][0])


def _block_index(grids: Sequence[tuple[int, int]], side: int) -> Tensor:
    """int32 [blocks, side²]: the rows of the patches of each block; what an edge leaves over is in none."""
    pieces, first = [], 0
    for rows, columns in grids:
        patches = torch.arange(first, first + rows * columns, dtype=torch.int32).view(rows, columns)
        kept = patches[: rows // side * side, : columns // side * side]
        pieces.append(kept.flatten()[pixel_shuffle_index((kept.shape[0], kept.shape[1]), side)])
        first += rows * columns
    return torch.cat(pieces)

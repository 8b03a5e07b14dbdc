"""LLaVA and LLaVA-NeXT of transformers, taken apart into what a VLM is made of.

transformers is imported when the first of them is asked for, and never runs code of a checkpoint. The vision
tower and the language model read their weights themselves; the connector's are read here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pyvlm.models.encoders import read_folder
from pyvlm.models.pretrained_language import weight_files
from pyvlm.models.pretrained_tokenizer import read_pretrained_tokenizer

if TYPE_CHECKING:
    from pyvlm.models.vlm import VLM

# What LLaVA does with the first token of each encoder: it leaves out CLIP's class token, and SigLIP has none.
STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full"}
# LLaVA has two linear layers always; with no activation between them, the second one must do nothing.
CONNECTORS = {"gelu": "mlp2x_gelu", "linear": "linear"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class LlavaFolder:
    """What a folder says of its model, as entries of `VLMConfig`.

    Attributes:
        image, tiling: of the image processor; tiling is None for LLaVA.
        tower: of the vision tower, but for its name; its weights are to come from the folder.
        connector: its kind.
        image_token: what stands for an image, and is repeated.
        max_length: tokens that the language model was made for.
    """

    image: dict[str, Any]
    tiling: dict[str, Any] | None
    tower: dict[str, Any]
    connector: str
    image_token: str
    max_length: int | None


def read_vlm(folder: str) -> LlavaFolder:
    """What a folder of transformers says of its LLaVA.

    Raises:
        ValueError: no such folder, transformers is missing, or another architecture; or settings that a VLM
            of pyvlm does not have: one message that names all of them.
    """
    given, _ = read_folder(folder)
    if (model_type := given.get("model_type")) not in ("llava", "llava_next"):
        raise ValueError(
            f"{folder}: model_type {model_type!r} cannot be taken apart; expected llava or llava_next"
        )
    config = _config(folder, given)
    tiles = model_type == "llava_next"
    token = read_pretrained_tokenizer(folder).tokenizer.id_to_token(config.image_token_id)
    pixels = _image_processor(folder)
    side = config.vision_config.image_size
    fit, reasons = _fit(pixels, side, tiles)
    reasons += _reasons(config, tiles)
    if token is None:
        reasons.append(f"image_token_index={config.image_token_id}, which its tokenizer does not have")
    if reasons:
        raise ValueError(f"{folder}: {model_type} with {'; '.join(reasons)}: pyvlm's VLM does not have this")
    resample = RESAMPLE[pixels["resample"]]
    levels = config.vision_feature_layer
    levels = [levels] if isinstance(levels, int) else list(levels)
    normalization = {"mean": pixels["image_mean"], "std": pixels["image_std"]}
    image = {"size": side, "fit": fit, **normalization} | ({} if tiles else {"resample": resample})
    tiling = {"grid_pinpoints": [list(p) for p in config.image_grid_pinpoints]} if tiles else None
    return LlavaFolder(
        image=image,
        tiling=None if tiling is None else tiling | {"resample": resample},
        tower={
            "type": "transformers",
            "pretrained": folder,
            "levels": levels,
            "image_size": side,
            **normalization,
            **({"merge": "concat"} if len(levels) > 1 else {}),
        },
        connector=CONNECTORS[config.projector_hidden_act],
        image_token=str(token),
        max_length=getattr(config.get_text_config(), "max_position_embeddings", None),
    )


def load_connector(model: "VLM", folder: str) -> None:
    """Gives a model the connector of a folder of `read_vlm` and, with tiling, its newline.

    Raises:
        ValueError: weights that are missing, damaged, or of a wrong shape: one error that names them.
    """
    tensors = _read_tensors(folder)
    wanted: dict[str, Tensor] = {}
    layers = [module for module in model.connector.modules() if isinstance(module, nn.Linear)]
    for number, layer in enumerate(layers, start=1):
        wanted |= {f"multi_modal_projector.linear_{number}.{n}": p for n, p in layer.named_parameters()}
    if model.image_packer is not None and model.image_packer.newline is not None:
        wanted["image_newline"] = model.image_packer.newline
    defects = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    defects += [
        f"{name} is {list(tensors[name].shape)} and must be {list(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if len(layers) == 1 and not _does_nothing(tensors):
        defects.append("multi_modal_projector.linear_2 is not the identity, behind no activation")
    if defects:
        raise ValueError(f"{folder} does not fit the connector of its config: {'; '.join(sorted(defects))}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def _config(folder: str, given: Mapping[str, Any]) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError(
            f'a model of transformers needs it: pip install "pyvlm[transformers]" ({error})'
        ) from None
    try:
        return AutoConfig.for_model(**given)
    except Exception as error:  # its checks raise classes of their own
        raise ValueError(
            f"{folder}: its configuration is damaged ({' '.join(str(error).split())})"
        ) from error


def _image_processor(folder: str) -> dict[str, Any]:
    """The settings of a folder's image processor, its defaults filled in."""
    from transformers import AutoProcessor  # in 5.17 AutoImageProcessor itself needs torchvision

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        settings: dict[str, Any] = json.loads(processor.image_processor.to_json_string())
    except Exception as error:
        raise ValueError(
            f"{folder}: its image processor cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    return settings


def _reasons(config: Any, tiles: bool) -> list[str]:
    """The settings of a model that cannot be expressed."""
    vision, reasons = config.vision_config.model_type, []
    if vision not in STRATEGIES:
        reasons.append(f"a vision_config of model_type {vision!r} (known are {', '.join(STRATEGIES)})")
    elif config.vision_feature_select_strategy != STRATEGIES[vision]:
        reasons.append(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} of {vision} (expected "
            f"{STRATEGIES[vision]!r})"
        )
    if config.projector_hidden_act not in CONNECTORS:
        reasons.append(f"projector_hidden_act={config.projector_hidden_act!r}")
    if not config.multimodal_projector_bias:
        reasons.append("multimodal_projector_bias=False")
    if tiles and not getattr(config, "use_image_newline_parameter", True):
        reasons.append("use_image_newline_parameter=False")
    return reasons


def _fit(pixels: Mapping[str, Any], side: int, tiles: bool) -> tuple[str, list[str]]:
    """How an image becomes a square of the encoder's size, and the settings that cannot be expressed."""
    reasons = [
        f"{name}={pixels.get(name)!r} of its image processor"
        for name in ("do_resize", "do_rescale", "do_normalize")
        if not pixels.get(name, True)
    ]
    if pixels.get("resample") not in RESAMPLE:
        reasons.append(f"resample={pixels.get('resample')!r} of its image processor")
    if round(pixels.get("rescale_factor", 1 / 255) * 255, 6) != 1:
        reasons.append(f"rescale_factor={pixels['rescale_factor']!r} of its image processor")
    size, crop = pixels.get("size") or {}, pixels.get("crop_size") or {}
    square = {"height": side, "width": side}
    crops = pixels.get("do_center_crop", False)
    shorter = size.get("shortest_edge") == side
    fit = "stretch"
    if not tiles and pixels.get("do_pad"):
        fit = "pad"
    elif not tiles and shorter:
        fit = "crop"
    fits = (shorter and (crops or fit != "crop")) or size == square
    if not fits or (crops and crop != square):
        reasons.append(
            f"size={size} and {'crop_size' if crops else 'no crop'}={crop} of its image processor for an "
            f"encoder of {side}"
        )
    if tiles and not pixels.get("do_pad", True):
        reasons.append("do_pad=False of its image processor")
    return fit, reasons


def _read_tensors(folder: str) -> dict[str, Tensor]:
    """The weights of projector and newline, by the last two parts of their names."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(Path(folder)):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # a file of safetensors is no mapping
                    _, found, rest = name.rpartition("multi_modal_projector.")
                    if found:
                        tensors[found + rest] = file.get_tensor(name)
                    elif name.endswith("image_newline"):
                        tensors["image_newline"] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged, truncated or not there ({error})") from error
    return tensors


def _does_nothing(tensors: Mapping[str, Tensor]) -> bool:
    weight = tensors.get("multi_modal_projector.linear_2.weight")
    bias = tensors.get("multi_modal_projector.linear_2.bias")
    if weight is None or bias is None:
        return False
    return bool(torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) and not bias.any())

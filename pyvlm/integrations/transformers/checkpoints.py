"""Checkpoints of transformers: where they lie, and whether they can be run without running code of theirs."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from pyvlm.models.checkpoint import CONFIG

# What a checkpoint is made of. Code and pickles are not among it.
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
COPIES = ("consolidated*", "original/*", "onnx/*")  # of the same weights, in other formats


def local_folder(path: str) -> Path:
    """The folder of a checkpoint; of OWNER/NAME, that of the Hugging Face hub's cache, downloaded if need be.

    Raises:
        ValueError: it is neither, or cannot be downloaded.
    """
    if (Path(path) / CONFIG).is_file():
        return Path(path)
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(
            f"{path}: no {CONFIG} there; give a folder of a model that transformers saved, or OWNER/NAME of "
            "the Hugging Face hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=[*FILES], ignore_patterns=[*COPIES]))
    except Exception as error:  # of the hub's own classes, of its HTTP client's, or OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: there is no such folder, and it cannot be had from the Hugging Face hub ({reason}): "
            "check the name and the network, or give a local folder"
        ) from error


def load_checkpoint(path: str, device: str = "cpu") -> tuple[PreTrainedModel, Any]:
    """A vision-language model of transformers and its processor, on pyvlm's kernels where these serve it.

    Only safetensors are read, in the dtype that they are stored in, and no code of the checkpoint is run.

    Args:
        path: see `local_folder`.
        device: where to compute, as torch names it.

    Raises:
        ValueError: as `local_folder`; a model that transformers itself does not have, or that is no
            vision-language model; or a file that is missing or damaged.
    """
    folder = local_folder(path)
    check_native(folder)
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # a missing library is an ImportError, a missing file an OSError, and so on
        raise ValueError(f"{path}: transformers cannot load it: {_shortened(error)}") from error
    if not hasattr(processor, "tokenizer"):
        raise ValueError(
            f"{path}: it has no processor for images and text, only a {type(processor).__name__}"
        )

    from pyvlm.integrations.transformers import accelerate

    torch.nn.Module.to(model, device).eval()
    accelerate(model)
    return model, processor


def check_native(folder: Path) -> None:
    """Raises ValueError where transformers has no class of its own for a checkpoint, or none with images."""
    config = read_config(folder)
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        code = sorted({str(name).partition("--")[2] or str(name) for name in _code(config)})
        of_its_own = f", and its own code ({', '.join(code)}) is not run" if code else ""
        raise ValueError(
            f"{folder}: transformers has no model of model_type {model_type!r}{of_its_own}: give a "
            "checkpoint that was converted to a native class"
        )
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"{folder}: model_type {model_type!r} is no vision-language model: expected one that "
            "AutoModelForImageTextToText loads"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{folder / CONFIG} must hold one JSON object")
    return content


def _code(config: dict[str, Any]) -> list[Any]:
    named = config.get("auto_map")
    return list(named.values()) if isinstance(named, dict) else []


def _shortened(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."

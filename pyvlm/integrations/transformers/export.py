"""`pyvlm export`: a VLM as a LLaVA or LLaVA-NeXT of transformers, with its weights and its files."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from pyvlm.integrations.transformers.language_config import text_config
from pyvlm.integrations.transformers.processor_files import (
    check_same_tokens,
    make_processor,
    special_token_ids,
)
from pyvlm.models.adapters import merge_lora
from pyvlm.models.checkpoint import CONFIG, replace_folder
from pyvlm.models.config import VLMConfig
from pyvlm.models.encoders import encoder_entry, read_encoder, read_folder
from pyvlm.models.pretrained_language import export_language
from pyvlm.models.pretrained_vision import TransformersTower, load_encoder
from pyvlm.models.pretrained_vlm import CONNECTORS, STRATEGIES
from pyvlm.models.processor import Processor
from pyvlm.models.tower_config import TransformersConfig
from pyvlm.models.vlm import VLM


def export(
    model: VLM,
    processor: Processor,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    base: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a model so that transformers' AutoProcessor and AutoModelForImageTextToText load it.

    Its logits are the model's, and the processor writes the same tokens (checked before anything is kept) and
    pixels; where `ImageConfig.resample` is None, transformers rounds resized pixels to 8 bits. Updates of
    `language.lora` are merged.

    A model does not keep the layers of its encoder above the level that it reads. The checkpoint has them all
    the same, as ones that do nothing, and no answer depends on them.

    Args:
        model, processor: as `pyvlm.training.chat.load_model` gives them.
        folder: a new or empty one.
        dtype: of the weights; None: the language model's own.
        base: the checkpoint of transformers that training began with: those layers are written as they are
            there.

    Raises:
        ValueError: `folder` holds something; `base` has another encoder; or LLaVA of transformers does not
            compute what the model does: one message with every reason.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: give a new folder to export to")
    if model.config.language.lora is not None:
        model = merge_lora(model)
    tokens = special_token_ids(processor)
    reasons = list(obstacles(model.config))
    language: PreTrainedConfig | None = None
    if model.config.language.moe is None and model.config.language.partial_lora is None:
        try:
            language = text_config(model.config.language, tokens)
        except ValueError as error:
            reasons.append(str(error))
    if reasons or language is None:
        raise ValueError(f"the model is none that LLaVA of transformers can be: {'; '.join(reasons)}")
    (tower,) = model.config.vision_towers
    assert isinstance(tower, TransformersConfig), "it has no obstacles"
    encoder: Mapping[str, Any] = tower.encoder
    unread: dict[str, Tensor] = {}
    if base is not None:
        encoder, unread = _encoder_of(os.fspath(base), tower)
    config = llava_config(model.config, encoder, language)
    theirs = _with_weights(model, config, unread, dtype)
    theirs.generation_config = GenerationConfig(
        eos_token_id=processor.end_token_id,
        pad_token_id=tokens["pad_token_id"],
        bos_token_id=tokens["bos_token_id"],
        suppress_tokens=[processor.image_token_id],  # as here: a placeholder is never generated
    )
    their_processor = make_processor(processor, config, tower.mean, tower.std)
    check_same_tokens(processor, their_processor)
    with replace_folder(folder) as aside:
        theirs.save_pretrained(aside)
        for path in aside.glob("*.safetensors"):  # safetensors lets nobody else read its files
            shutil.copymode(aside / CONFIG, path)
        their_processor.save_pretrained(aside)


def obstacles(config: VLMConfig) -> Iterator[str]:
    """Why LLaVA or LLaVA-NeXT of transformers does not compute what a model does, beside its decoder."""
    language = config.language
    if language.attention_rule != "causal":
        hint = (
            ' (pyvlm.accelerate(model, attention_rule="mmca") gives a causal LLaVA of transformers this rule)'
            if language.attention_rule == "mmca"
            else ""
        )
        yield f'attention_rule is {language.attention_rule!r} and would have to be "causal"{hint}'
    if language.moe is not None:
        yield "the language model has experts"
    if language.partial_lora is not None:
        yield "the language model has partial_lora, which cannot be merged"
    if config.connector not in CONNECTORS.values():
        kind = config.connector if isinstance(config.connector, str) else config.connector.type
        yield f"the connector is {kind!r} and would have to be one of {', '.join(CONNECTORS.values())}"
    if config.position_scheme != "all":
        yield f'position_scheme is {config.position_scheme!r} and would have to be "all"'
    if config.tiling is not None and not (config.tiling.unpad and config.tiling.newline):
        yield "tiling leaves out unpad or newline, which LLaVA-NeXT has"
    if config.image.channels != 3:
        yield f"images have {config.image.channels} channel and would have to have 3"
    fusion = config.fusion
    if fusion.method != "channel_concat" or fusion.hidden_size is not None or fusion.norm != "none":
        yield "there is a fusion between vision tower and connector"
    if len(config.vision_towers) > 1:
        yield f"there are {len(config.vision_towers)} vision towers and would have to be one"
    for tower in config.vision_towers:
        if isinstance(tower, TransformersConfig):
            yield from _obstacles_of_tower(config, tower)
        else:
            yield (
                f"vision tower {tower.name!r} is of type {tower.type!r} and would have to be an encoder of "
                f"transformers ({', '.join(STRATEGIES)})"
            )


def _obstacles_of_tower(config: VLMConfig, tower: TransformersConfig) -> Iterator[str]:
    name, kind, size = f"vision tower {tower.name!r}", tower.source.config.model_type, config.image.size
    if kind not in STRATEGIES:
        yield f"{name} is of model_type {kind!r} and would have to be one of {', '.join(STRATEGIES)}"
    if tower.last_norm:
        yield f"{name} has last_norm, and LLaVA takes levels without it"
    if len(tower.levels) > 1 and tower.merge != "concat":
        yield f'{name} merges its levels by {tower.merge!r} and would have to by "concat"'
    if tower.downsample or tower.align_dim is not None:
        yield f"{name} is downsampled or aligned"
    if not tower.image_size == tower.source.own_size == (size, size):
        yield (
            f"images are of {size} pixels, {name} resizes them to {tower.image_size} and was made for "
            f"{tower.source.own_size}: these would have to be the same"
        )
    if (grid := config.fusion.grid) is not None and (grid, grid) != tower.grid(size):
        yield f"fusion.grid {grid} resizes the map of {name}"
    if config.image.fit == "pad" and config.tiling is None:
        mean = config.image.mean * (3 // len(config.image.mean))
        if not all(map(math.isclose, mean, tower.mean)):
            yield (
                f"images are padded with {list(config.image.mean)}, and LLaVA's image processor pads with "
                f"the mean of the encoder, {list(tower.mean)}: train with model.image.mean as this"
            )


def llava_config(
    config: VLMConfig, encoder: Mapping[str, Any], language: PreTrainedConfig
) -> PreTrainedConfig:
    """The configuration of a model that has no `obstacles`, of an encoder and a language model."""
    (tower,) = config.vision_towers
    assert isinstance(tower, TransformersConfig), "it has no obstacles"
    one_level = len(tower.levels) == 1 and tower.levels[0] != 0  # transformers takes a bare 0 for none
    given: dict[str, Any] = {
        "vision_config": {**encoder},
        "text_config": language.to_dict(),
        "image_token_index": config.image_token_id,
        "image_seq_length": config.tokens_per_image,
        "projector_hidden_act": next(act for act, kind in CONNECTORS.items() if kind == config.connector),
        "vision_feature_select_strategy": STRATEGIES[tower.source.config.model_type],
        "vision_feature_layer": tower.levels[0] if one_level else tower.levels,
        "tie_word_embeddings": config.language.tie_embeddings,
    }
    if config.tiling is None:
        return AutoConfig.for_model("llava", **given)
    pinpoints = [list(canvas) for canvas in config.tiling.grid_pinpoints]
    return AutoConfig.for_model("llava_next", **given, image_grid_pinpoints=pinpoints)


def _encoder_of(base: str, tower: TransformersConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration of a checkpoint's vision encoder, and all its weights.

    Raises:
        ValueError: it is none that `tower` could have begun with.
    """
    given, _ = read_folder(base)
    config = AutoConfig.for_model(**given)
    vision = getattr(config, "vision_config", None)
    if vision is None or encoder_entry(read_encoder(vision.to_dict())) != tower.encoder:
        raise ValueError(
            f"{base} has another vision encoder than the model: it is not what training began with"
        )
    weights = load_encoder(vision, base)[0].state_dict()
    return vision.to_dict(), weights


def _with_weights(
    model: VLM, config: PreTrainedConfig, unread: dict[str, Tensor], dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model of transformers over the very tensors of ours, where these have its dtype.

    `unread` are weights of the encoder for what ours has no more.
    """
    dtype = model.language.embed_tokens.weight.dtype if dtype is None else dtype
    with torch.device("meta"):
        theirs: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    expected = theirs.state_dict()
    (tower,) = model.vision_towers.values()
    assert isinstance(tower, TransformersTower), "it has no obstacles"
    ours = {f"model.vision_tower.{n}": x for n, x in (unread | tower.encoder.state_dict()).items()}
    ours |= _projector(model.connector)
    if model.image_packer is not None:
        ours["model.image_newline"] = model.image_packer.newline
    state = export_language(
        model.language.state_dict(), model.config.language, config.get_text_config().model_type
    )
    for name, tensor in state.items():
        inner = name.removeprefix("model.")
        ours[name if inner == name else f"model.language_model.{inner}"] = tensor
    if model.config.language.tie_embeddings:
        ours["lm_head.weight"] = ours["model.language_model.embed_tokens.weight"]
    ours |= _idle({name: x for name, x in expected.items() if name not in ours})
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in ours.items()}
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    return theirs.eval()


def _projector(connector: nn.Module) -> dict[str, Tensor]:
    """The weights of LLaVA's two linear layers; the second does nothing where ours has one."""
    layers = [module for module in connector.modules() if isinstance(module, nn.Linear)]
    if len(layers) == 1:
        width = layers[0].out_features
        second = nn.Linear(width, width, device="meta")
        second.load_state_dict({"weight": torch.eye(width), "bias": torch.zeros(width)}, assign=True)
        layers.append(second)
    return {
        f"model.multi_modal_projector.linear_{number}.{name}": parameter
        for number, layer in enumerate(layers, start=1)
        for name, parameter in layer.named_parameters()
    }


def _idle(unread: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of layers and norms behind the level that is read: they hand on what they are given."""
    if foreign := [name for name in unread if not name.startswith("model.vision_tower.")]:
        raise AssertionError(f"no weights for {', '.join(foreign[:5])}")
    return {
        name: torch.ones(x.shape) if "norm" in name and name.endswith("weight") else torch.zeros(x.shape)
        for name, x in unread.items()
    }

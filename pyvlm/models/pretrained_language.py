"""The weights of transformers' language models in ours: by name, shard by shard, and back.

A weight is read, put where it belongs, and let go, so that loading takes the memory of one model, in the
dtype of the checkpoint.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyvlm.models.config import LanguageConfig
from pyvlm.models.language import DecoderLayer, LanguageModel
from pyvlm.models.language_families import FAMILIES, Family, LanguageFolder, read_language

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_OF_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
# Tables that old checkpoints hold, and that are computed anew.
_TABLES = "rotary_emb.inv_freq"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def build_language(config: LanguageConfig, backend: str) -> LanguageModel:
    """The model of a configuration; what `load_language` will read is on the meta device, without memory.

    Layers that hold more than the folder has (experts) are built whole.
    """
    if config.pretrained is None:
        return LanguageModel(config, backend)
    family = read_language(config.pretrained).family
    config = config.model_copy(update={"pretrained": None})
    with torch.device("meta"):
        language = LanguageModel(config, backend)
    sources = _sources(language.state_dict(), family)
    for i, layer in enumerate(language.layers):
        if any(f"layers.{i}.{name}" not in sources for name in layer.state_dict()):
            language.layers[i] = DecoderLayer(config, i, backend)
    return language


def load_language(language: LanguageModel, folder: str) -> None:
    """Gives a model the weights of a folder of transformers, and all of it their dtype.

    Where the model has more tokens than the folder, those added are the mean of the others, as transformers
    has it. Experts keep their weights, and the folder's MLPs of their layers are not read.

    Args:
        language: of the architecture of the folder; it may be that of `build_language`.
        folder: as in `LanguageConfig.pretrained`.

    Raises:
        ValueError: weights that are not safetensors, damaged, missing, foreign, or of a wrong shape or type:
            one error that names them. The model is then as it was.
    """
    of_folder, stored = read_language(folder), _Stored(Path(folder))
    expected = language.state_dict()
    sources = {
        name: [stored.name_of(part) for part in parts]
        for name, parts in _sources(expected, of_folder.family).items()
    }
    if defects := _defects(language.config, of_folder, expected, sources, stored):
        raise ValueError(
            f"{folder} does not fit the language model of its config: {_listed(sorted(defects))}"
        )

    dtype = _DTYPES[stored.headers[stored.embedding].dtype]
    device = language.embed_tokens.weight.device
    device = torch.get_default_device() if device.type == "meta" else device
    weights = {name: torch.empty(expected[name].shape, dtype=dtype, device=device) for name in sources}
    places = {}  # of each stored tensor: rows of one of ours, behind those of the parts before it
    for name, parts in sources.items():
        start = 0
        for part in parts:
            rows = stored.headers[part].shape[0]
            places[part] = weights[name][start : start + rows]
            start += rows
    for path in stored.paths:
        with safe_open(path, "pt") as file:
            for part in sorted(places.keys() & set(file.keys())):
                places[part].copy_(file.get_tensor(part))
    for name in {EMBEDDING, HEAD} & weights.keys():
        old = of_folder.vocab_size
        weights[name][old:] = weights[name][:old].mean(0, dtype=torch.float32)
    language.load_state_dict(weights, strict=False, assign=True)
    language.to(dtype)


def export_language(
    state: Mapping[str, Tensor], config: LanguageConfig, model_type: str
) -> dict[str, Tensor]:
    """The weights of a language model under the names that transformers has for them: views, no copies.

    Args:
        state: `state_dict()` of a `LanguageModel`.
        config: its configuration.
        model_type: the family whose names to give, a key of `language_families.FAMILIES`.

    Raises:
        ValueError: an unknown family, or weights that it has no names for: those of experts, for one.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is unknown; expected one of {', '.join(FAMILIES)}")
    sources = _sources(state, FAMILIES[model_type])
    if homeless := sorted(state.keys() - sources.keys()):
        raise ValueError(f"{model_type} has no weights for {_listed(homeless)}")
    exported = {}
    for name, parts in sources.items():
        rows = _rows(config, name, len(parts), len(state[name]))
        for part, tensor in zip(parts, state[name].split(rows), strict=True):
            exported[part if part == HEAD else f"model.{part}"] = tensor
    return exported


def _sources(names: Iterable[str], family: Family) -> dict[str, tuple[str, ...]]:
    """Of our names those that transformers has weights for, and its own, whose rows follow one another."""
    sources: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name in (EMBEDDING, HEAD, "norm.weight"):
            sources[name] = (name,)
        elif (match := _OF_LAYER.fullmatch(name)) and match[2] in family.modules:
            sources[name] = tuple(f"layers.{match[1]}.{m}.{match[3]}" for m in family.modules[match[2]])
    return sources


def _rows(config: LanguageConfig, name: str, num_parts: int, all_rows: int) -> list[int]:
    """How many rows of our weight each of its parts has."""
    if num_parts == 1:
        return [all_rows]
    if ".mlp." in name:
        return [config.intermediate_size] * 2
    return [heads * config.head_size for heads in (config.num_heads, config.kv_heads, config.kv_heads)]


@dataclass(frozen=True)
class _Header:
    """What a file says of one of its tensors."""

    path: Path
    shape: list[int]
    dtype: str


class _Stored:
    """The tensors of a folder, by their names there; of a larger model, the language model among them.

    Attributes:
        headers: of all tensors.
        embedding: the name of that of the tokens.
        prefix: what the names of the language model's body begin with.
        head: the name of the head, or where there is none, what it should be.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = weight_files(folder)
        self.headers: dict[str, _Header] = {}
        for path in self.paths:
            try:
                with safe_open(path, "pt") as file:
                    names = file.keys()
                    for name in names:
                        part = file.get_slice(name)
                        self.headers[name] = _Header(path, part.get_shape(), part.get_dtype())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: damaged, truncated or not there ({error})") from error
        found = [name for name in self.headers if name.endswith(EMBEDDING)]
        if len(found) != 1:
            raise ValueError(f"{folder}: expected one {EMBEDDING} among its weights, found {len(found)}")
        self.embedding = found[0]
        self.prefix = self.embedding.removesuffix(EMBEDDING)
        self.head = next((name for name in self.headers if name.endswith(HEAD)), HEAD)

    def name_of(self, part: str) -> str:
        """The name here of a weight; the head stands outside of the body."""
        return self.head if part == HEAD else self.prefix + part

    def of_language(self) -> list[str]:
        """The names of all tensors of the language model."""
        if "language_model." not in self.prefix:
            return list(self.headers)
        return [name for name in self.headers if name.startswith(self.prefix) or name == self.head]

    def read(self, name: str) -> Tensor:
        with safe_open(self.headers[name].path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """The files of safetensors that hold a folder's weights.

    Raises:
        ValueError: there are none, or the index of several is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = set(json.loads(index.read_text())["weight_map"].values())
            return [folder / Path(file).name for file in sorted(files)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of safetensors ({error!r})") from error
    if not (single := folder / "model.safetensors").is_file():
        raise ValueError(
            f"{folder}: no model.safetensors there, and no index of several; other formats are not read: "
            "save the model with transformers' save_pretrained"
        )
    return [single]


def _defects(
    config: LanguageConfig,
    of_folder: LanguageFolder,
    expected: Mapping[str, Tensor],
    sources: Mapping[str, list[str]],
    stored: _Stored,
) -> list[str]:
    """What of a folder's weights does not fit."""
    defects = []
    for name, parts in sources.items():
        all_rows = of_folder.vocab_size if name in (EMBEDDING, HEAD) else len(expected[name])
        for part, rows in zip(parts, _rows(config, name, len(parts), all_rows), strict=True):
            shape, header = [rows, *expected[name].shape[1:]], stored.headers.get(part)
            if header is None:
                defects.append(f"{part} is missing")
            elif header.shape != shape:
                defects.append(f"{part} is {header.shape} and must be {shape}")
            elif header.dtype not in _DTYPES:
                defects.append(f"{part} is {header.dtype} and must be one of {', '.join(_DTYPES)}")
    read = {part for parts in sources.values() for part in parts}
    of_experts = tuple(f"{stored.prefix}layers.{i}.mlp." for i in config.moe_layers)
    for name in stored.of_language():
        if name in read or name.startswith(of_experts) or name.endswith(_TABLES):
            continue
        if name != stored.head:
            defects.append(f"{name} is foreign")
        elif not torch.equal(stored.read(name), stored.read(stored.embedding)):
            defects.append(f"{name} is not the embedding, to which config.json ties it")
    return defects


def _listed(items: list[str]) -> str:
    more = f"; and {len(items) - 20} more" if len(items) > 20 else ""
    return "; ".join(items[:20]) + more

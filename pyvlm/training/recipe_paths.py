"""What a recipe leaves to whoever runs it: where checkpoints and data lie, and any key to be another."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pyvlm.models.pretrained_vlm import LlavaFolder, read_vlm

# What a folder of an encoder says of itself, and better.
OF_THE_FOLDER = ("encoder", "image_size", "mean", "std")


def with_paths(
    content: Mapping[str, Any], language: str | None, vision: Sequence[str], data: Sequence[str]
) -> dict[str, Any]:
    """The content of a recipe with the paths of `load_recipe` in their places.

    Raises:
        ValueError: a tower or stage of another name, one that is given twice, or nothing to give a path to.
    """
    content = dict(content)
    if language is not None or vision:
        model = dict(content.get("model") or {})
        if language is not None:
            model["language"] = {**(model.get("language") or {}), "pretrained": language}
        if vision:
            model["vision_towers"] = _with_encoders(model.get("vision_towers") or [], vision)
        content["model"] = model
    if data:
        stages = content.get("stages") or {}
        paths = _assign("--data", "stage", list(stages), data)
        content["stages"] = {
            name: {**stage, "data": _from_files(stage.get("data"), paths[name])} if name in paths else stage
            for name, stage in stages.items()
        }
    return content


def with_checkpoint(content: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The content of a recipe whose model starts from a LLaVA of transformers.

    Sizes, levels, tokenizer, chat template and image preprocessing are the folder's; the attention rule,
    experts and adapters are the recipe's.

    Raises:
        ValueError: the recipe's model is put together in another way; one message that says all of it. Or as
            `pyvlm.models.pretrained_vlm.read_vlm`.
    """
    found, model = read_vlm(folder), dict(content.get("model") or {})
    if reasons := _mismatches(model, found):
        raise ValueError(f"--from {folder} does not fit the recipe: {'; '.join(reasons)}")
    (tower,) = model["vision_towers"]
    language = {**(model.get("language") or {}), "pretrained": folder}
    if language.get("max_length") is None:
        language["max_length"] = found.max_length
    model |= {
        "pretrained": folder,
        "image": found.image,
        "tiling": found.tiling,
        "vision_towers": [{"name": tower.get("name", "vision"), **found.tower}],
        "language": language,
    }
    wording = {"image_token": found.image_token}
    return {**content, "tokenizer": "language", "wording": wording, "model": model}


def fitting_recipe(folder: str) -> str:
    """The shipped recipe that trains a checkpoint's kind of model; errors as `with_checkpoint`."""
    return "llava-1.5" if read_vlm(folder).tiling is None else "llava-1.6"


def _mismatches(model: Mapping[str, Any], found: LlavaFolder) -> list[str]:
    """In words, how a recipe's model differs from a checkpoint's in what it is made of."""
    reasons, towers = [], model.get("vision_towers") or []
    kinds = [tower.get("type") for tower in towers]
    if kinds != ["transformers"]:
        of_recipe = ", ".join(map(str, kinds)) or "none"
        reasons.append(f"it has one vision tower of transformers, and the recipe these: {of_recipe}")
    added = sorted({"align_dim", "downsample", "patches", "last_norm"} & {key for t in towers for key in t})
    added += sorted(set(model.get("fusion") or {}))
    if added:
        reasons.append(f"it has nothing between tower and connector, and the recipe has {', '.join(added)}")
    connector = model.get("connector", "mlp2x_gelu")
    if connector != found.connector:
        kind = connector.get("type") if isinstance(connector, Mapping) else connector
        reasons.append(f"its connector is {found.connector}, and the recipe's {kind}")
    if (model.get("tiling") is None) != (found.tiling is None):
        one, other = ("tiles", "none") if found.tiling is not None else ("no tiles", "some")
        reasons.append(f"it has {one}, and the recipe {other}")
    return reasons


def _with_encoders(towers: Iterable[Mapping[str, Any]], vision: Sequence[str]) -> list[Mapping[str, Any]]:
    towers = list(towers)
    names = [str(tower.get("name")) for tower in towers if tower.get("type") == "transformers"]
    folders = _assign("--vision", "tower of transformers", names, vision)
    return [
        {
            **{key: value for key, value in tower.items() if key not in OF_THE_FOLDER},
            "pretrained": folders[tower["name"]],
        }
        if tower.get("name") in folders
        else tower
        for tower in towers
    ]


def _from_files(data: Mapping[str, Any] | None, path: str) -> dict[str, Any]:
    """The data of a stage, read from files; what bundled data were to be like is of no use to them."""
    kept = data if data is not None and data.get("source") == "files" else {}
    return {**kept, "source": "files", "path": path}


def _assign(option: str, what: str, names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """The path of each name: of "NAME=PATH" that one's, of "PATH" all others'."""
    if not names:
        raise ValueError(f"{option}: the recipe has no {what} to give it to")
    named: dict[str, str] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not equals or (name not in names and Path(entry).exists()):
            targets, path = [other for other in names if f"{other}=" not in _starts(given)], entry
        elif name in names:
            targets = [name]
        else:
            raise ValueError(f"{option} {entry}: there is no {what} {name!r}; there are {', '.join(names)}")
        if again := [target for target in targets if target in named]:
            raise ValueError(f"{option} {entry}: {what} {again[0]!r} is given twice")
        named |= dict.fromkeys(targets, path)
    return named


def _starts(given: Sequence[str]) -> set[str]:
    return {entry.partition("=")[0] + "=" for entry in given if "=" in entry}


def with_settings(content: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The content of a recipe with each "KEY=VALUE" set: a dotted path, and its value as YAML.

    Raises:
        ValueError: one is not of this form, or leads nowhere.
    """
    changed = copy.deepcopy(dict(content))
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ValueError(f"--set {setting}: expected KEY=VALUE, such as stages.align.batch_size=64")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {setting}: the value is not YAML ({error})") from error
        *parents, _ = path.split(".")
        if parents:
            set_path(changed, path, value, "--set")
        else:
            changed[path] = value
    return changed


def set_path(content: Any, path: str, value: Any, option: str) -> None:
    """Puts a value at a dotted path of a recipe's content; a number is an index into a list.

    Raises:
        ValueError: there is no such place; `option` is what to blame.
    """
    *parents, last = path.split(".")
    node, where = content, []
    for step in [*parents, last]:
        where.append(step)
        known = isinstance(node, dict) or (
            isinstance(node, list) and step.isdecimal() and int(step) < len(node)
        )
        if not known:
            raise ValueError(f"{option} {path}: there is no {'.'.join(where)} in the recipe")
        if len(where) <= len(parents):
            if isinstance(node, dict) and not isinstance(node.get(step), dict | list):
                node[step] = {}  # of what was not given, as null; the recipe's checks say what it lacks
            node = node[int(step) if isinstance(node, list) else step]
    node[int(last) if isinstance(node, list) else last] = value

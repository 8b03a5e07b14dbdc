"""What a recipe leaves to whoever runs it: where the checkpoints and the data lie."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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

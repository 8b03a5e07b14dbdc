"""What is wrong with a configuration, in words that name the nearest valid key."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pyvlm.models.config import Config

TAGS = ("type", "source")  # the keys that tell the kinds of a union apart


def explain(error: ValidationError, model: type[Config]) -> str:
    """The defects in one line, with the nearest valid name for each unknown key."""
    return "; ".join(_explain_one(entry, model.model_json_schema()) for entry in error.errors())


def _explain_one(entry: Mapping[str, Any], schema: dict[str, Any]) -> str:
    *parents, last = entry["loc"] or ("it",)
    known, places = _keys_at(schema, parents)
    where = ".".join(map(str, (*places, last)))
    if entry["type"] != "extra_forbidden":
        return f"{where}: {entry['msg'].removeprefix('Value error, ')}"
    nearest = difflib.get_close_matches(str(last), sorted(known), n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of {', '.join(sorted(known))}"
    return f"{where} is unknown: {hint}"


def _keys_at(schema: dict[str, Any], path: list[str | int]) -> tuple[set[str], list[str | int]]:
    """The keys that a JSON schema allows at a path of keys, list indices and union tags, and the path without
    the tags."""
    nodes = [schema]
    places = []
    for step in [*path, None]:
        nodes = [inner for node in nodes for inner in _alternatives(node, schema)]
        if step is None:
            break
        of_kind = [node for node in nodes if step in _tags(node)]
        if of_kind:
            nodes = of_kind
            continue
        places.append(step)
        reached = []
        for node in nodes:
            if isinstance(step, int):
                reached.append(node.get("items", {}))
            elif step in node.get("properties", {}):
                reached.append(node["properties"][step])
            elif isinstance(node.get("additionalProperties"), dict):
                reached.append(node["additionalProperties"])
        nodes = reached
    return {key for node in nodes for key in node.get("properties", {})}, places


def _tags(node: dict[str, Any]) -> list[Any]:
    return [node.get("properties", {}).get(tag, {}).get("const") for tag in TAGS]


def _alternatives(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema node with references followed and unions taken apart."""
    if "$ref" in node:
        return _alternatives(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], schema)
    choices = [*node.get("anyOf", []), *node.get("oneOf", [])]
    return [inner for choice in choices for inner in _alternatives(choice, schema)] or [node]

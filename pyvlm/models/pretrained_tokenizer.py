"""The tokenizer of a transformers folder: tokenizer.json, special tokens, chat template; none of its code."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from pyvlm.models.checkpoint import read_file


class PretrainedTokenizer(NamedTuple):
    """What a folder holds. Special tokens by name ("eos_token"); None where there is no chat template."""

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    chat_template: str | None


def read_pretrained_tokenizer(folder: str | os.PathLike[str]) -> PretrainedTokenizer:
    """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template.

    Special tokens that the configuration names and tokenizer.json lacks are added, as transformers does.

    Raises:
        ValueError: no tokenizer.json, or a file is broken; the message names it.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder}: no tokenizer.json there, which only fast tokenizers have; convert a slow one once: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) with transformers"
        )
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    config = _read_json(folder / "tokenizer_config.json")
    try:
        special_tokens = _special_tokens(config)
        if "added_tokens_decoder" not in config:  # as transformers: the older file counts before it came
            special_tokens |= _special_tokens(_read_json(folder / "special_tokens_map.json"))
        _add_missing(tokenizer, config.get("added_tokens_decoder", {}), special_tokens)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder}: tokenizer_config.json does not describe special tokens ({error!r})"
        ) from error
    return PretrainedTokenizer(tokenizer, special_tokens, _chat_template(folder, config))


def read_tokenizer(path: Path) -> Tokenizer:
    """Raises ValueError, naming the file, where it holds no tokenizer."""
    try:
        return Tokenizer.from_str(read_file(path).decode())
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer ({error})") from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`{"eos_token": "</s>"}`, from strings or descriptions."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _add_missing(tokenizer: Tokenizer, described: Mapping[str, Any], special_tokens: dict[str, str]) -> None:
    for token_id, entry in sorted(described.items(), key=lambda item: int(item[0])):
        if tokenizer.token_to_id(entry["content"]) is not None:
            continue
        tokenizer.add_tokens([AddedToken(**{k: v for k, v in entry.items() if k != "__type"})])
        if (given := tokenizer.token_to_id(entry["content"])) != int(token_id):
            raise ValueError(
                f"tokenizer_config.json gives {entry['content']!r} the id {token_id}, and tokenizer.json has "
                f"room for it at {given}: save both again with transformers"
            )
    missing = [token for token in special_tokens.values() if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens(list(dict.fromkeys(missing)))


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (path := folder / "chat_template.jinja").is_file():
        return read_file(path).decode()
    if (path := folder / "chat_template.json").is_file():  # as processors were saved for a while
        config = _read_json(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """An empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_file(path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return content

"""A record of a data file as a conversation: LLaVA's form and that of `messages`.

LLaVA (arXiv 2304.08485; docs/Finetune_Custom_Data.md of its code): {"image": path or paths, "conversations":
[{"from": "human" | "gpt" | "system", "value": text with an <image> mark for each image}, ...]}.

Messages (as transformers' chat templates and TRL take them): {"messages": [{"role": "user" | "assistant" |
"system", "content": text or parts}, ...], "images": [...]}; the images fill, in reading order, the parts
{"type": "image"} that have none of their own and the <image> marks in texts.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import ExifTags, Image, ImageOps

from pyvlm.data.bad_records import BadRecord
from pyvlm.models.images import MAX_PIXELS, load_image
from pyvlm.models.speaker import Messages

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant")
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

Format = Literal["auto", "llava", "messages"]


@dataclass(frozen=True)
class Record:
    """A conversation, and the file and line or row that it comes from."""

    messages: Messages
    where: str


def conversation(record: Any, folder: Path, form: Format = "auto") -> Messages:
    """The conversation of a record as `Processor.encode` takes it, images as paths or PIL images.

    Images are looked for and not decoded.

    Args:
        record: as the file has it.
        folder: what image paths are relative to.
        form: "auto": by the keys that the record has.

    Raises:
        BadRecord: with the reason.
    """
    if not isinstance(record, Mapping):
        raise BadRecord("not an object", f"got {type(record).__name__}")
    key = {"llava": "conversations", "messages": "messages"}.get(form)
    if key is None:
        key = "conversations" if record.get("messages") is None else "messages"
    turns = record.get(key)
    if turns is None:
        wanted = "messages or conversations" if form == "auto" else key
        raise BadRecord("no conversation", f"expected {wanted}, got the keys {', '.join(map(str, record))}")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise BadRecord("no conversation", f"{key} must be a list, got {type(turns).__name__}")
    if not turns:
        raise BadRecord("zero turns")
    images = _own_images(record)
    left = iter(images)
    messages = [
        _message(turn, number, left, key == "conversations", folder) for number, turn in enumerate(turns)
    ]
    if unused := len(list(left)):
        marks = len(images) - unused
        raise BadRecord("wrong count of <image>", f"{marks} for {len(images)} images")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecord("no assistant turn")
    return messages


def parts_of(messages: Messages) -> Iterator[dict[str, Any]]:
    """All parts of a conversation in reading order; a content that is a string is one part."""
    for message in messages:
        content = message["content"]
        yield from [{"type": "text", "text": content}] if isinstance(content, str) else content


def images_of(messages: Messages) -> list[Any]:
    """The images of a conversation in reading order."""
    return [part["image"] for part in parts_of(messages) if part["type"] == "image"]


def _own_images(record: Mapping[str, Any]) -> list[Any]:
    """What stands beside the conversation, under "images" or "image"."""
    images = record.get("images")
    if images is None:
        images = record.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _message(turn: Any, number: int, images: Iterator[Any], is_llava: bool, folder: Path) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadRecord("not an object", f"message {number} is a {type(turn).__name__}")
    role = LLAVA_ROLES.get(str(turn.get("from"))) if is_llava else turn.get("role")
    if role not in ROLES:
        expected = ", ".join(LLAVA_ROLES if is_llava else ROLES)
        given = turn.get("from" if is_llava else "role")
        raise BadRecord("unknown role", f"message {number}: {given!r} is none of {expected}")
    content = turn.get("value" if is_llava else "content")
    if isinstance(content, str):
        parts = list(_split_marks(content, images, folder))
    elif isinstance(content, Sequence) and not is_llava:
        parts = [piece for part in content for piece in _part(part, number, images, folder)]
    else:
        raise BadRecord("no text", f"message {number}: its content is {type(content).__name__}")
    if all(part["type"] == "text" for part in parts):
        return {"role": role, "content": "".join(part["text"] for part in parts)}
    return {"role": role, "content": parts}


def _part(part: Any, number: int, images: Iterator[Any], folder: Path) -> Iterator[dict[str, Any]]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        yield from _split_marks(part["text"], images, folder)
    elif kind == "image":
        # Tables give every part every key, with nothing under those that it lacks.
        own = next((part[key] for key in ("image", "path") if part.get(key) is not None), None)
        yield _image_part(next_image(images) if own is None else own, folder)
    else:
        raise BadRecord("unknown part", f"message {number}: {_short(part)}")


def _split_marks(text: str, images: Iterator[Any], folder: Path) -> Iterator[dict[str, Any]]:
    """The texts between the marks, to the letter, and at each mark an image."""
    first, *others = text.split(IMAGE_MARK)
    if first or not others:
        yield {"type": "text", "text": first}
    for piece in others:
        yield _image_part(next_image(images), folder)
        if piece:
            yield {"type": "text", "text": piece}


def next_image(images: Iterator[Any]) -> Any:
    """The next of a record's own images."""
    for image in images:
        return image
    raise BadRecord("wrong count of <image>", "more of them than images")


def _image_part(image: Any, folder: Path) -> dict[str, Any]:
    return {"type": "image", "image": _find_image(image, folder)}


def _find_image(image: Any, folder: Path) -> Any:
    """A path that there is, or a PIL image that is not decoded yet."""
    if isinstance(image, Mapping):
        data = image.get("bytes")
        if data is not None:
            return open_image(data)
        image = image.get("path")
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, os.PathLike)):
        raise BadRecord("missing image", f"expected a path, got {_short(image)}")
    path = folder / image
    if not path.is_file():
        raise BadRecord("missing image", str(image))
    return str(path)


def open_image(data: bytes) -> Image.Image:
    """An image file's bytes as an image, upright, decoded when its pixels are wanted.

    Raises:
        BadRecord: it is none, or claims more pixels than `pyvlm.models.images.MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it claims {image.width} by {image.height} pixels")
        # Asked for its EXIF data, a PNG file decodes all that may stand before them.
        known = image.format != "PNG" or "exif" in image.info
        if known and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # a decoder raises anything on a damaged header
        raise BadRecord(
            "unreadable image", f"{len(data):,} bytes ({' '.join(str(error).split())})"
        ) from error
    return image


def decode_image(image: Any) -> None:
    """Raises BadRecord where an image of a conversation, a path or a PIL image, cannot be decoded."""
    try:
        if isinstance(image, Image.Image):
            image.load()
        else:
            load_image(image)
    except Exception as error:  # as in `open_image`
        raise BadRecord("unreadable image", " ".join(str(error).split())) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

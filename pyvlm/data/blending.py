"""Several conversations made one, and the words that introduce its images.

DeepSpeed-VisualChat (arXiv 2309.14327), its section on data blending: samples of one image each are
concatenated at random, so that a model learns from dialogues about several.
"""

from collections.abc import Sequence

from pyvlm.data.records import images_of
from pyvlm.models.speaker import Messages


def can_blend(messages: Messages) -> bool:
    """Whether a conversation may stand before and after others: of one image, and of whole rounds."""
    roles = [message["role"] for message in messages]
    rounds = roles[::2] == ["user"] * len(roles[::2]) and roles[1::2] == ["assistant"] * len(roles[::2])
    return rounds and len(images_of(messages)) == 1


def blend(conversations: Sequence[Messages]) -> Messages:
    """Conversations as one, in their order."""
    return [message for messages in conversations for message in messages]


def introduce_images(messages: Messages, words: str) -> Messages:
    """The conversation with words before each image, as "Image {n}:"; n counts the images from 1."""
    introduced, number = [], 0
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "image":
                    number += 1
                    parts.append({"type": "text", "text": words.replace("{n}", str(number))})
                parts.append(part)
            content = parts
        introduced.append({**message, "content": content})
    return introduced

"""Messages of a conversation, and where in a text its images stand.

{"role": "user", "content": "What is this?"}
{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
{"role": "user", "content": [{"type": "image", "image": "7.png"}, …]}
{"role": "user", "content": "What is this? <image>"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from lora_squeeze.data.images import Picture, picture_of

__all__ = ["PLACE", "Message", "Prompt", "flattened", "placed"]

PLACE = "\ufffc"  # Unicode's OBJECT REPLACEMENT CHARACTER: an image stands here
WRITTEN = "<image>"  # the same as many data sets write it


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user, assistant or tool. Images in it are PLACEs."""

    role: str
    content: str


Prompt: TypeAlias = str | tuple[Message, ...]


def flattened(fields: Mapping[str, Any], folder: Path = Path()) -> tuple[dict[str, Any], tuple[Picture, ...]]:
    """The fields of a row with every message's content as one text, and the images that the messages brought.

    Raises ValueError for a part that is neither a text nor an image.
    """
    pictures: list[Picture] = []

    def flat(message: Any) -> Any:
        if not isinstance(message, Mapping) or not _is_list(message.get("content")):
            return message
        return {**message, "content": "".join(_part(one, folder, pictures) for one in message["content"])}

    flat_fields = {key: [flat(one) for one in value] if _is_list(value) else value for key, value in fields.items()}
    return flat_fields, tuple(pictures)


def placed(text: Prompt, images: Sequence[Picture]) -> Prompt:
    """A text, or messages, with a PLACE for each image: at the beginning, after the system's words, if there is none.

    <image> is read as a place.

    Raises ValueError if there are places, but not as many as images.
    """
    if isinstance(text, str):
        text = written = text.replace(WRITTEN, PLACE)
    else:
        text = tuple(replace(one, content=one.content.replace(WRITTEN, PLACE)) for one in text)
        written = "".join(message.content for message in text)
    if count := written.count(PLACE):
        if count != len(images):
            raise ValueError(f"its text has places for {count} images, and there are {len(images)}")
        return text
    front = PLACE * len(images)
    if isinstance(text, str):
        return front + text
    first = next((number for number, one in enumerate(text) if one.role != "system"), 0)
    seen = replace(text[first], content=front + text[first].content)
    return (*text[:first], seen, *text[first + 1 :])


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _part(part: Any, folder: Path, pictures: list[Picture]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image", "image_url"):
        address = part.get("image_url")
        own = [address["url"] if isinstance(address, Mapping) and "url" in address else address]
        own += [part.get(key) for key in ("image", "path", "url")]
        if found := [one for one in own if one is not None]:
            pictures.append(picture_of(found[0], folder))
        return PLACE
    raise ValueError(f"a part of a message is a text or an image, not {kind or type(part).__name__}")

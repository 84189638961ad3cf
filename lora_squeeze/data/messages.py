"""Messages of a conversation, and where in a text its images stand.

{"role": "user", "content": "What is this?"}
{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
{"role": "user", "content": [{"type": "image", "image": "7.png"}, …]}
{"role": "user", "content": "What is this? <image>"}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from lora_squeeze.data.images import Picture, picture_of

__all__ = ["PLACE", "Message", "Prompt", "flattened", "placed"]

PLACE = "\ufffc"  # Unicode's OBJECT REPLACEMENT CHARACTER: an image stands here
WRITTEN = "<image>"  # the same, as many data sets write it


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user, assistant or tool. Images in it are PLACEs."""

    role: str
    content: str


Prompt: TypeAlias = str | tuple[Message, ...]


def flattened(
    fields: Mapping[str, Any], keys: Iterable[str], folder: Path = Path(), *, ignore_images: bool = False
) -> tuple[dict[str, Any], tuple[Picture, ...], int]:
    """The fields of a row with each message's content as one text, the images that messages bring, and free places.

    keys
        of the fields that may hold messages.
    ignore_images
        leave out the images of messages, their places and WRITTEN.

    Raises ValueError for a part that is neither a text nor an image.
    """
    pictures: list[Picture] = []
    free = 0

    def part(one: Any) -> str:
        nonlocal free
        text, image = _part(one)
        if text is not None or ignore_images:
            return text or ""
        if image is None:
            free += 1
        else:
            pictures.append(picture_of(image, folder))
        return PLACE

    def flat(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(WRITTEN, "") if ignore_images else value
        if isinstance(value, Mapping) and "content" in value:
            content = value["content"]
            return {**value, "content": "".join(map(part, content)) if _is_list(content) else flat(content)}
        return [flat(one) for one in value] if _is_list(value) else value

    changed = {key: flat(fields[key]) for key in dict.fromkeys(keys) if key in fields}
    return {**fields, **changed}, tuple(pictures), free


def placed(text: Prompt, images: Sequence[Picture]) -> Prompt:
    """A text, or messages, with a PLACE for each image: if there is none, at the beginning of what the user says first.

    WRITTEN is read as a place.

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
    roles = [one.role for one in text]
    first = roles.index("user") if "user" in roles else next((at for at, one in enumerate(roles) if one != "system"), 0)
    seen = replace(text[first], content=front + text[first].content)
    return (*text[:first], seen, *text[first + 1 :])


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _part(part: Any) -> tuple[str | None, Any]:
    """A part's text, or None and the image that it brings; None twice for the place of an image."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError("a part of a message is called a text and holds none")
        return part["text"], None
    if kind in ("image", "image_url"):
        address = part.get("image_url")
        own = [address.get("url") if isinstance(address, Mapping) else address]
        own += [part.get(key) for key in ("image", "path", "url")]
        return None, next((one for one in own if one is not None), None)
    raise ValueError(f"a part of a message is a text or an image, not {kind or type(part).__name__}")

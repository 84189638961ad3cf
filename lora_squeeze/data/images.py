"""Images of a row: files beside the data, bytes, or what a data set holds; opened only when they are needed.

image = "photos/7.png"                   a path, relative to the file of the row
image = {"bytes": b"…", "path": …}       as Parquet files and data sets of the Hub have it
image = "data:image/png;base64,…"        the file itself, as text
images = [ … ]                           several

Nothing is fetched from the network.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lora_squeeze.errors import DataError
from lora_squeeze.extras import require

__all__ = ["Picture", "opened", "picture_of", "pictures_of"]

GREY = (128, 128, 128)


@dataclass(frozen=True)
class Picture:
    """An image that has not been opened yet.

    name
        what tells it from others: its path as the row has it, or the SHA-256 of its file.
    read
        gives the bytes of the image file.
    blank
        stands for a plain grey image of the same size: what a model then still answers, it had not seen.
    """

    name: str
    read: Callable[[], bytes] = field(repr=False, compare=False)
    blank: bool = False


def picture_of(value: Any, folder: Path = Path()) -> Picture:
    """An image as a row has it: a path, bytes, {"bytes", "path"}, a data: URI or a PIL image.

    folder
        that relative paths start from.

    Raises ValueError for anything else, and for a file that is not there.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = path if content is None else content
    if isinstance(value, bytes):
        return Picture(hashlib.sha256(value).hexdigest(), partial(bytes, value))
    if hasattr(value, "convert") and hasattr(value, "tobytes"):
        content = _png(value)
        return Picture(hashlib.sha256(content).hexdigest(), partial(bytes, content))
    if isinstance(value, str) and value.startswith("data:"):
        return _of_uri(value)
    if isinstance(value, str) and "://" in value:
        raise ValueError(f"image '{value}' is an address; images are not fetched: save it, and give its path")
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"an image is a path, bytes or a data: URI, not {type(value).__name__}")
    path = folder / value
    if not path.is_file():
        raise ValueError(f"its image '{value}' is not there (looked for {path})")
    return Picture(str(value), path.read_bytes)


def pictures_of(fields: Mapping[str, Any], folder: Path = Path()) -> tuple[Picture, ...]:
    """The images of a row, under `image` or `images`; none if these are missing or empty. Raises ValueError."""
    found: list[Any] = [] if fields.get("image") is None else [fields["image"]]
    several = fields.get("images")
    if several is not None:
        if isinstance(several, str | bytes | Mapping) or not isinstance(several, Sequence):
            raise ValueError("'images' is a list; one image alone is called 'image'")
        found += several
    return tuple(picture_of(one, folder) for one in found)


def opened(picture: Picture) -> Any:
    """The PIL image, upright (EXIF) and in RGB. Raises DataError, with its name, if it cannot be read."""
    pil, operations = require("PIL.Image", "vision"), require("PIL.ImageOps", "vision")
    try:
        with pil.open(io.BytesIO(picture.read())) as image:
            upright = operations.exif_transpose(image)
            return pil.new("RGB", upright.size, GREY) if picture.blank else upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise DataError(f"image '{picture.name}': cannot be read: {error}") from error


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, format="PNG")
    return file.getvalue()


def _of_uri(uri: str) -> Picture:
    head, _, text = uri.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not ;base64")
        content = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"image '{uri[:40]}…' is not a data: URI in base64: {error}") from error
    return Picture(hashlib.sha256(content).hexdigest(), partial(bytes, content))

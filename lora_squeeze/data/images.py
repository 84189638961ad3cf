"""Images of a row: files beside the data, bytes, or what a data set holds; opened only when they are needed.

image = "photos/7.png"                   a path, relative to the file of the row
image = {"bytes": b"…", "path": …}       as Parquet files and data sets of the Hub have it
image = "data:image/png;base64,…"        the file itself, as text
image = [ … ]                            several, also as `images`

Nothing is fetched from the network.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Callable, Mapping
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

    name, size
        what tells it from others: its path as the row has it, or the SHA-256 of its file; and the file's bytes.
    read
        gives the content of the image file.
    place
        file and line of the row that it belongs to.
    blank
        stands for a plain grey image of the same size: what a model then still answers, it had not seen.
    """

    name: str
    size: int
    read: Callable[[], bytes] = field(repr=False, compare=False)
    place: str = field(default="", repr=False, compare=False)
    blank: bool = False

    def __str__(self) -> str:
        """For messages."""
        return f"{self.place}: image '{_short(self.name)}'" if self.place else f"image '{_short(self.name)}'"


def picture_of(value: Any, folder: Path = Path()) -> Picture:
    """An image as a row has it: a path, bytes, {"bytes", "path"}, a data: URI or a PIL image.

    folder
        that relative paths start from.

    Raises ValueError for anything else, and for a file that is not there.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), str):
            raise ValueError("the 'bytes' of an image are a text; as text, an image is a data: URI")
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return _of_bytes(value)
    if hasattr(value, "convert") and hasattr(value, "tobytes"):
        return _of_bytes(_png(value))
    if isinstance(value, str) and value.startswith("data:"):
        return _of_bytes(_decoded(value))
    if isinstance(value, str) and "://" in value:
        raise ValueError(f"image '{_short(value)}' is an address; images are not fetched: save it, and give its path")
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"an image is a path, bytes or a data: URI, not {type(value).__name__}")
    path = folder / value
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ValueError(f"its image '{_short(str(value))}' is not a file (looked for {path})")
    except OSError as error:
        raise ValueError(
            f"its image '{_short(str(value))}' is not there (looked in {folder.absolute()}: {error.strerror}); base64 "
            "is spelled data:image/png;base64,…"
        ) from error
    return Picture(str(value), size, path.read_bytes)


def pictures_of(fields: Mapping[str, Any], folder: Path = Path()) -> tuple[Picture, ...]:
    """The images of a row, under `image` or `images`; none if these are missing or empty. Raises ValueError."""
    found: list[Any] = []
    for value in (fields.get("image"), fields.get("images")):
        found += value if isinstance(value, list | tuple) else [value]
    return tuple(picture_of(one, folder) for one in found if not _is_nothing(one))


def opened(picture: Picture) -> Any:
    """The PIL image, upright (EXIF) and in RGB, on white where it is transparent.

    Raises DataError, with its name and its row, if it cannot be read.
    """
    pil, operations = require("PIL.Image", "vision"), require("PIL.ImageOps", "vision")
    try:
        with pil.open(io.BytesIO(picture.read())) as image:
            upright = operations.exif_transpose(image)
            return pil.new("RGB", upright.size, GREY) if picture.blank else _in_rgb(upright)
    except MemoryError:
        raise
    except Exception as error:  # what the many readers of Pillow raise is up to them
        raise DataError(f"{picture}: cannot be read: {error}") from error


def _is_nothing(value: Any) -> bool:
    """Data sets have {"bytes": None, "path": None} for None."""
    return value is None or (isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is None)


def _in_rgb(image: Any) -> Any:
    if image.mode.startswith("I;16"):  # would be cut off at 255
        return image.convert("I").point(_high_byte, "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        ground = require("PIL.Image", "vision").new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert("RGB")


def _high_byte(value: Any) -> Any:
    return value * (1 / 256)


def _of_bytes(content: bytes) -> Picture:
    return Picture(hashlib.sha256(content).hexdigest(), len(content), partial(bytes, content))


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _decoded(uri: str) -> bytes:
    head, _, text = uri.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not ;base64")
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"image '{_short(uri)}' is not a data: URI in base64: {error}") from error


def _short(name: str) -> str:
    return name if len(name) <= 64 else f"{name[:60]}…"

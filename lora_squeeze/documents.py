"""Texts from strangers, JSON and TOML: whatever is in them, reading them ends with a value or a ValueError.

The parsers themselves also raise RecursionError for depth and UnicodeEncodeError, later on, for half a
character, and make numbers that no float can hold.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

__all__ = ["parse_json", "parse_toml", "read_text"]

_LARGEST = 64 << 20  # bytes; the configuration of the largest adapters takes less than one MiB
_DIGITS = 18  # of whole numbers: as many as 64 bits hold
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path) -> str:
    """A text file's content. Raises OSError, or ValueError if it is no UTF-8 or absurdly large."""
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"larger than {_LARGEST >> 20} MiB")
    return content.decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError if there is none, or one that could not be written again."""
    try:
        value = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if isinstance(text, str) and _HALF_CHARACTER.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it has half a character (a lone surrogate)") from None
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises ValueError if it is none."""
    try:
        document = tomllib.loads(text)
        _check_numbers(document)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return document


def _whole_number(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_numbers(value: Any) -> None:
    if isinstance(value, int) and abs(value) >= 10**_DIGITS:
        raise ValueError("a number of too many digits")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_numbers(inner)

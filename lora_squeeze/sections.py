"""TOML → frozen dataclasses: every key known, every value of the right type, or an error that says which.

A file is a dataclass whose fields are sections, themselves dataclasses. A field's default is the key's;
a trailing underscore is not part of the key (`from_` is `from`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from lora_squeeze.documents import parse_toml, read_text
from lora_squeeze.errors import SettingsError

__all__ = [
    "ONE_WILL_DO",
    "build",
    "choice",
    "document_of",
    "keys_of",
    "read_toml",
    "suggestion",
    "to_toml",
    "toml_value",
]

Section = TypeVar("Section")

# Metadata of a field: a list of texts for which one text will do.
ONE_WILL_DO: Mapping[str, Any] = {"one_will_do": True}

_KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}


def choice(choices: Sequence[str], default: str) -> Any:
    """A key whose value is one of these."""
    return field(default=default, metadata={"choices": tuple(choices)})


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises SettingsError if it cannot be read."""
    try:
        return parse_toml(read_text(path))
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: no such file") from error
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error


def build(section: type[Section], document: Mapping[str, Any], file: Path | str) -> Section:
    """Fill a file's dataclass from what its TOML says. Raises SettingsError, with file, section and key."""
    return _build(section, document, f"{file}: ", homes=_homes(section))


def keys_of(section: type[Any]) -> dict[str, str]:
    """The keys of a section as TOML spells them → the names of their fields."""
    return {one.name.removesuffix("_"): one.name for one in fields(section)}


def document_of(settings: Any) -> dict[str, Any]:
    """What a TOML file would say to give these settings: the keys that differ from their defaults."""
    document: dict[str, Any] = {}
    for one in fields(settings):
        value = getattr(settings, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if is_dataclass(value):
            if inside := document_of(value):
                document[one.name.removesuffix("_")] = inside
        elif value != default:
            document[one.name.removesuffix("_")] = value
    return document


def to_toml(document: Mapping[str, Any]) -> str:
    """Sections of keys as TOML; `read_toml` reads them back."""
    plain = [
        f"{_key(key)} = {toml_value(value)}\n" for key, value in document.items() if not isinstance(value, Mapping)
    ]
    blocks = ["".join(plain)] if plain else []
    for name, section in document.items():
        if isinstance(section, Mapping):
            lines = "".join(f"{_key(key)} = {toml_value(value)}\n" for key, value in section.items())
            blocks.append(f"[{_key(name)}]\n{lines}")
    return "\n".join(blocks)


def suggestion(key: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """What was probably meant by an unknown key, or else all that are known."""
    close = get_close_matches(key, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"


def toml_value(value: Any) -> str:
    """A value as TOML spells it."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {toml_value(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def _homes(file: type[Any]) -> dict[str, list[str]]:
    """Key → the sections that have it."""
    homes: dict[str, list[str]] = {}
    for name, hint in get_type_hints(file).items():
        kind = next((one for one in get_args(hint) if isinstance(one, type) and is_dataclass(one)), hint)
        if isinstance(kind, type) and is_dataclass(kind):
            for key in keys_of(kind):
                homes.setdefault(key, []).append(name)
    return homes


def _build(section: type[Section], document: Mapping[str, Any], place: str, *, homes: dict[str, list[str]]) -> Section:
    types = get_type_hints(section)
    known = keys_of(section)
    for key in document:
        if key not in known:
            file, _, inside = place.partition(": ")
            section_name = f"[{inside.rstrip('.')}] " if inside else ""
            elsewhere = [f"[{home}]" for home in homes.get(key, []) if inside]
            hint = f"; it belongs to {' or '.join(elsewhere)}" if elsewhere else suggestion(key, known)
            raise SettingsError(f"{file}: {section_name}unknown key '{key}'{hint}")
    values: dict[str, Any] = {}
    for one in fields(section):  # pyright: ignore[reportArgumentType]
        key = one.name.removesuffix("_")
        if key in document:
            values[one.name] = _value(document[key], types[one.name], f"{place}{key}", one.metadata, homes)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise SettingsError(f"{place}section [{key}] is missing")
    return section(**values)


def _value(value: Any, wanted: Any, place: str, metadata: Mapping[str, Any], homes: dict[str, list[str]]) -> Any:
    if wanted is Any:
        return value
    if NoneType in get_args(wanted):  # a section that may be missing
        wanted = next(one for one in get_args(wanted) if one is not NoneType)
    if isinstance(wanted, type) and is_dataclass(wanted):
        if not isinstance(value, dict):
            raise SettingsError(f"{place} must be a section: [{place.split()[-1]}]")
        return _build(wanted, value, f"{place}.", homes=homes)
    if get_origin(wanted) is list:
        if metadata.get("one_will_do") and isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise SettingsError(f"{place} must be a list, not {value!r}")
        return [_value(one, get_args(wanted)[0], place, {}, homes) for one in value]
    if get_origin(wanted) is dict:
        if not isinstance(value, dict):
            raise SettingsError(f"{place} must be a table of KEY = VALUE, not {value!r}")
        inside = get_args(wanted)[1]
        return {key: _value(one, inside, f"{place}.'{key}'", {}, homes) for key, one in value.items()}
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise SettingsError(f"{place} must be {_KINDS[wanted]}, not {value!r}")
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise SettingsError(f"{place} must be one of {', '.join(repr(one) for one in choices)}, not {value!r}")
    return value

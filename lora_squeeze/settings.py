"""TOML → settings: every key known, every value of the right type, or an error that says which.

Keys and defaults of `[squeeze]` are those of the `squeeze` document; the keys after `device` are
additions. `[model] lora_rank` stands in for `source_rank` where that is 0.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lora_squeeze.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

__all__ = ["ModelSettings", "Settings", "SqueezeSettings", "read_settings"]


@dataclass(frozen=True)
class SqueezeSettings:
    """The `[squeeze]` section."""

    adapter_path: str = ""  # folder of the adapter; required
    min_variance_retention: float = 0.95  # fraction of Σσ² to retain
    source_rank: int = 0  # expected rank; 0: [model].lora_rank, or else the tensors'
    target_ranks: list[int] = field(default_factory=list[int])  # candidates; []: powers of two
    output_path: str = ""  # where to write the squeezed adapter; "": analyze only
    compress_to: int = 0  # its rank; 0: the recommended one
    device: str = "cpu"  # torch device
    by: str = "mean"  # whether the mean or the "worst" layer must retain that much
    method: str = "gram"  # gram, qr, randomized or dense
    dtype: str = ""  # of the output: f64, f32, f16 or bf16; "": as it was
    overwrite: bool = False  # replace an existing output


@dataclass(frozen=True)
class ModelSettings:
    """The `[model]` section."""

    lora_rank: int = 0  # the rank it was trained at


@dataclass(frozen=True)
class Settings:
    """A whole TOML file."""

    squeeze: SqueezeSettings
    model: ModelSettings = field(default_factory=ModelSettings)

    @property
    def source_rank(self) -> int:
        """The declared rank, 0 if none was."""
        return self.squeeze.source_rank or self.model.lora_rank


CHOICES = {
    "by": ("mean", "worst"),
    "method": ("gram", "qr", "randomized", "dense"),
    "dtype": ("", "f64", "f32", "f16", "bf16"),
}


def read_settings(path: Path) -> Settings:
    """Read a TOML file. Raises SettingsError for anything unknown, mistyped or missing."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: no such file") from error
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error
    settings: Settings = _build(Settings, document, f"{path}: ")
    if not settings.squeeze.adapter_path:
        raise SettingsError(f"{path}: [squeeze] adapter_path is missing: which adapter shall be squeezed?")
    return settings


def _build(section: type[Any], document: dict[str, Any], place: str) -> Any:
    types = get_type_hints(section)
    known = {one.name: one for one in fields(section)}
    for key in document:
        if key not in known:
            raise SettingsError(f"{place}unknown key '{key}'{_suggestion(key, known)}")
    values: dict[str, Any] = {}
    for name, one in known.items():
        if name in document:
            values[name] = _value(document[name], types[name], f"{place}{name}")
        elif one.default is MISSING and one.default_factory is MISSING:
            raise SettingsError(f"{place}section [{name}] is missing")
    return section(**values)


def _value(value: Any, wanted: type[Any], place: str) -> Any:
    if hasattr(wanted, "__dataclass_fields__"):
        if not isinstance(value, dict):
            raise SettingsError(f"{place} must be a section: [{place.split()[-1]}]")
        return _build(wanted, value, f"{place}.")
    if get_origin(wanted) is list:
        if not isinstance(value, list):
            raise SettingsError(f"{place} must be a list, not {value!r}")
        return [_value(one, get_args(wanted)[0], place) for one in value]
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        kinds = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
        raise SettingsError(f"{place} must be {kinds[wanted]}, not {value!r}")
    choices = CHOICES.get(place.rsplit(".", 1)[-1])
    if choices and value not in choices:
        raise SettingsError(f"{place} must be one of {', '.join(repr(one) for one in choices)}, not {value!r}")
    return value


def _suggestion(key: str, known: dict[str, Any]) -> str:
    close = get_close_matches(key, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"

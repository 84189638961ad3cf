"""TOML → settings: every key known, every value of the right type, or an error that says which.

Keys and defaults of `[squeeze]` are those of the `squeeze` document; the keys after `device` are
additions. `[model] lora_rank` stands in for `source_rank` where that is 0.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lora_squeeze.documents import parse_toml, read_text
from lora_squeeze.errors import SettingsError
from lora_squeeze.limits import Limits

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
    policy: str = ""  # NAME=VALUE, how to choose ranks; "": compress_to, for all layers
    min_rank: int = -1  # of any layer; -1: 1, for global policies 0
    max_rank: int = 0  # of any layer; 0: no limit
    multiple_of: int = 1  # round ranks up to a multiple of this
    steps: list[int] = field(default_factory=list[int])  # round ranks up to one of these
    rank_for: dict[str, int] = field(default_factory=dict[str, int])  # pattern → rank; the first match decides
    equal: list[str] = field(default_factory=list[str])  # groups of layers with equal ranks: qkv, experts, a pattern
    runtime: str = ""  # what has to load it: peft, vllm, sglang, llamacpp, diffusers or comfyui; "": its format's tools
    max_lora_rank: int = 0  # what that server allows; 0: its default
    base_path: str = ""  # DoRA: folder or file of the base weights, to fit the magnitudes
    calibration: str = ""  # moments of lora-squeeze calibrate: variance is then measured on data
    overwrite: bool = False  # replace an existing output

    @property
    def limits(self) -> Limits:
        """min_rank … equal as the policies take them."""
        return Limits(
            min_rank=None if self.min_rank == -1 else self.min_rank,
            max_rank=self.max_rank or None,
            multiple_of=self.multiple_of,
            steps=tuple(self.steps),
            rank_for=tuple(self.rank_for.items()),
            equal=tuple(self.equal),
        )


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
    "runtime": ("", "peft", "vllm", "sglang", "llamacpp", "diffusers", "comfyui"),
    "dtype": ("", "f64", "f32", "f16", "bf16"),
}


def read_settings(path: Path) -> Settings:
    """Read a TOML file. Raises SettingsError for anything unknown, mistyped or missing."""
    try:
        document = parse_toml(read_text(path))
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: no such file") from error
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error
    settings: Settings = _build(Settings, document, f"{path}: ")
    if not settings.squeeze.adapter_path:
        raise SettingsError(f"{path}: [squeeze] adapter_path is missing: which adapter shall be squeezed?")
    if settings.squeeze.policy and settings.squeeze.compress_to:
        raise SettingsError(f"{path}: [squeeze] policy and compress_to contradict each other: give one of them")
    return settings


def _build(section: type[Any], document: dict[str, Any], place: str) -> Any:
    types = get_type_hints(section)
    known = {one.name: one for one in fields(section)}
    for key in document:
        if key not in known:
            file, _, inside = place.partition(": ")
            section_name = f"[{inside.rstrip('.')}] " if inside else ""
            raise SettingsError(f"{file}: {section_name}unknown key '{key}'{_suggestion(key, known)}")
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
    if get_origin(wanted) is dict:
        if not isinstance(value, dict):
            raise SettingsError(f"{place} must be a table of pattern = rank, not {value!r}")
        return {key: _value(one, get_args(wanted)[1], f"{place}.'{key}'") for key, one in value.items()}
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

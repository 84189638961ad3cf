"""Optional dependencies: imported when they are needed, and asked for by name when they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lora_squeeze.errors import MissingExtra

__all__ = ["require"]


def require(module: str, extra: str) -> Any:
    """Import a module that comes with an extra, such as ("peft", "train").

    Raises MissingExtra, which says `pip install 'lora-squeeze[EXTRA]'`, if the module or a package
    above it is not there. A module that is there and fails to import raises what it raises.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module == missing or module.startswith(f"{missing}."):
            raise MissingExtra(missing.partition(".")[0], extra) from error
        raise

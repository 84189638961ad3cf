"""Your own functions, named in a TOML file as package.module.function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_squeeze.errors import SettingsError

__all__ = ["import_function"]


def import_function(path: str, *, key: str) -> Callable[..., Any]:
    """Import package.module.function, also from the current folder.

    key
        the setting that names it, for the error.

    Raises SettingsError if it cannot be imported or is no function.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name:
        raise SettingsError(f"{key} = '{path}': one's own function is spelled package.module.function")
    here = str(Path.cwd())
    if here not in sys.path:  # a console script does not look here by itself
        sys.path.insert(0, here)
    try:
        found = getattr(import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"{key} = '{path}': cannot be imported: {error}") from error
    if not callable(found):
        raise SettingsError(f"{key} = '{path}': is a {type(found).__name__}, not a function")
    return found

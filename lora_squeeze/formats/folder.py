"""Folders that appear whole or not at all: written beside, fsynced, renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lora_squeeze.errors import OutputError

__all__ = ["check_output", "new_folder"]


def check_output(output: Path, *, source: Path | None, overwrite: bool) -> None:
    """Refuse an output that is the source, lies inside it or around it, or exists already.

    Meant to be asked before any work is done. Raises OutputError.
    """
    try:
        target = output.resolve()
        if source is not None:
            origin = source.resolve()
            if target == origin:
                raise OutputError(f"{output}: output and source are the same folder; choose another output")
            if origin in target.parents or target in origin.parents:
                raise OutputError(
                    f"{output}: the output may not lie inside the source or around it; choose another output"
                )
        if output.exists() and not output.is_dir():
            raise OutputError(f"{output}: exists and is not a folder; choose another output")
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise OutputError(f"{output}: already exists; use --overwrite to replace it, or choose another output")
    except OSError as error:
        raise OutputError(f"{output}: cannot be used as output: {error.strerror}") from error


@contextmanager
def new_folder(output: Path) -> Generator[Path, None, None]:
    """Yield an empty folder beside `output` that takes its place once the block has succeeded.

    If the block fails, the folder is removed and whatever was at `output` stays as it was.
    Raises OutputError if the folder cannot be made or moved.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror}") from error
    try:
        yield beside
        beside.chmod(0o777 & ~_umask())
        for folder, _, names in os.walk(beside):
            for name in names:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        _replace(beside, output)
        _fsync(output.parent)
    except OSError as error:
        raise OutputError(f"{error.filename or output}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replace(beside: Path, output: Path) -> None:
    """Rename onto `output`. A folder that is there is moved aside first: rename needs the place empty."""
    if not output.exists():
        beside.rename(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".replaced", dir=output.parent))
    output.rename(aside / output.name)
    try:
        beside.rename(output)
    except OSError:
        (aside / output.name).rename(output)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

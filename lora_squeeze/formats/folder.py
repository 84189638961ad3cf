"""Folders and files that appear whole or not at all: written beside, fsynced, renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lora_squeeze.errors import OutputError

__all__ = ["check_output", "new_file", "new_folder"]

SUFFIX = ".safetensors"


def check_output(output: Path, *, source: Path | None, overwrite: bool, single_file: bool = False) -> None:
    """Refuse an output that is the source, lies inside it or around it, or exists already.

    Meant to be asked before any work is done.
    source
        the folder or the file that is read.
    single_file
        whether the output will be a file; its name must say that it is a safetensors file, as
        programs that list adapters go by that.

    Raises OutputError.
    """
    try:
        target = output.resolve()
        if source is not None:
            origin = source.resolve()
            if target == origin:
                what = "file" if origin.is_file() else "folder"
                raise OutputError(f"{output}: output and source are the same {what}; choose another output")
            if origin in target.parents or target in origin.parents:
                raise OutputError(
                    f"{output}: the output may not lie inside the source or around it; choose another output"
                )
        if single_file:
            _check_file(output)
        elif output.exists() and not output.is_dir():
            raise OutputError(f"{output}: exists and is not a folder; choose another output")
        if _is_something(output) and not overwrite:
            raise OutputError(f"{output}: already exists; use --overwrite to replace it, or choose another output")
    except OSError as error:
        raise OutputError(f"{output}: cannot be used as output: {error.strerror}") from error


def _check_file(output: Path) -> None:
    if output.is_dir():
        raise OutputError(f"{output}: is a folder, and this format is one file; try {output / f'lora{SUFFIX}'}")
    if not output.name.endswith(SUFFIX):
        raise OutputError(f"{output}: this format is one file; its name must end in {SUFFIX}: {output}{SUFFIX}")


def _is_something(output: Path) -> bool:
    """Whether there is a file, or a folder that is not empty."""
    return any(output.iterdir()) if output.is_dir() else output.exists()


@contextmanager
def new_folder(output: Path) -> Generator[Path, None, None]:
    """Yield an empty folder beside `output` that takes its place once the block has succeeded.

    If the block fails, the folder is removed and whatever was at `output` stays as it was.
    Raises OutputError if the folder cannot be made or moved.
    """
    with _beside(output) as beside:
        yield beside
        beside.chmod(0o777 & ~_umask())
        for folder, _, names in os.walk(beside):
            for name in names:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        _replace(beside, output)
        _fsync(output.parent)


@contextmanager
def new_file(output: Path) -> Generator[Path, None, None]:
    """Yield a path, where nothing is yet, whose file takes the place of `output` once the block has succeeded.

    If the block fails, nothing is left and whatever was at `output` stays as it was. Raises
    OutputError if the file cannot be made or moved.
    """
    with _beside(output) as beside:
        yield beside / output.name
        _fsync(beside / output.name)
        (beside / output.name).replace(output)
        _fsync(output.parent)


@contextmanager
def _beside(output: Path) -> Generator[Path, None, None]:
    """A folder beside `output`, on the same disk, that is gone afterwards if it has not been moved."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror}") from error
    try:
        yield beside
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

"""Single files that a command writes beside what it prints: an error before any work, and whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import click

from lora_squeeze.errors import OutputError

__all__ = ["check_file", "print_and_write", "refuse_stray_overwrite"]


def check_file(
    output: Path, *, overwrite: bool, example: str, suffixes: Collection[str] = (), source: Path | None = None
) -> None:
    """Raise OutputError if this file cannot be written; meant to be asked before any work is done.

    example
        a name that would do.
    suffixes
        how its name may end; none: as it likes.
    source
        the folder or file that is read, no file of which is replaced even with `overwrite`.
    """
    from lora_squeeze.formats.folder import check_folder_of

    if output.is_dir():
        raise OutputError(f"{output}: is a folder and cannot be written as a file; try {output / example}")
    if suffixes and output.suffix.lower() not in suffixes:
        raise OutputError(f"{output}: its name must end in {' or '.join(suffixes)}; try {output.with_name(example)}")
    if _is_stream(output):
        return
    if source is not None and output.is_file() and source.resolve() in (output.resolve(), *output.resolve().parents):
        raise OutputError(f"{output}: is a file of the adapter itself; choose another output")
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: already exists; use --overwrite to replace it, or choose another output")
    check_folder_of(output)


def print_and_write(
    print_it: Callable[[], None], output: Path | None, write: Callable[[Path], object], *, overwrite: bool
) -> None:
    """Print what was found, and have `write` make the file; where the one cannot be done, the other is all the same.

    output
        takes its place when it is whole; None: nothing is written.

    Raises OutputError.
    """
    try:
        print_it()
    finally:
        if output is not None:
            _write(output, write, overwrite=overwrite)


def refuse_stray_overwrite(overwrite: bool, *outputs: Path | None, options: str) -> None:
    """Raise UsageError for --overwrite where no file is to be written."""
    if overwrite and not any(outputs):
        raise click.UsageError(f"--overwrite is about what {options} writes, and nothing is to be written")


def _write(output: Path, write: Callable[[Path], object], *, overwrite: bool) -> None:
    from lora_squeeze.formats.folder import new_file

    if not _is_stream(output):
        with new_file(output, overwrite=overwrite) as file:
            write(file)
        return
    try:
        write(output)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror}") from error


def _is_stream(output: Path) -> bool:
    """A pipe, or /dev/stdout: nothing is there to replace, and nothing to put in its place."""
    return output.exists() and not output.is_file() and not output.is_dir()

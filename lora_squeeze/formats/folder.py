"""Folders and files that appear whole or not at all: written beside, fsynced, renamed."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lora_squeeze.errors import OutputError
from lora_squeeze.formats.beside import beside
from lora_squeeze.peft_names import CONFIG

__all__ = ["belongs_to_training", "check_folder_of", "check_output", "new_file", "new_folder"]

SUFFIX = ".safetensors"

_TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state.*\.pth|trainer_state\.json|training_args\.bin"
    r"|pytorch_model_fsdp.*|checkpoint-\d+|global_step\d+|runs|\..*"
)


def belongs_to_training(name: str) -> bool:
    """Whether a file or folder beside an adapter is what a training run left: it has the source's rank."""
    return _TRAINING_STATE.fullmatch(name) is not None


def check_output(
    output: Path, *, source: Path | None, overwrite: bool, single_file: bool = False, in_file: bool = False
) -> None:
    """Refuse an output that is the source, lies inside it or around it, or exists already.

    Meant to be asked before any work is done.
    source
        the folder or the file that is read.
    single_file
        whether the output will be a file; its name must say that it is a safetensors file, as
        programs that list adapters go by that.
    in_file
        whether `overwrite` is a key of [squeeze] in a file, and no option.

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
        elif output.exists():
            _check_folder(output)
        if _is_something(output) and not overwrite:
            how = "set overwrite = true in [squeeze]" if in_file else "use --overwrite"
            raise OutputError(f"{output}: already exists; {how} to replace it, or choose another output")
        check_folder_of(output)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a circle of links; ValueError: a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{output!s:.200}: cannot be used as output: {reason}") from error


def check_folder_of(output: Path) -> None:
    """Refuse an output in whose folder nothing can be made; a folder that is missing will be. Raises OutputError."""
    folder = next(one for one in output.resolve().parents if one.exists())
    if not folder.is_dir():
        raise OutputError(f"{output}: cannot be written: {folder} is no folder; choose another output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: cannot be written: nothing may be made in {folder}; choose another output")


def _check_file(output: Path) -> None:
    if output.is_dir():
        raise OutputError(f"{output}: is a folder, and this format is one file; try {output / f'lora{SUFFIX}'}")
    if not output.name.endswith(SUFFIX):
        raise OutputError(f"{output}: this format is one file; its name must end in {SUFFIX}: {output}{SUFFIX}")


def _check_folder(output: Path) -> None:
    """Only an adapter's folder may be replaced: any other may hold the only copy of somebody's work."""
    if not output.is_dir():
        raise OutputError(f"{output}: exists and is not a folder; choose another output")
    names = sorted(entry.name for entry in output.iterdir())
    here = Path.cwd()
    if output.resolve() in (here, *here.parents):
        raise OutputError(
            f"{output}: is the folder you are in, or one around it, and a new one would take its place; "
            f"choose another output, as {output / 'squeezed'}"
        )
    if os.path.ismount(output):  # Path.is_mount() came to Windows only with Python 3.12
        raise OutputError(
            f"{output}: a disk is mounted there, and nothing can take its place; choose a folder in it, as "
            f"{output / 'squeezed'}"
        )
    if names and CONFIG not in names:
        raise OutputError(
            f"{output}: is no adapter's folder (it holds '{names[0]}'), so not even --overwrite replaces it; choose "
            "another output"
        )
    if left := next((name for name in names if belongs_to_training(name) and not name.startswith(".")), None):
        raise OutputError(
            f"{output}: holds '{left}' of a training, which would be lost, so not even --overwrite replaces it; "
            "choose another output"
        )


def _is_something(output: Path) -> bool:
    """Whether there is a file, or a folder that is not empty."""
    return any(output.iterdir()) if output.is_dir() else output.exists()


@contextmanager
def new_folder(output: Path, *, overwrite: bool = False) -> Generator[Path, None, None]:
    """Yield an empty folder beside `output` that takes its place once the block has succeeded.

    overwrite
        replace what is there by then; otherwise only an empty folder is.

    If the block fails, the folder is removed and whatever was at `output` stays as it was. Where
    that is a link, what it leads to is filled or replaced. Raises OutputError if the folder cannot be
    made or moved.
    """
    output = output.resolve()
    with beside(output) as (made, replaced):
        made.mkdir()
        yield made
        for folder, _, names in os.walk(made):
            for name in names:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        if overwrite and _is_something(output):
            _replace(made, output, replaced)
        else:
            made.rename(output)
        _fsync(output.parent)


@contextmanager
def new_file(output: Path, *, overwrite: bool = False) -> Generator[Path, None, None]:
    """Yield a path, where nothing is yet, whose file takes the place of `output` once the block has succeeded.

    overwrite
        replace a file that is there by then.

    If the block fails, nothing is left and whatever was at `output` stays as it was. Where that is a
    link, the file that it leads to is replaced. Raises OutputError if the file cannot be made or moved.
    """
    output = output.resolve()
    with beside(output) as (made, _):
        yield made
        _fsync(made)
        if overwrite:
            made.replace(output)
        else:
            _rename_to_nothing(made, output)
        _fsync(output.parent)


def _rename_to_nothing(made: Path, output: Path) -> None:
    """Rename, but never onto a file: os.rename would replace it."""
    try:
        output.hardlink_to(made)
    except OSError as error:
        if output.exists():
            raise OutputError(f"{output}: has appeared meanwhile; use --overwrite to replace it") from error
        made.rename(output)  # a disk without hard links


def _replace(made: Path, output: Path, replaced: Path) -> None:
    """Put a folder in the place of another: in one step where the system can, in two where it cannot.

    Between the two, nothing is at `output`; if the process ends there, `clear_leftovers` puts the old
    one back.
    """
    if _exchange(made, output):
        return
    output.rename(replaced)
    try:
        made.rename(output)
    except OSError:
        replaced.rename(output)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Whether two names of one disk could be swapped at once (Linux: renameat2, RENAME_EXCHANGE)."""
    here, exchange = -100, 2  # AT_FDCWD and the flag
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The hidden folder beside an output in which it is made: locked as long as its maker lives.

A process that is killed cannot clear up, but its lock goes with it. So whoever writes the same output
next can tell a leftover from the work of another process, removes the one and respects the other.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_squeeze.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and leftovers stay
    fcntl = None

__all__ = ["beside", "clear_leftovers"]

_LOCK = "lock"
_REPLACED = "replaced"
# Between making the folder and locking it, its maker has nothing to show; it takes no minute.
_GRACE = 60.0


@contextmanager
def beside(output: Path) -> Generator[tuple[Path, Path], None, None]:
    """Yield two paths on the disk of `output` where nothing is yet: for what is made, and for what it replaces.

    Both are gone afterwards. Raises OutputError if they cannot be made, if another process is
    writing the same output, and for any OSError in the block.
    """
    # Its name is known before it is there: a signal in between finds something to clear up.
    folder = output.parent / f".{output.name}.{secrets.token_hex(4)}.partial"
    lock: int | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(output)
        folder.mkdir(mode=0o700)
        lock = _locked_file(folder)
        yield folder / output.name, folder / _REPLACED
    except OSError as error:
        raise OutputError(f"{error.filename or output}: cannot be written: {error.strerror}") from error
    finally:
        _remove(folder)
        if lock is not None:
            os.close(lock)


def clear_leftovers(output: Path) -> None:
    """Remove what processes that are no more have left beside an output; put back what they had moved away.

    Raises OutputError if one of them is alive: it is writing this output.
    """
    for folder in _partial_folders(output):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except FileNotFoundError:
            if time.time() - folder.stat().st_mtime > _GRACE:
                _remove(folder)
            continue
        except OSError:
            continue  # another user's: not ours to judge
        try:
            _lock(lock)
            if (folder / _REPLACED).exists() and not output.exists():
                (folder / _REPLACED).rename(output)
            _remove(folder)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                maker = os.read(lock, 20).decode(errors="replace").strip()
                raise OutputError(
                    f"{output}: process {maker} is writing it, in {folder}; wait for it, or choose another output"
                ) from error
        finally:
            os.close(lock)


def _partial_folders(output: Path) -> Iterator[Path]:
    own = re.compile(rf"\.{re.escape(output.name)}\.[a-z0-9_]{{8}}\.partial")
    try:
        with os.scandir(output.parent) as entries:
            names = [entry.name for entry in entries if own.fullmatch(entry.name)]
    except PermissionError:
        return  # a folder that may be written, but not listed
    for name in names:
        folder = output.parent / name
        if folder.is_dir() and not folder.is_symlink():
            yield folder


def _locked_file(folder: Path) -> int:
    """Make the lock file and lock it; it gets its name when that is done, so nobody finds it unlocked."""
    lock = os.open(folder / f"{_LOCK}.new", os.O_CREAT | os.O_RDWR, 0o666)
    with suppress(OSError):  # some network disks know no locks: leftovers stay there
        _lock(lock)
    os.write(lock, f"{os.getpid()}\n".encode())
    (folder / f"{_LOCK}.new").rename(folder / _LOCK)
    return lock


def _lock(descriptor: int) -> None:
    """Lock an open file. Raises OSError (EWOULDBLOCK) if another process holds it, or if it cannot be locked."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "there are no locks here")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove(folder: Path) -> None:
    """Remove the folder, the lock last: as long as something is left, it tells whose it is."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)

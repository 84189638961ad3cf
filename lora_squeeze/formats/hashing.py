"""The SHA-256 of files: in one go, or along the way, of what is read of them anyway."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from lora_squeeze.errors import AdapterError

__all__ = ["Identity", "RunningHash", "check_identity", "identity_of", "sha256_of_file"]

Identity = tuple[int, int, int]  # inode, size and modification time

_CHUNK = 1 << 20


class RunningHash:
    """A file's SHA-256 that follows its readers.

    Reading a file a second time costs a quarter of hashing it. So whoever has read a piece hands it in;
    what was read in another order, or not at all, is read here. Threads may hand in pieces at the same
    time: only one of them hashes, and none waits.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self._path, self._identity = path, identity
        self._digest = hashlib.sha256()
        self._end = 0
        self._following = False
        self._lock = threading.Lock()

    def follow(self) -> None:
        """From now on, hash what is handed in."""
        self._following = True

    def hand_in(self, position: int, data: memoryview) -> None:
        """`data` lies at `position` in the file.

        Raises OSError if what lies before it cannot be read, AdapterError if the file has changed.
        """
        if self._following and position >= self._end and self._lock.acquire(blocking=False):
            try:
                if position >= self._end:
                    if position > self._end:
                        self._catch_up(position)
                    self._digest.update(data)
                    self._end += len(data)
            finally:
                self._lock.release()

    def result(self) -> str:
        """The SHA-256 of the whole file. Raises AdapterError if it is not the one that was meant any more."""
        try:
            with self._lock:
                self._catch_up(self._identity[1])
                return self._digest.hexdigest()
        except OSError as error:
            raise AdapterError(f"{self._path}: cannot be read: {error.strerror}") from error

    def _catch_up(self, position: int) -> None:
        with self._path.open("rb", buffering=0) as file:
            chunk = memoryview(bytearray(min(_CHUNK, position - self._end)))
            file.seek(self._end)
            while self._end < position and (count := file.readinto(chunk[: position - self._end])):
                self._digest.update(chunk[:count])
                self._end += count
            check_identity(file.fileno(), self._identity, self._path)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, as `sha256sum` prints it. Raises AdapterError if it is unreadable, or changes."""
    try:
        with path.open("rb") as file:
            identity = identity_of(file.fileno())
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from error
    return RunningHash(path, identity).result()


def identity_of(descriptor: int) -> Identity:
    """What tells that an open file is the same, and has not been written to."""
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_identity(descriptor: int, expected: Identity, path: Path) -> None:
    """Raise AdapterError if an open file is not the one that is expected."""
    if identity_of(descriptor) != expected:
        raise AdapterError(f"{path}: the file was changed while it was being read; run again")

"""Unpacking archives that somebody else made: plain files and folders only, inside their folder, and bounded.

Nothing of `tarfile`'s or `zipfile`'s own extraction is used. Files are created anew and written in pieces, so the
bounds hold for what an archive contains, not for what it says that it contains.
"""

from __future__ import annotations

import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from lora_squeeze.errors import FetchError, reason_of
from lora_squeeze.formats.remote import check_room, safe_name

__all__ = ["MAX_MEMBERS", "unpack"]

MAX_MEMBERS = 10_000  # an adapter has a dozen files; with its tokenizer and optimizer shards, some hundred

_CHUNK = 1 << 20
_LARGEST_READ = 1 << 24  # tarfile reads a header's long name at once, however long it says that it is


@dataclass(frozen=True)
class _Member:
    """A file of an archive; `kind` says what it is if it is neither a plain file nor a folder."""

    name: str
    open: Callable[[], IO[bytes]]
    kind: str = ""
    folder: bool = False


def unpack(archive: Path, folder: Path, *, origin: str, limit: int) -> None:
    """Unpack a tar, tar.gz or zip archive into an existing, empty folder.

    limit
        the largest sum of all files' sizes, in bytes.

    Raises FetchError for links, devices, pipes, names that lead out of the folder or come twice, for more than
    `MAX_MEMBERS` members or `limit` bytes, and for an archive that is damaged or of another kind.
    """
    total = count = 0
    try:
        for member in _members(archive, origin=origin):
            count += 1
            if count > MAX_MEMBERS:
                raise FetchError(f"{origin}: the archive has more than {MAX_MEMBERS:,} members; nothing was kept")
            if member.kind:
                raise FetchError(
                    f"{origin}: the archive holds a {member.kind} ({member.name[:200]!r}), which no adapter needs; "
                    "nothing was kept"
                )
            if member.folder and not member.name.strip("/."):
                continue
            name = safe_name(member.name.rstrip("/") if member.folder else member.name, origin=origin)
            if member.folder:
                _make_folder(folder / name, origin=origin)
            else:
                total = _write(member, folder, name, total=total, origin=origin, limit=limit)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OverflowError) as error:
        raise FetchError(f"{origin}: the archive is damaged or cut off ({reason_of(error)}); fetch it again") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile: encrypted, or an unknown compression
        raise FetchError(f"{origin}: the archive cannot be unpacked: {reason_of(error)}") from error
    except gzip.BadGzipFile as error:
        raise FetchError(f"{origin}: the archive is damaged or cut off ({reason_of(error)}); fetch it again") from error
    except ValueError as error:  # tarfile and zipfile: numbers in headers that are none
        raise FetchError(f"{origin}: the archive is damaged ({reason_of(error)}); fetch it again") from error


def _write(member: _Member, folder: Path, name: PurePosixPath, *, total: int, origin: str, limit: int) -> int:
    """Copy one file, in pieces, and return how many bytes have been unpacked by now."""
    target = folder / name
    _make_folder(target.parent, origin=origin)
    try:
        with target.open("xb") as file, member.open() as source:
            while piece := source.read(_CHUNK):
                total += len(piece)
                check_room(total, origin=f"{origin}: what the archive unpacks to", limit=limit)
                file.write(piece)
    except (FileExistsError, IsADirectoryError) as error:
        raise FetchError(f"{origin}: the archive holds {str(name)!r} twice; nothing was kept") from error
    return total


def _make_folder(folder: Path, *, origin: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FetchError(f"{origin}: the archive holds {folder.name!r} as a file and as a folder") from error


def _members(archive: Path, *, origin: str) -> Iterator[_Member]:
    with archive.open("rb") as file:
        start = file.read(512)
        file.seek(0)
        if start.startswith(b"PK\x03\x04") or start.startswith(b"PK\x05\x06"):
            yield from _zip_members(file)
        elif start.startswith(b"\x1f\x8b"):
            with gzip.open(file) as plain:
                yield from _tar_members(plain)
                if len(plain.read(_LARGEST_READ)) == _LARGEST_READ:  # up to its end, where gzip checks its sum
                    raise tarfile.ReadError("something follows its end")
        elif start[257:262] == b"ustar" or _is_old_tar(start):
            yield from _tar_members(file)
        else:
            raise FetchError(f"{origin}: not a tar, tar.gz or zip archive; it begins with {start[:40]!r}")


def _is_old_tar(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _tar_members(file: Any) -> Iterator[_Member]:
    bounded = _Bounded(file)
    with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r:") as tar:
        while (info := tar.next()) is not None:
            yield _Member(info.name, lambda info=info: _opened(tar, info), _odd_kind(info), info.isdir())
    # tarfile takes a damaged or missing header for the end; the end is marked by zeros.
    if bounded.last != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it has no end")


def _opened(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    found = tar.extractfile(info)
    assert found is not None, "plain files can be opened"
    return found


def _odd_kind(info: tarfile.TarInfo) -> str:
    kinds = {
        tarfile.SYMTYPE: "symbolic link",
        tarfile.LNKTYPE: "hard link",
        tarfile.CHRTYPE: "device",
        tarfile.BLKTYPE: "device",
        tarfile.FIFOTYPE: "named pipe",
        tarfile.GNUTYPE_SPARSE: "sparse file",
    }
    if info.isdir() or (info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse()):
        return ""
    return kinds.get(info.type, "sparse file" if info.issparse() else "member of an unknown kind")


def _zip_members(file: IO[bytes]) -> Iterator[_Member]:
    with zipfile.ZipFile(cast(IO[bytes], _Bounded(file))) as archive:
        for info in archive.infolist():
            mode = stat.S_IFMT(info.external_attr >> 16)
            odd = {stat.S_IFLNK: "symbolic link", stat.S_IFIFO: "named pipe"}.get(mode, "device")
            plain = mode in (0, stat.S_IFREG, stat.S_IFDIR)
            folder = info.filename.endswith("/")  # zipfile's own is_dir() fails for a name that is empty
            yield _Member(info.filename, lambda info=info: archive.open(info), "" if plain else odd, folder)


class _Bounded(io.RawIOBase):
    """A file that refuses to be read into memory at once, and remembers what was read last."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.last = b""

    def read(self, size: int = -1, /) -> bytes:
        if size > _LARGEST_READ:
            raise tarfile.ReadError(f"a header says that it is {size} bytes long")
        self.last = self._file.read(size if size >= 0 else _LARGEST_READ)
        if size < 0 and len(self.last) == _LARGEST_READ:
            raise zipfile.BadZipFile("its table of contents is too long")
        return self.last

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            raise zipfile.BadZipFile("it points to a place before its beginning") from error

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

"""What adapters that lie elsewhere have in common: where copies are kept, how large they may be, what was fetched."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_squeeze.errors import FetchError, SettingsError
from lora_squeeze.sizes import bytes_text, read_size

__all__ = ["Fetched", "OnDownload", "cache_folder", "check_room", "check_space", "download_limit", "safe_name"]

# What is being done, bytes so far, and of how many (0: not known).
OnDownload = Callable[[str, int, int], None]

LIMIT = "LORA_SQUEEZE_MAX_DOWNLOAD"
CACHE = "LORA_SQUEEZE_CACHE"

# The largest LoRA of a mixture-of-experts model is some ten gigabytes; a full checkpoint is hundreds.
_DEFAULT_LIMIT = 32 * 10**9


@dataclass(frozen=True)
class Fetched:
    """An adapter that now lies on this disk.

    path
        its folder, or its file.
    origin
        where it came from, with the revision or checkpoint that was fetched; never a token.
    files
        what of the folder belongs to it, as relative paths; None: everything.
    notes
        what the user should know about the copy.
    """

    path: Path
    origin: str
    files: frozenset[str] | None = None
    notes: tuple[str, ...] = ()


def cache_folder() -> Path:
    """Where fetched checkpoints are kept: $LORA_SQUEEZE_CACHE, or lora-squeeze in the user's cache folder."""
    if own := os.environ.get(CACHE):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "lora-squeeze"


def download_limit() -> int:
    """The largest adapter that is fetched, in bytes: $LORA_SQUEEZE_MAX_DOWNLOAD, as 8GB; by default 32 GB.

    Raises SettingsError for anything that is no size.
    """
    text = os.environ.get(LIMIT, "").strip()
    try:
        return read_size(text) if text else _DEFAULT_LIMIT
    except ValueError:
        raise SettingsError(f"{LIMIT} is '{text}', which is no size; write it as 8GB or 500MB") from None


def check_room(size: int, *, origin: str, limit: int) -> None:
    """Refuse what is larger than the limit. Raises FetchError."""
    if size > limit:
        raise FetchError(
            f"{origin}: {bytes_text(size)} is more than the {bytes_text(limit)} that may be downloaded; "
            f"if that is what you want, set {LIMIT}"
        )


def check_space(size: int, *, origin: str, folder: Path) -> None:
    """Refuse what does not fit on the disk of `folder`. Raises FetchError."""
    if size > (free := shutil.disk_usage(folder).free):
        raise FetchError(
            f"{origin}: {bytes_text(size)} do not fit on the disk of {folder}: {bytes_text(free)} are free"
        )


def safe_name(name: str, *, origin: str) -> PurePosixPath:
    """A file's path inside its folder. Raises FetchError if it leads anywhere else, or is no plain name."""
    parts = [part for part in name.split("/") if part != "."]
    odd = "\\" in name or any(ord(sign) < 32 for sign in name) or re.match(r"[A-Za-z]:", name)
    if (
        odd
        or not parts
        or any(part in ("", "..") for part in parts)
        or any(len(os.fsencode(part)) > 255 for part in parts)
    ):
        raise FetchError(
            f"{origin}: holds a file named {name[:200]!r}, which would not lie inside its own folder; nothing was kept"
        )
    return PurePosixPath(*parts)

"""Copies of what was fetched: each content once, under its SHA-256, and which path had which content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lora_squeeze.formats.hashing import sha256_of_file

__all__ = ["Copy", "known_copy", "store_copy"]


@dataclass(frozen=True)
class Copy:
    """A folder whose files are not changed any more, and when they were fetched."""

    folder: Path
    fetched: str


def known_copy(copies: Path, name: str) -> Copy | None:
    """The copy of what was fetched under this name, if all its files are there in full."""
    try:
        record: Any = json.loads(_record(copies, name).read_text(encoding="utf-8"))
        folder = _content(copies, str(record["content"]))
        sizes = {str(file): int(size) for file, size in record["files"].items()}
        whole = (
            record["name"] == name and sizes and all((folder / file).stat().st_size == sizes[file] for file in sizes)
        )
        return Copy(folder, str(record["fetched"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store_copy(copies: Path, name: str, files: Path) -> Copy:
    """Move a folder of files to where its content belongs, and remember which name it has.

    files
        in a folder of its own, on the same disk, which is removed afterwards.

    Whoever comes second with the same content (another process, another name) uses what is there.
    Raises OSError.
    """
    names = sorted(str(file.relative_to(files)) for file in files.rglob("*") if file.is_file())
    hashes = {file: sha256_of_file(files / file) for file in names}
    content = hashlib.sha256("".join(f"{hashes[file]}  {file}\n" for file in names).encode(errors="surrogateescape"))
    sizes = {file: (files / file).stat().st_size for file in names}
    folder = _content(copies, content.hexdigest())
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not all((folder / file).exists() and (folder / file).stat().st_size == sizes[file] for file in names):
        if folder.exists():  # damaged by somebody
            folder.rename(files.parent / "damaged")
        try:
            files.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    fetched = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    record = {"name": name, "content": content.hexdigest(), "fetched": fetched, "files": sizes, "sha256": hashes}
    place = _record(copies, name)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = files.parent / "record"  # on the same disk; whoever else writes it writes the same
    beside.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    beside.replace(place)
    return Copy(folder, fetched)


def _record(copies: Path, name: str) -> Path:
    return copies / "paths" / f"{hashlib.sha256(name.encode()).hexdigest()}.json"


def _content(copies: Path, content: str) -> Path:
    return copies / "content" / content

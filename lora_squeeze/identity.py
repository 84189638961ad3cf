"""A source that is known again: where it lies, what it is called among others, and whether it is still what it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import FetchError
from lora_squeeze.formats import open_adapter
from lora_squeeze.formats.hashing import sha256_of_file
from lora_squeeze.formats.hub import commit_of, parse_hub_path
from lora_squeeze.formats.tinker import is_tinker_path

__all__ = ["from_root", "identity_now", "identity_of", "last_parts", "place_of", "told_apart"]


def place_of(source: str) -> str:
    """One spelling for all that `open_adapter` takes for the same: a path from the root, or an address.

    Links are not followed: what `latest` leads to may change, and it is `latest` still.
    """
    location = Path(source).expanduser()
    if location.exists():
        return from_root(source)
    try:
        address = None if is_tinker_path(source) else parse_hub_path(source)
    except FetchError:  # said again, to the user, when it is opened
        return source
    if address is not None:
        return str(address)
    return source if "://" in source else from_root(source)


def from_root(path: str) -> str:
    """A path from the root, without a look at the disk."""
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100 - Path.resolve() follows links


def last_parts(source: str, count: int) -> list[str]:
    """The last so many parts of a path or address that name something."""
    return [part for part in source.replace("\\", "/").split("/") if part not in ("", ".", "..")][-count:]


def told_apart(
    sources: Sequence[str],
    spelled: Callable[[list[str]], str],
    *,
    key: Callable[[str], str] = str,
    taken: Collection[str] = (),
) -> list[str] | None:
    """A name for each source: its own, or with as many of the folders that it lies in as make all of them different.

    spelled
        the last parts of a source → its name.
    key, taken
        what of a name has to be different, and what none may be.

    None where seven parts are not enough.
    """
    for count in range(1, 8):
        names = [spelled(last_parts(source, count)) for source in sources]
        keys = {key(name) for name in names}
        if len(keys) == len(names) and not keys & set(taken):
            return names
    return None


def identity_of(adapter: Adapter) -> str:
    """What changes when an adapter is trained again in its place, or is edited.

    Of one that was fetched, its address with the revision; of one on this disk, a SHA-256 over its weights, its
    configuration and the files that go with it. Raises AdapterError if they cannot be read, or change meanwhile.
    """
    if adapter.origin:
        return adapter.origin
    lines = [
        adapter.sha256(),
        json.dumps(dict(adapter.config), sort_keys=True, default=str),
        *(f"{sha256_of_file(file)}  {name}" for name, file in sorted(adapter.files.items())),
    ]
    return "sha256:" + hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def identity_now(place: str) -> str:
    """The `identity_of` what lies there now; "" where nothing can be asked.

    That is a path where nothing is any more, a Hub that does not answer, and Tinker, whose checkpoints do not change.
    Nothing is fetched. Raises AdapterError for a damaged adapter.
    """
    if Path(place).exists():
        return identity_of(open_adapter(place))
    try:
        address = None if is_tinker_path(place) else parse_hub_path(place)
        return str(replace(address, revision=commit_of(address))) if address is not None else ""
    except FetchError:
        return ""

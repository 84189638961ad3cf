"""Downloading one file to disk: streamed, bounded, taken up again where it broke off."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lora_squeeze.errors import FetchError
from lora_squeeze.extras import require
from lora_squeeze.formats.remote import check_room, check_space
from lora_squeeze.sizes import bytes_text

if TYPE_CHECKING:
    import httpx

__all__ = ["check_reachable", "download"]

_ATTEMPTS = 4
_PAUSE = 0.4  # seconds before the second attempt; twice as long before each further one
_SILENCE = 60  # seconds without a byte after which a connection is given up


def download(
    url: str,
    target: Path,
    *,
    origin: str,
    limit: int,
    before: int = 0,
    on_bytes: Callable[[int, int], object] | None = None,
) -> int:
    """Write what lies at an address into a new file and return its size in bytes.

    url
        may carry a signature, so it is in no message; `origin` stands for it there.
    limit
        the largest size, in bytes; it holds for what is announced and for what comes.
    before
        what has been downloaded already and counts towards the limit.
    on_bytes
        called with the bytes so far and of how many (0: not known).

    Raises FetchError; half a file may be left then.
    """
    httpx = require("httpx", "tinker")  # the HTTP client of the Tinker SDK itself
    with target.open("xb") as file:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                _receive(url, file, origin=origin, limit=limit, before=before, on_bytes=on_bytes)
                break
            except httpx.TransportError as error:
                if attempt == _ATTEMPTS:
                    raise FetchError(_broken_off(url, file.tell(), error, origin=origin)) from None
                time.sleep(_PAUSE * 2 ** (attempt - 1))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def check_reachable(url: str, *, origin: str) -> None:
    """Ask a service for any sign of life, within ten seconds. Raises FetchError if there is none."""
    httpx = require("httpx", "tinker")
    try:
        httpx.get(url, timeout=10, verify=_certificates())
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise FetchError(
            f"{origin}: {_host(url)} cannot be reached ({type(error).__name__}); check the network and any proxy"
        ) from None


def _receive(
    url: str,
    file: IO[bytes],
    *,
    origin: str,
    limit: int,
    before: int,
    on_bytes: Callable[[int, int], object] | None,
) -> None:
    """One attempt; what an earlier one received is kept if the server goes on from there."""
    headers = {"Accept-Encoding": "identity"}
    if file.tell():
        headers["Range"] = f"bytes={file.tell()}-"
    options = {"headers": headers, "follow_redirects": True, "timeout": _SILENCE, "verify": _certificates()}
    with require("httpx", "tinker").stream("GET", url, **options) as response:
        if not _goes_on(response, file.tell()):
            file.seek(0)
            file.truncate()
        _check_status(response, origin=origin)
        announced = response.headers.get("Content-Length", "")
        total = file.tell() + int(announced) if announced.isdecimal() else 0
        check_room(before + total, origin=origin, limit=limit)
        check_space(total, origin=origin, folder=Path(file.name).parent)
        for piece in response.iter_bytes():
            check_room(before + file.tell() + len(piece), origin=origin, limit=limit)
            file.write(piece)
            if on_bytes is not None:
                on_bytes(file.tell(), total)


@cache
def _certificates() -> Any:
    """Whom to trust; reading the list takes a tenth of a second."""
    return require("httpx", "tinker").create_ssl_context()


def _goes_on(response: httpx.Response, position: int) -> bool:
    """Whether this is the rest of the file, from exactly this byte."""
    start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return response.status_code == 206 and start is not None and int(start[1]) == position


def _check_status(response: httpx.Response, *, origin: str) -> None:
    if response.status_code in (200, 206):
        return
    host = _host(str(response.url))
    if response.status_code in (400, 401, 403, 410):
        raise FetchError(
            f"{origin}: {host} refused the download ({response.status_code}): its address is no longer valid, "
            "or never was; run again for a new one"
        )
    raise FetchError(f"{origin}: {host} answered {response.status_code} instead of the file; try again later")


def _broken_off(url: str, received: int, error: Exception, *, origin: str) -> str:
    if not received:
        return f"{origin}: {_host(url)} cannot be reached ({type(error).__name__}); check the network and any proxy"
    return f"{origin}: the download broke off after {bytes_text(received)}, {_ATTEMPTS} times; try again later"


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the server"

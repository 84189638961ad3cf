"""Checkpoints at Tinker: fetched through its own SDK, kept by content, then PEFT adapters like any others.

Three kinds of paths, three ways to their files:

tinker://RUN/external_weights/NAME
    The SDK signs an address for each file.
tinker://RUN/weights/NAME
    Older SDKs (before 0.36) sign an address of an archive. Newer ones no longer can: as the SDK's own
    `tinker checkpoint download` does it, the checkpoint is loaded into a short training session, saved as external
    weights that expire within the hour, fetched, and deleted there.
tinker://RUN/sampler_weights/NAME
    The archive; newer SDKs cannot fetch these at all.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_squeeze.errors import AdapterError, FetchError, MissingExtra, UnsupportedAdapter
from lora_squeeze.extras import require
from lora_squeeze.formats.downloads import check_reachable, download
from lora_squeeze.formats.fetched import known_copy, store_copy
from lora_squeeze.formats.remote import Fetched, OnDownload, cache_folder, download_limit, safe_name
from lora_squeeze.formats.tensors import read_safetensors
from lora_squeeze.formats.unpacking import unpack
from lora_squeeze.peft_names import CONFIG, WEIGHTS

__all__ = ["TinkerPath", "fetch_from_tinker", "is_tinker_path", "parse_tinker_path"]

SERVICE = "https://tinker.thinkingmachines.dev/services/tinker-prod"  # the SDK's own default
SAMPLER, TRAINING, EXTERNAL = "sampler_weights", "weights", "external_weights"

_EXPORT = "lora-squeeze-download"
_EXPORT_SECONDS = 3600  # the shortest life that the service gives an export
_SERVICE_FILES = ("checkpoint_complete",)  # marks of the service, no part of the adapter
_CREDENTIALS = Path("~/.tinker/credentials.json")


@dataclass(frozen=True)
class TinkerPath:
    """A checkpoint: tinker://RUN/KIND/NAME."""

    run: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"


@dataclass(frozen=True)
class _Order:
    """A checkpoint to fetch from a service into an empty folder, at most so many bytes."""

    place: TinkerPath
    service: str
    folder: Path
    limit: int
    on_download: OnDownload | None


def is_tinker_path(text: str) -> bool:
    """Whether this is meant as the path of a Tinker checkpoint."""
    return text.startswith("tinker:/")


def parse_tinker_path(text: str) -> TinkerPath:
    """Raises FetchError if it is no tinker://RUN/KIND/NAME."""
    found = re.fullmatch(rf"tinker:/+([^/\s]+)/({SAMPLER}|{TRAINING}|{EXTERNAL})/([^/\s]+)/?", text)
    if found is None:
        raise FetchError(
            f"{text}: not a Tinker path; write tinker://RUN/{TRAINING}/NAME, tinker://RUN/{SAMPLER}/NAME "
            f"or tinker://RUN/{EXTERNAL}/NAME"
        )
    return TinkerPath(*found.groups())


def fetch_from_tinker(text: str, *, on_download: OnDownload | None = None, limit: int | None = None) -> Fetched:
    """Fetch a checkpoint, or find it among those that were fetched before: they do not change.

    limit
        the largest size in bytes, of what is downloaded and of what it unpacks to; default: `download_limit`.

    Raises FetchError if it cannot be fetched, AdapterError if it is no adapter, MissingExtra without the SDK.
    """
    place = parse_tinker_path(text)
    service = os.environ.get("TINKER_BASE_URL", "").rstrip("/") or SERVICE
    copies = cache_folder() / "tinker"
    copy = known_copy(copies, f"{service}\n{place}")
    if copy is None:
        limit = download_limit() if limit is None else limit
        with _in_cache(copies, str(place)) as work:
            files = work / "files"
            files.mkdir()
            _fetch(_Order(place, service, files, limit, on_download))
            _adapter_folder(files, origin=str(place))
            copy = store_copy(copies, f"{service}\n{place}", files)
    folder = _adapter_folder(copy.folder, origin=str(place))
    _refuse_raw_experts(folder, origin=str(place))
    return Fetched(
        path=folder,
        origin=str(place),
        files=frozenset(
            str(file.relative_to(folder))
            for file in folder.rglob("*")
            if file.is_file() and file.name not in _SERVICE_FILES
        ),
        notes=(f"fetched from Tinker on {copy.fetched}; the copy is in {copy.folder}",),
    )


def _fetch(order: _Order) -> None:
    """Put the checkpoint's files into the folder, whichever way this SDK has for this kind."""
    tinker, place = require("tinker", "tinker"), order.place
    _check_key(place)
    check_reachable(f"{order.service}/api/v1/healthz", origin=str(place))
    with _sdk_errors(place):
        rest = _rest_client(tinker, order.service)
    if place.kind == EXTERNAL:
        if not hasattr(rest, "get_external_weights_urls"):
            raise FetchError(
                f"{place}: tinker {_version(tinker)} knows no external weights: pip install --upgrade tinker"
            )
        _fetch_external(order, lambda: _signed(rest, place, str(place)))
    elif hasattr(rest, "get_checkpoint_archive_url_from_tinker_path"):
        _fetch_archive(order, rest)
    elif place.kind == TRAINING:
        _fetch_export(order, rest, tinker.ServiceClient)
    else:
        raise FetchError(
            f"{place}: sampler checkpoints can no longer be downloaded (tinker {_version(tinker)}); give the training "
            f"checkpoint, tinker://RUN/{TRAINING}/NAME, or save the weights with save_weights_external and give "
            f"tinker://RUN/{EXTERNAL}/NAME"
        )


def _fetch_archive(order: _Order, rest: Any) -> None:
    """Let the service make an archive, fetch and unpack it."""
    place, archive = order.place, order.folder.parent / "archive"
    _tell(order, f"Waiting for the archive of {place.name}")
    with _sdk_errors(place):
        url = rest.get_checkpoint_archive_url_from_tinker_path(str(place)).result().url
    on_bytes = _bytes(order, f"Fetching {place.name}")
    download(url, archive, origin=str(place), limit=order.limit, on_bytes=on_bytes)
    unpack(archive, order.folder, origin=str(place), limit=order.limit)
    archive.unlink()


def _fetch_export(order: _Order, rest: Any, connect: Callable[..., Any]) -> None:
    """Load a training checkpoint into a session of its own, export it from there, fetch that, and clear up."""
    place = order.place
    _tell(order, f"Tinker exports {place.name} (a short training session)")
    status = "errored"
    with _sdk_errors(place):
        client = connect(base_url=order.service, user_metadata={"created_by": "lora-squeeze"})
    try:
        with _sdk_errors(place):
            loading = client.create_training_client_from_state(str(place))
            session = loading.result() if hasattr(loading, "result") else loading  # 0.36 waits by itself
            export = session.save_weights_external(_EXPORT, ttl_seconds=_EXPORT_SECONDS).result().path

        def sign() -> dict[str, str]:
            with _sdk_errors(place):
                rest.set_checkpoint_ttl_from_tinker_path(export, _EXPORT_SECONDS).result()
            return _signed(rest, place, export)

        try:
            _fetch_external(order, sign)
        finally:  # what fails here ends by itself within the hour
            with suppress(FetchError), _sdk_errors(place):
                rest.delete_checkpoint_from_tinker_path(export).result()
        status = "success"
    finally:
        with suppress(FetchError), _sdk_errors(place):
            client.close(status).result()


def _fetch_external(order: _Order, sign: Callable[[], dict[str, str]]) -> None:
    """Fetch the files of external weights one by one; each under an address that has just been signed."""
    place = order.place
    names = sorted(sign())
    if not names:
        raise FetchError(f"{place}: this checkpoint holds no files")
    if encrypted := [name for name in names if name.endswith(".age")]:
        raise FetchError(f"{place}: {encrypted[0]} is encrypted with age; decrypt the files and give their folder")
    total = 0
    for name in names:
        target = order.folder / safe_name(name, origin=str(place))
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in (addresses := sign()):
            raise FetchError(f"{place}: {name} was deleted while the checkpoint was being fetched")
        on_bytes = _bytes(order, f"Fetching {name}")
        total += download(
            addresses[name], target, origin=str(place), limit=order.limit, before=total, on_bytes=on_bytes
        )


def _signed(rest: Any, place: TinkerPath, path: str) -> dict[str, str]:
    with _sdk_errors(place):
        return dict(rest.get_external_weights_urls(path).result().urls)


def _rest_client(tinker: Any, service: str) -> Any:
    """A client that needs no session; older SDKs have it from a ServiceClient only.

    The SDK keeps its connections by what it is given here, not by what the environment says meanwhile.
    """
    if hasattr(tinker, "RestClient"):
        return tinker.RestClient(base_url=service, api_key=os.environ.get("TINKER_API_KEY") or None)
    return tinker.ServiceClient(base_url=service).create_rest_client()


def _version(tinker: Any) -> str:
    return str(getattr(tinker, "__version__", "0.36 or newer"))


def _check_key(place: TinkerPath) -> None:
    """The SDK would say so as well, but only once it has reached the service."""
    if not any(os.environ.get(name) for name in ("TINKER_API_KEY", "TINKER_CREDENTIAL_CMD")):
        if _CREDENTIALS.expanduser().exists():
            return
        raise FetchError(f"{place}: no key for Tinker; set TINKER_API_KEY, or log in with `tinker auth login`")


@contextmanager
def _sdk_errors(place: TinkerPath) -> Generator[None, None, None]:
    """Say what went wrong at Tinker; no key and no signed address gets into a message or a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecations are the SDK's and this file's business
            yield
    except (AdapterError, MissingExtra):
        raise
    except Exception as error:
        raise FetchError(f"{place}: {_said(error)}") from None


def _said(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    text = _without_secrets(str(error))
    if status == 401:
        return f"Tinker does not accept the key in TINKER_API_KEY ({text})"
    if status == 403:
        return f"this key may not read the checkpoint ({text})"
    if status == 404:
        return f"Tinker has no such checkpoint, or it has expired; `tinker checkpoint list` shows yours ({text})"
    return f"Tinker: {type(error).__name__}: {text}"


def _without_secrets(text: str) -> str:
    for name in ("TINKER_API_KEY", "CLOUDFLARE_ACCESS_CLIENT_ID", "CLOUDFLARE_ACCESS_CLIENT_SECRET"):
        if secret := os.environ.get(name):
            text = text.replace(secret, "…")
    text = re.sub(r"\b(tml-|eyJ)[\w.-]+", "…", text)
    text = re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1", text)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _bytes(order: _Order, what: str) -> Callable[[int, int], None] | None:
    report = order.on_download
    return None if report is None else lambda done, total: report(what, done, total)


def _tell(order: _Order, what: str) -> None:
    if order.on_download is not None:
        order.on_download(what, 0, 0)


@contextmanager
def _in_cache(copies: Path, origin: str) -> Generator[Path, None, None]:
    """A folder for the time of the download, on the disk where the copy will stay."""
    try:
        copies.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=copies, ignore_cleanup_errors=True) as work:
            yield Path(work)
    except OSError as error:
        what = error.strerror or str(error)
        raise FetchError(
            f"{origin}: {error.filename or copies} cannot be written: {what}; set LORA_SQUEEZE_CACHE"
        ) from error


def _adapter_folder(folder: Path, *, origin: str) -> Path:
    """The one folder with an adapter_config.json. Raises AdapterError if there is none, or several."""
    found = sorted(file.parent for file in folder.rglob(CONFIG) if file.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(one.relative_to(folder)) for one in found)
        raise AdapterError(f"{origin}: holds several adapters: {names}")
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    held = ", ".join(names[:8]) + (" …" if len(names) > 8 else "") or "nothing"
    raise AdapterError(f"{origin}: holds no {CONFIG}, so it is no PEFT adapter; it holds {held}")


def _refuse_raw_experts(folder: Path, *, origin: str) -> None:
    """Tinker's own format has one three-dimensional tensor for all experts, which PEFT does not."""
    if not (folder / WEIGHTS).exists():
        return
    tensors = read_safetensors(folder / WEIGHTS).tensors.values()
    raw = [one.key for one in tensors if ".experts" in one.key and ".lora_" in one.key and len(one.shape) == 3]
    if raw:
        raise UnsupportedAdapter(
            f"{origin}: '{raw[0]}' holds all experts as one three-dimensional tensor, which is Tinker's own format and "
            "not PEFT's; turn it into a PEFT adapter with tinker_cookbook.weights.build_lora_adapter and give that "
            f"(the checkpoint lies in {folder})"
        )

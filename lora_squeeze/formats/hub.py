"""Adapters on the Hugging Face Hub: what an address means, and fetching only the files that belong to an adapter.

huggingface_hub does the rest: its cache, its token, its offline mode.
"""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from lora_squeeze.errors import FetchError
from lora_squeeze.formats.folder import belongs_to_training
from lora_squeeze.formats.remote import Fetched, OnDownload, check_room, download_limit
from lora_squeeze.peft_names import CONFIG, PICKLED_WEIGHTS, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["HubPath", "Listing", "choose_files", "fetch_from_hub", "hub_errors", "parse_hub_path"]

_WEIGHTS = (WEIGHTS, PICKLED_WEIGHTS)
SINGLE = ".safetensors"

_NAME = r"[A-Za-z0-9][\w.-]*"
_REPO = rf"{_NAME}/{_NAME}"
_REVISION = r"refs/pr/\d+|refs/convert/[^/]+|[^/@]+"
_ADDRESS = re.compile(rf"(?P<repo>{_REPO})(?:@(?P<revision>{_REVISION}))?(?:/(?P<path>.+?))?/?", re.ASCII)
_BARE = re.compile(rf"{_REPO}(@({_REVISION})(/.+)?)?", re.ASCII)
_WEB = re.compile(
    rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>{_REPO})"
    rf"(?:/(?:tree|blob|resolve)/(?P<revision>{_REVISION})(?:/(?P<path>[^?#]+?))?)?/?(?:\?[^#]*)?",
    re.ASCII,
)

# What lies beside an adapter and goes with it is small: tokenizers, templates, cards. All else is left on the Hub.
_LARGEST_COMPANION = 64 * 10**6
_OTHER_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|msgpack|h5|npz|pkl|tflite|zip|tar|gz)", re.I)
_WHOLE_MODEL = ("config.json", "model_index.json")


@dataclass(frozen=True)
class HubPath:
    """A model repository, its revision ("" for the default branch), and a folder or file in it ("" for its root)."""

    repo: str
    revision: str = ""
    path: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}{'/' + self.path if self.path else ''}"


@dataclass(frozen=True)
class Listing:
    """The files of one commit: their sizes, and where they lie if nothing may be fetched any more."""

    commit: str
    sizes: Mapping[str, int]
    snapshot: Path | None = None
    note: str = ""


def parse_hub_path(text: str) -> HubPath | None:
    """hf://user/repo[@revision][/path], user/repo[@revision[/path]] or a page's address; None for anything else.

    A slash in the name of a revision is written %2F; refs/pr/1 is understood as it is.
    Raises FetchError if it begins with hf:// and goes on with something else.
    """
    if web := _WEB.fullmatch(text):
        return _hub_path(web)
    if re.match(r"hf:/", text):
        rest = re.sub(r"hf:/+(models/)?", "", text, count=1)
        found = _ADDRESS.fullmatch(rest)
        if rest.startswith(("datasets/", "spaces/", "buckets/")) or found is None:
            raise FetchError(f"{text}: not a model on the Hub; write hf://user/repo, hf://user/repo@revision/folder")
        return _hub_path(found)
    if _BARE.fullmatch(text) and not _OTHER_WEIGHTS.fullmatch(text):
        found = _ADDRESS.fullmatch(text)
        return _hub_path(found) if found else None
    return None


def fetch_from_hub(place: HubPath, *, on_download: OnDownload | None = None) -> Fetched:
    """Fetch an adapter's files into huggingface_hub's cache; nothing else of the repository.

    What is there already is not fetched again. Without a connection, or with HF_HUB_OFFLINE=1, the copy in
    the cache is taken. Raises FetchError.
    """
    listing = _listing(place)
    origin = str(replace(place, revision=listing.commit))
    chosen, notes = choose_files(place, listing.sizes)
    check_room(sum(listing.sizes[name] for name in chosen), origin=str(place), limit=download_limit())
    snapshot = listing.snapshot or _download(place, listing, chosen, on_download)
    folder = _folder_of(chosen)
    return Fetched(
        path=snapshot / (folder if CONFIG in _names_in(folder, chosen) else chosen[0]),
        origin=origin,
        files=frozenset(_names_in(folder, chosen)),
        notes=tuple(note for note in (listing.note, *notes) if note),
    )


def choose_files(place: HubPath, sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Which files make up the adapter (its configuration, or its one file, first), and what to note about it.

    sizes
        of all files of the repository, in bytes.

    Raises FetchError if there is none, or more than one.
    """
    if place.path in sizes:
        name = place.path.rpartition("/")[2]
        if name == CONFIG or name in _WEIGHTS:
            return choose_files(replace(place, path=_folder_of([place.path])), sizes)
        if name.endswith(SINGLE):
            return [place.path], []
        raise FetchError(f"{place}: not an adapter; give its folder, or a {SINGLE} file")
    inside = _names_in(place.path, sizes)
    if not inside:
        raise FetchError(f"{place}: there is no such file or folder in this repository{_elsewhere(place, sizes)}")
    prefix = f"{place.path}/" if place.path else ""
    if CONFIG in inside:
        weights = [name for name in _WEIGHTS if name in inside][:1]
        companions, left = _companions(inside, {name: sizes[prefix + name] for name in inside})
        return [prefix + name for name in (CONFIG, *weights, *companions)], left
    return [prefix + _single(place, inside, sizes)], []


def _single(place: HubPath, inside: list[str], sizes: Mapping[str, int]) -> str:
    """The one weight file of an adapter without a configuration, as they are used for image generation."""
    files = [name for name in inside if name.endswith(SINGLE) and "/" not in name]
    if any(name in inside for name in _WHOLE_MODEL):
        raise FetchError(f"{place}: a whole model, not an adapter{_elsewhere(place, sizes)}")
    if not files:
        raise FetchError(f"{place}: holds neither {CONFIG} nor a {SINGLE} file{_elsewhere(place, sizes)}")
    if len(files) > 1:
        raise FetchError(
            f"{place}: holds {len(files)} {SINGLE} files: {_some(files)}; name one, as in "
            f"{replace(place, path='/'.join(filter(None, (place.path, files[0]))))}"
        )
    return files[0]


def _companions(inside: list[str], sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The small files that go with an adapter, and a note of what was left on the Hub."""
    nested = {_folder_of([name]) for name in inside if "/" in name and name.rpartition("/")[2] in (CONFIG, *_WEIGHTS)}
    taken: list[str] = []
    left: list[str] = []
    for name in inside:
        top, _, rest = name.partition("/")
        if name in (CONFIG, *_WEIGHTS) or belongs_to_training(top) or any(name.startswith(f"{one}/") for one in nested):
            continue
        large = sizes[name] > _LARGEST_COMPANION
        (left if large or _OTHER_WEIGHTS.fullmatch(rest.rpartition("/")[2] or top) else taken).append(name)
    return taken, [f"left on the Hub, as it is no part of the adapter: {_some(left)}"] if left else []


def _listing(place: HubPath) -> Listing:
    """The files of the revision, as the Hub has them now, or else as they lie in the cache."""
    from huggingface_hub import HfApi

    try:
        with hub_errors(str(place)):
            found = HfApi().model_info(place.repo, revision=place.revision or None, files_metadata=True, timeout=30)
    except FetchError as error:
        if not _is_connection(error.__cause__):
            raise
        return _cached(place, error)
    sizes = {one.rfilename: one.size or 0 for one in found.siblings or ()}
    return Listing(commit=str(found.sha), sizes=sizes)


def _cached(place: HubPath, reason: FetchError) -> Listing:
    """What huggingface_hub's cache holds of the revision."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    wanted = place.revision or "main"
    try:
        repos = [
            one
            for one in scan_cache_dir(constants.HF_HUB_CACHE).repos
            if (one.repo_id, one.repo_type) == (place.repo, "model")
        ]
    except CacheNotFound:
        repos = []
    for revision in (revision for repo in repos for revision in repo.revisions):
        if wanted in revision.refs or wanted == revision.commit_hash:
            root = Path(revision.snapshot_path)
            sizes = {str(file.file_path.relative_to(root)): file.size_on_disk for file in revision.files}
            note = f"the Hub was not asked: this is the copy in its cache, commit {revision.commit_hash[:12]}"
            return Listing(commit=revision.commit_hash, sizes=sizes, snapshot=root, note=note)
    raise FetchError(f"{reason}; nor is it in the cache of the Hub") from reason


def _download(place: HubPath, listing: Listing, chosen: list[str], on_download: OnDownload | None) -> Path:
    """Fetch these files; the first by the name of the revision, so that the cache knows it offline as well."""
    from huggingface_hub import hf_hub_download

    total = sum(listing.sizes[name] for name in chosen)
    options: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        options["tqdm_class"] = _bar(lambda done: on_download and on_download(f"Fetching {place.repo}", done, total))
    files: list[Path] = []
    with hub_errors(str(place)):
        for name in chosen:
            revision = listing.commit if files else place.revision or None
            files.append(Path(hf_hub_download(place.repo, name, revision=revision, **options)))
    snapshots = {Path(*file.parts[: -len(Path(name).parts)]) for file, name in zip(files, chosen, strict=True)}
    if len(snapshots) != 1:
        raise FetchError(f"{place}: the repository was changed while it was being fetched; run again")
    return snapshots.pop()


def _bar(report: Callable[[int], object]) -> type:
    """A progress bar for huggingface_hub that shows nothing and reports the bytes of all files together."""
    from tqdm import tqdm

    finished = 0

    class Bar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal finished
            finished += int(n or 0)
            report(finished)
            return super().update(n)

    return Bar


@contextmanager
def hub_errors(place: str) -> Generator[None, None, None]:
    """Say what went wrong on the Hub in words that name the way out; no token, no address with a signature."""
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise FetchError(
            f"{place}: access has to be granted first: ask for it on the model's page, then {log_in}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FetchError(
            f"{place}: no such model on the Hub, or it is private and this account may not see it; then {log_in}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FetchError(f"{place}: this repository has no such branch, tag or commit") from error
    except errors.LocalEntryNotFoundError as error:
        raise FetchError(f"{place}: the Hub cannot be reached, and the cache lacks a part of it") from error
    except errors.EntryNotFoundError as error:
        raise FetchError(f"{place}: there is no such file in this repository") from error
    except errors.OfflineModeIsEnabled as error:
        raise FetchError(f"{place}: HF_HUB_OFFLINE is set, so the Hub is not asked") from error
    except errors.HFValidationError as error:
        raise FetchError(f"{place}: not a name that the Hub allows: {error}") from error
    except errors.HfHubHTTPError as error:
        raise FetchError(f"{place}: the Hub answered {_status(error)}; {_what_to_do(error, log_in)}") from error
    except Exception as error:
        if not _is_connection(error):
            raise
        raise FetchError(f"{place}: the Hub cannot be reached ({type(error).__name__}); check the network") from error


def _status(error: Any) -> str:
    code = getattr(getattr(error, "response", None), "status_code", "an error")
    said = getattr(error, "server_message", None)
    return f"{code} ({said})" if said else str(code)


def _what_to_do(error: Any, log_in: str) -> str:
    code = getattr(getattr(error, "response", None), "status_code", 0)
    return f"check the rights of your token, or {log_in}" if code in (401, 403) else "try again later"


def _is_connection(error: BaseException | None) -> bool:
    """Whether there was no answer at all; whichever HTTP client this version of huggingface_hub uses."""
    names = {"ConnectionError", "TransportError", "Timeout", "OfflineModeIsEnabled"}
    return error is not None and any(base.__name__ in names for base in type(error).__mro__)


def _hub_path(found: re.Match[str]) -> HubPath:
    return HubPath(found["repo"], unquote(found["revision"] or ""), unquote(found["path"] or ""))


def _folder_of(names: list[str]) -> str:
    return names[0].rpartition("/")[0]


def _names_in(folder: str, names: Mapping[str, int] | list[str]) -> list[str]:
    """Names below a folder, relative to it."""
    prefix = f"{folder}/" if folder else ""
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def _elsewhere(place: HubPath, sizes: Mapping[str, int]) -> str:
    """Where in the repository adapters do lie."""
    folders = sorted(_folder_of([name]) for name in sizes if name.rpartition("/")[2] == CONFIG)
    if not folders:
        return ""
    return f"; adapters lie in {_some(folders)}: name one, as in {replace(place, path=folders[0])}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

"""Putting a squeezed adapter on the Hugging Face Hub, with a card that says what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_squeeze.errors import FetchError, OutputError, SettingsError
from lora_squeeze.formats.hub import HubPath, hub_errors, parse_hub_path
from lora_squeeze.peft_names import CONFIG
from lora_squeeze.records import Compression
from lora_squeeze.report.card import model_card

__all__ = ["check_push", "push"]

CARD = "README.md"


@dataclass(frozen=True)
class _Output:
    """The files to be uploaded (name → file), the fields of their configuration, and the card among them."""

    files: dict[str, Path]
    config: dict[str, Any]
    card: str


def push(compression: Compression, repo: str, *, private: bool | None = None, commit_message: str = "") -> str:
    """Upload what `squeeze` has written, in one commit, and return its address.

    compression
        what `squeeze` or `compress_adapter` returned; its `output` has to be on disk still.
    repo
        user/repo, or user/repo@branch; either is made if it is not there.
    private
        of a repository that is made now; None: as the account makes them. One that exists and is public is
        refused if it should be private.
    commit_message
        default: what was squeezed, by which policy.

    README.md gets a section with source, ranks, policy, retained variance and error. It is put into the
    repository's own card, if it has one, else into the one that came with the source.
    Raises OutputError if the Hub does not take it; SettingsError for an impossible name.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    place = check_push(repo)
    output = _read_output(compression)
    api = HfApi()
    with _hub(place):
        name = api.create_repo(place.repo, private=private, exist_ok=True).repo_id
        place = replace(place, repo=name)
        if private and not api.model_info(name).private:
            raise OutputError(f"{place}: this repository exists and is public; change that in its settings first")
        if place.revision:
            api.create_branch(place.repo, branch=place.revision, exist_ok=True)
        own = _own_card(place)
    card = model_card(
        compression,
        repo=place.repo,
        revision=place.revision,
        config=output.config,
        weight_name="" if output.config else next(iter(output.files)),
        existing=own if own is not None else output.card,
        own=own is not None,
    )
    operations = [CommitOperationAdd(name, file) for name, file in output.files.items() if name != CARD]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    message = commit_message or f"Adapter squeezed with lora-squeeze: {compression.policy}"
    with _hub(place):
        commit = api.create_commit(place.repo, operations, commit_message=message, revision=place.revision or None)
    return str(commit.commit_url)


def check_push(repo: str) -> HubPath:
    """What `push` can know beforehand: whether the name is possible, whether there is a token and a Hub.

    Raises SettingsError or OutputError.
    """
    from huggingface_hub import constants, get_token

    try:
        place = HubPath(repo) if re.fullmatch(r"[A-Za-z0-9][\w.-]*", repo, re.ASCII) else parse_hub_path(repo)
    except FetchError as error:
        raise SettingsError(str(error)) from error
    if place is None or place.path:
        raise SettingsError(f"'{repo}' is no name of a repository on the Hub; write user/repo or user/repo@branch")
    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"{place}: HF_HUB_OFFLINE is set, so nothing can be pushed")
    if not get_token():
        raise OutputError(f"{place}: pushing needs a token; log in with `hf auth login` or set HF_TOKEN")
    return place


def _read_output(compression: Compression) -> _Output:
    folder = Path(compression.output).expanduser()
    if folder.is_file():
        return _Output(files={folder.name: folder}, config={}, card="")
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    if CONFIG not in files:
        raise OutputError(f"{folder}: there is no adapter any more that could be pushed")
    card = files[CARD].read_text(encoding="utf-8", errors="replace") if CARD in files else ""
    return _Output(files=files, config=json.loads(files[CONFIG].read_text(encoding="utf-8")), card=card)


def _own_card(place: HubPath) -> str | None:
    """The repository's README.md as it is now; None if it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = hf_hub_download(place.repo, CARD, revision=place.revision or None)
    except EntryNotFoundError:
        return None
    return Path(file).read_text(encoding="utf-8", errors="replace")


@contextmanager
def _hub(place: HubPath) -> Generator[None, None, None]:
    """Errors as OutputError, and none of huggingface_hub's bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with hub_errors(str(place)):
            yield
    except FetchError as error:
        raise OutputError(f"{error}; nothing was pushed") from error.__cause__
    finally:
        if not quiet:
            enable_progress_bars()

"""The only code that opens or writes adapter files."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import AdapterError, FetchError, OutputError
from lora_squeeze.formats.diffusers import diffusers_size, is_diffusers, open_diffusers, write_diffusers
from lora_squeeze.formats.folder import check_output, new_file, new_folder
from lora_squeeze.formats.hub import fetch_from_hub, parse_hub_path
from lora_squeeze.formats.kohya import is_kohya, kohya_size, open_kohya, write_kohya
from lora_squeeze.formats.peft import open_peft, peft_size, sniff_peft, write_peft
from lora_squeeze.formats.peft_config import config_for
from lora_squeeze.formats.remote import Fetched, OnDownload
from lora_squeeze.formats.tensors import SafetensorsFile, read_safetensors
from lora_squeeze.formats.tinker import fetch_from_tinker, is_tinker_path
from lora_squeeze.peft_names import CONFIG, WEIGHTS

__all__ = [
    "FORMATS",
    "Format",
    "Written",
    "as_written",
    "check_output_of",
    "open_adapter",
    "save_adapter",
    "weights_size",
]


@dataclass(frozen=True)
class Format:
    """What a format can do.

    sniff
        whether what lies at a path is of this format, by content.
    open
        path → Adapter; no tensor is loaded.
    write
        Adapter and an empty folder → the weight file that was written into it; for a format of a
        single file, Adapter and the file's path.
    size
        the exact size in bytes of that file; computes no tensor.
    single_file
        whether an adapter is one file, not a folder.
    """

    name: str
    sniff: Callable[[Path], bool]
    open: Callable[[Path], Adapter]
    write: Callable[[Adapter, Path], Path]
    size: Callable[[Adapter], int]
    single_file: bool = False


def _is_file_of(holds: Callable[[SafetensorsFile], bool]) -> Callable[[Path], bool]:
    return lambda path: path.is_file() and holds(read_safetensors(path))


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format("peft", sniff_peft, open_peft, write_peft, peft_size),
        Format("kohya", _is_file_of(is_kohya), open_kohya, write_kohya, kohya_size, single_file=True),
        Format(
            "diffusers", _is_file_of(is_diffusers), open_diffusers, write_diffusers, diffusers_size, single_file=True
        ),
    )
}


@dataclass(frozen=True)
class Written:
    """What `save_adapter` wrote: the weight file and its size in bytes."""

    weights: Path
    nbytes: int


def open_adapter(path: str | os.PathLike[str], *, on_download: OnDownload | None = None) -> Adapter:
    """Open an adapter: names, shapes, ranks and scales are read, tensors only when asked for.

    path
        a folder or file on this disk; else an adapter on the Hub (user/repo, user/repo@revision,
        hf://user/repo/folder) or a Tinker checkpoint (tinker://run/weights/name), which is fetched.
        What lies on this disk always goes first.
    on_download
        called while something is fetched: with what it is, bytes so far, and of how many (0: not known).

    Raises AdapterError if there is no adapter at this path or it is damaged, UnsupportedAdapter
    if it is not a plain LoRA, FetchError if it lies elsewhere and cannot be fetched.
    """
    location, is_here = _on_this_disk(path)
    if is_here:
        return _open_local(location)
    _refuse_credentials(os.fspath(path))
    fetched = _fetch(os.fspath(path), on_download)
    if fetched is None:
        if "://" in (text := os.fspath(path)):
            raise AdapterError(f"{text}: no adapters are fetched from there, only from hf:// (the Hub) and tinker://")
        raise AdapterError(f"{location}: no such file or folder")
    try:
        adapter = _open_local(fetched.path)
    except AdapterError as error:
        raise type(error)(f"{fetched.origin}: {error}") from error
    files = {name: file for name, file in adapter.files.items() if fetched.files is None or name in fetched.files}
    notes = (*adapter.notes, *fetched.notes)
    return replace(adapter, source=fetched.origin, origin=fetched.origin, files=files, notes=notes)


def _on_this_disk(path: str | os.PathLike[str]) -> tuple[Path, bool]:
    """Where a path leads to on this disk, and whether there is anything."""
    if not os.fspath(path):  # which pathlib takes for the folder one is in
        raise AdapterError("the path of the adapter is empty: is a variable of the shell not set?")
    try:
        location = Path(path).expanduser()
        return location, location.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user, a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise AdapterError(f"{os.fspath(path):.200}: cannot be read: {reason}") from error


def _refuse_credentials(address: str) -> None:
    """An address is repeated in messages, logs and records, so it may hold no password or token."""
    if found := re.match(r"([\w+.-]+://(?=[^/]*@)|(?=[^/@]+:[^/@]+@))[^/]*@(.*)", address, re.DOTALL):
        raise AdapterError(
            f"{found[1]}…@{found[2]}: an address may hold no password or token; leave out what stands before the @ "
            "and set HF_TOKEN or TINKER_API_KEY instead"
        )


def _fetch(path: str, on_download: OnDownload | None) -> Fetched | None:
    """Fetch what is not on this disk; None if the path does not say that it is elsewhere."""
    if is_tinker_path(path):
        return fetch_from_tinker(path, on_download=on_download)
    place = parse_hub_path(path)
    if place is None:
        return None
    try:
        return fetch_from_hub(place, on_download=on_download)
    except FetchError as error:
        if path.startswith(("hf:", "http")):
            raise
        raise FetchError(f"{path}: no such file or folder here; taken for a name on the Hub: {error}") from error


def _open_local(location: Path) -> Adapter:
    if misnamed := _image_file_named_as_peft(location):
        return misnamed.open(location / WEIGHTS if location.is_dir() else location)
    if location.is_file() and location.name.startswith("adapter_") and sniff_peft(location.parent):
        raise AdapterError(f"{location}: is a file of a PEFT adapter; give its folder: {location.parent}")
    if location.is_dir() and not sniff_peft(location):
        location = _only_file(location)
    for one in FORMATS.values():
        if one.sniff(location):
            return one.open(location)
    raise AdapterError(
        f"{location}: no adapter found here: its tensors are named neither as kohya's tools nor as diffusers name "
        f"them, and a PEFT adapter is a folder with {CONFIG}"
    )


def _image_file_named_as_peft(location: Path) -> Format | None:
    """What a file named adapter_model.safetensors is (or that of a folder), if no configuration is beside it."""
    file = location / WEIGHTS if location.is_dir() else location
    if file.name != WEIGHTS or not file.is_file() or (file.parent / CONFIG).exists():
        return None
    return next((one for one in FORMATS.values() if one.single_file and one.sniff(file)), None)


def _only_file(folder: Path) -> Path:
    """The one safetensors file in a folder, as diffusers saves an adapter."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise AdapterError(
            f"{folder}: no adapter found here; a PEFT adapter is a folder with {CONFIG}, kohya's and "
            "diffusers' are .safetensors files"
        )
    if len(files) > 1:
        raise AdapterError(f"{folder}: holds {len(files)} .safetensors files; give one of them, as {files[0]}")
    return files[0]


def check_output_of(adapter: Adapter, output: Path, *, overwrite: bool, in_file: bool = False) -> None:
    """Refuse an output that this adapter cannot be saved to (see `check_output`). Raises OutputError.

    A file that is there is replaced only if it is an adapter: others may be a model of many gigabytes.
    """
    single_file = FORMATS[adapter.format].single_file
    check_output(output, source=adapter.place, overwrite=overwrite, single_file=single_file, in_file=in_file)
    if single_file and output.exists() and not _is_adapter_file(output):
        raise OutputError(
            f"{output}: is a file, but no adapter, so not even --overwrite replaces it; choose another output"
        )


def _is_adapter_file(path: Path) -> bool:
    try:
        return any(one.sniff(path) for one in FORMATS.values() if one.single_file)
    except AdapterError:
        return False


def save_adapter(adapter: Adapter, path: str | os.PathLike[str], *, overwrite: bool = False) -> Written:
    """Write an adapter in its format and check that the disk holds what was written.

    The folder or file is written beside `path` under another name, fsynced, read back and renamed,
    so it appears whole or not at all. Raises OutputError if it cannot be written, exists (without
    `overwrite`) or is the source.
    """
    if not os.fspath(path):
        raise OutputError("the path of the output is empty: is a variable of the shell not set?")
    try:
        output = Path(path).expanduser()
    except RuntimeError as error:  # no such user
        raise OutputError(f"{os.fspath(path)}: cannot be written: {error}") from error
    check_output_of(adapter, output, overwrite=overwrite)
    form = FORMATS[adapter.format]
    if adapter.late_metadata is not None:  # which names the source by its hash
        adapter.hash_along()
    if form.single_file:
        with new_file(output, overwrite=overwrite) as file:
            form.write(adapter, file)
            _check_meaning(adapter, form.open(file))
            size = file.stat().st_size
        return Written(weights=output, nbytes=size)
    with new_folder(output, overwrite=overwrite) as folder:
        weights = form.write(adapter, folder)
        for name, file in adapter.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
        _check_meaning(adapter, form.open(folder))
        size = weights.stat().st_size
    return Written(weights=output / weights.name, nbytes=size)


def as_written(adapter: Adapter) -> Adapter:
    """The adapter as it will be saved: with the configuration that it gets then, and nothing left to be put right."""
    config = config_for(adapter) if adapter.format == "peft" else adapter.config
    return replace(adapter, config=config, deviations={})


def weights_size(adapter: Adapter) -> int:
    """The exact size in bytes of the weight file that `save_adapter` would write; computes no tensor."""
    return FORMATS[adapter.format].size(adapter)


def _check_meaning(planned: Adapter, written: Adapter) -> None:
    """Read again, the result must have the layers, ranks and scales that were planned.

    Alpha tensors hold seven digits.
    """
    if written.layers.keys() != planned.layers.keys():
        difference = sorted(written.layers.keys() ^ planned.layers.keys())
        raise OutputError(f"layer '{difference[0]}' was not written as planned; please report this")
    for name, spec in planned.layers.items():
        found = written.layers[name]
        same_shape = (found.rank, found.out_features, found.in_features) == (
            spec.rank,
            spec.out_features,
            spec.in_features,
        )
        if not same_shape or not math.isclose(found.scale, spec.scale, rel_tol=1e-6):
            raise OutputError(
                f"layer '{name}' was not written as planned: {found} instead of {spec}; please report this"
            )

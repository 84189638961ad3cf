"""PEFT adapters: a folder with adapter_config.json and adapter_model.safetensors (or .bin)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lora_squeeze.adapter import Adapter, Deviation, LayerSpec, PassThrough
from lora_squeeze.errors import AdapterError
from lora_squeeze.formats.dora import dora_note
from lora_squeeze.formats.folder import belongs_to_training
from lora_squeeze.formats.peft_adalora import adalora_places, as_lora_config, pruned_away
from lora_squeeze.formats.peft_config import Rules, config_for, read_config
from lora_squeeze.formats.peft_keys import Keys, sort_keys
from lora_squeeze.formats.peft_layout import layer_blocks, places, readers
from lora_squeeze.formats.pickled import PickledFile
from lora_squeeze.formats.tensors import SafetensorsFile, TensorSpec, read_safetensors
from lora_squeeze.formats.writing import Block, safetensors_size, write_safetensors
from lora_squeeze.peft_names import CONFIG, PICKLED_WEIGHTS, PREFIX, WEIGHTS

__all__ = ["open_peft", "peft_size", "sniff_peft", "write_peft"]


def sniff_peft(path: Path) -> bool:
    """Whether this folder looks like a PEFT adapter."""
    return path.is_dir() and any((path / name).exists() for name in (CONFIG, WEIGHTS, PICKLED_WEIGHTS))


def open_peft(path: Path) -> Adapter:
    """Read the configuration and the tensors' names and shapes; no tensor is loaded.

    Raises AdapterError if a file is missing or damaged or the tensors contradict the
    configuration, UnsupportedAdapter if the factors are not a plain low-rank update.
    """
    config = read_config(path / CONFIG)
    tensors = _open_tensors(path)
    keys = sort_keys(tensors.tensors, config, tensors.path)
    if not keys.pairs:
        raise AdapterError(f"{tensors.path}: holds no lora_A / lora_B pair; is this a LoRA adapter?")
    adalora = config.get("peft_type") == "ADALORA"
    if adalora:
        found, left_out = adalora_places(keys, config, path / CONFIG, tensors.path), pruned_away(keys)
    else:
        found, left_out = places(keys, config, Rules(config, path / CONFIG), tensors.path), ()
    if not found:
        raise AdapterError(f"{tensors.path}: every layer has been pruned to rank 0; nothing is left to squeeze")
    load, borrow = readers(found, tensors)
    files, left_behind, foreign = _other_files(path)
    return Adapter(
        source=str(path),
        format="peft",
        layers={name: place.spec for name, place in found.items()},
        load=load,
        borrow=borrow,
        pass_through=tuple(_pass_through(key, stored, tensors) for key, stored in keys.others.items()),
        config=as_lora_config(config) if adalora else config,
        metadata=tensors.metadata,
        files=files,
        weights=tensors.path,
        sha256=cache(tensors.sha256),
        hash_along=tensors.hash_along,
        left_out=left_out,
        deviations=dict(_deviations(config, tensors.path, keys, [place.spec for place in found.values()])),
        notes=tuple(_notes(config, tensors.path, keys, left_behind, foreign)),
    )


def write_peft(adapter: Adapter, folder: Path) -> Path:
    """Write configuration and tensors into an empty folder; return the file of the weights."""
    config = config_for(adapter)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    blocks, metadata = _blocks(adapter), _metadata(adapter)
    write_safetensors(folder / WEIGHTS, blocks, metadata, expect=adapter.expect, late_metadata=adapter.late_metadata)
    return folder / WEIGHTS


def peft_size(adapter: Adapter) -> int:
    """The exact size in bytes of the weights that `write_peft` would write; computes no tensor."""
    return safetensors_size(_blocks(adapter), _metadata(adapter))


def _blocks(adapter: Adapter) -> list[Block]:
    return [*layer_blocks(adapter), *(_pass_through_block(tensor) for tensor in adapter.pass_through)]


def _metadata(adapter: Adapter) -> dict[str, str]:
    return {**adapter.metadata, "format": "pt"}


def _open_tensors(path: Path) -> SafetensorsFile | PickledFile:
    if (path / WEIGHTS).exists():
        return read_safetensors(path / WEIGHTS)
    if (path / PICKLED_WEIGHTS).exists():
        return PickledFile(path / PICKLED_WEIGHTS)
    raise AdapterError(f"{path / WEIGHTS}: no such file, and no {PICKLED_WEIGHTS} either")


def _pass_through(key: str, stored: str, tensors: SafetensorsFile | PickledFile) -> PassThrough:
    spec = tensors.tensors[stored]
    return PassThrough(key, spec.dtype, spec.shape, spec.nbytes, lambda: tensors.chunks(stored))


def _other_files(path: Path) -> tuple[dict[str, Path], list[str], list[str]]:
    """Files to carry over (relative path → file), and the names of what stays behind: training state, foreign links.

    A link may lead into the folder itself or, as in the Hub's cache, into a folder of blobs beside it.
    Whatever else it leads to is no part of the adapter, and perhaps nothing that should be given away.
    """
    files: dict[str, Path] = {}
    left_behind: list[str] = []
    foreign: list[str] = []
    home = path.resolve()
    allowed = (home, *(folder.parent / "blobs" for folder in home.parents if folder.name == "snapshots"))
    for entry in sorted(path.iterdir()):
        if entry.name in (CONFIG, WEIGHTS, PICKLED_WEIGHTS):
            continue
        if belongs_to_training(entry.name):
            left_behind.append(entry.name)
        elif not _lies_in(entry, allowed):
            foreign.append(entry.name)
        elif entry.is_dir():
            for file in sorted(entry.rglob("*")):
                if not _lies_in(file, allowed) or (file.is_symlink() and file.is_dir()):
                    foreign.append(str(file.relative_to(path)))
                elif file.is_file():
                    files[str(file.relative_to(path))] = file
        elif entry.is_file():
            files[entry.name] = entry
    return files, left_behind, foreign


def _lies_in(file: Path, folders: tuple[Path, ...]) -> bool:
    """Whether a file, or what a link leads to, lies in one of these folders."""
    try:
        place = file.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    return any(folder in place.parents for folder in folders)


def _deviations(
    config: Mapping[str, Any], weights: Path, keys: Keys, specs: Iterable[LayerSpec]
) -> Iterator[tuple[Deviation, str]]:
    """In what the files differ from what `write_peft` makes of them, and how they have it."""
    if config.get("peft_type") == "ADALORA":
        yield "adalora", "it is AdaLoRA, whose keys are not LoRA's and whose update has a third factor, lora_E"
    if keys.bare:
        yield "bare keys", f"{_begins_otherwise(keys)} (first: '{keys.bare[0]}')"
    if keys.adapter_name:
        yield "named keys", f"the keys carry the adapter name '{keys.adapter_name}'"
    if "peft_type" not in config:
        yield "no peft_type", f"{CONFIG} has no peft_type"
    if weights.name == PICKLED_WEIGHTS:
        yield "pickled", f"its tensors are pickled, in {PICKLED_WEIGHTS}"
    odd = next((spec for spec in specs if spec.rank % 2), None)
    if odd is not None and config.get("init_lora_weights") == "orthogonal":
        yield "odd orthogonal", f"init_lora_weights is 'orthogonal', and layer '{odd.name}' has the odd rank {odd.rank}"


def _begins_otherwise(keys: Keys) -> str:
    count = len(keys.bare)
    return f"{count} keys of factors do not begin with {PREFIX}" if count > 1 else f"a key does not begin with {PREFIX}"


def _notes(
    config: Mapping[str, Any], weights: Path, keys: Keys, left_behind: list[str], foreign: list[str]
) -> Iterator[str]:
    if weights.name == PICKLED_WEIGHTS:
        yield f"{PICKLED_WEIGHTS} is written as {WEIGHTS}"
    if foreign:
        yield f"not carried over, as these links lead out of the folder, or to folders in it: {', '.join(foreign)}"
    if left_behind:
        yield f"not carried over, as it belongs to the source's training: {', '.join(left_behind)}"
    if keys.adapter_name:
        yield f"the keys carry the adapter name '{keys.adapter_name}'; they are written without it, as PEFT loads them"
    if keys.bare:
        yield f"{_begins_otherwise(keys)}; they are written with it, as PEFT loads them (first: {keys.bare[0]})"
    if keys.unknown:
        count = len(keys.unknown)
        yield f"{count} tensor{'s' * (count > 1)} of unknown purpose carried over as found (first: {keys.unknown[0]})"
    if config.get("peft_type") == "ADALORA":
        yield "AdaLoRA is written as plain LoRA with the same update: its singular values go into lora_A"
    if gone := pruned_away(keys):
        yield f"{len(gone)} modules that AdaLoRA pruned to rank 0 are left out (first: {gone[0]})"
    yield from dora_note(list(keys.others))


def _pass_through_block(tensor: PassThrough) -> Block:
    return Block((TensorSpec(tensor.key, tensor.dtype, tensor.shape, tensor.nbytes),), lambda: [tensor.chunks()])

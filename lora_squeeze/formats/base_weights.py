"""The weights of a base model in safetensors files, found by the names that adapters have for modules.

A model is one file, a folder with one file or with shards and their index, or a folder of a diffusers
pipeline, whose parts lie in subfolders. Headers are read at once, weights a block of rows at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_squeeze.errors import AdapterError
from lora_squeeze.formats.tensors import DTYPES, SafetensorsFile, TensorSpec, read_safetensors

__all__ = ["BaseWeights", "StoredWeight", "open_base_weights"]

_BLOCK_BYTES = 8 << 20
_UNQUANTISED = "give the model as it was before quantisation"
# Words at which names of one model begin in one version of transformers and not in another.
_NUMBERED = re.compile(r"(?:.*\.)?(\w+\.\d+\..+)")


@dataclass(frozen=True)
class StoredWeight:
    """One weight in its file."""

    file: SafetensorsFile
    spec: TensorSpec

    def rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Blocks of a few MiB: (first row, the rows flattened to a matrix)."""
        height = self.spec.shape[0]
        size = max(1, _BLOCK_BYTES * height // max(1, self.spec.nbytes))
        for start in range(0, height, size):
            block = self.file.read_rows(self.spec.key, start, min(start + size, height))
            yield start, block.flatten(1)


@dataclass(frozen=True)
class BaseWeights:
    """A model's weights.

    parts
        part of a pipeline ("unet", "text_encoder", …; "" for a model that is no pipeline) → module →
        its weight.
    """

    path: Path
    parts: Mapping[str, Mapping[str, StoredWeight]]

    def find(self, module: str, *, part: str = "", underscored: bool = False) -> StoredWeight:
        """The weight of a module.

        part
            of the pipeline; if this is no pipeline, it is taken to be that part.
        underscored
            whether the name has underscores for dots, as kohya's names have.

        Raises AdapterError, naming the module, if it is not there, not unique or quantised.
        """
        modules = self.parts.get("") or self.parts.get(part, {})
        names: Mapping[str, object] = {name.replace(".", "_"): name for name in modules} if underscored else modules
        found = _matching(module, names, separator="_" if underscored else ".")
        if len(found) > 1:
            raise AdapterError(
                f"{self.path}: '{module}' could be {' or '.join(sorted(found)[:3])}; give the base model that the "
                "adapter was trained on, with its own names"
            )
        if not found:
            quantised = any(name.startswith(f"{module}.") for name in names)
            reason = f", only quantised ones; {_UNQUANTISED}" if quantised else _example(names)
            raise AdapterError(f"{self.path}: has no weight of '{module}'{reason}")
        weight = modules[str(names[found[0]])] if underscored else modules[found[0]]
        if weight.spec.dtype not in DTYPES:
            raise AdapterError(
                f"{self.path}: '{weight.spec.key}' has dtype {weight.spec.dtype}, so it is quantised; {_UNQUANTISED}"
            )
        return weight


def open_base_weights(path: Path) -> BaseWeights:
    """Read the headers of a model's files. Raises AdapterError if there are none or one is damaged."""
    if path.is_file():
        return BaseWeights(path, {"": _modules([read_safetensors(path)])})
    if not path.is_dir():
        raise AdapterError(f"{path}: no such file or folder; give the base model's folder or its .safetensors file")
    if files := _files(path):
        return BaseWeights(path, {"": _modules(files)})
    parts = {folder.name: _modules(_files(folder)) for folder in sorted(path.iterdir()) if folder.is_dir()}
    parts = {name: modules for name, modules in parts.items() if modules}
    if not parts:
        raise AdapterError(f"{path}: holds no .safetensors file of a base model; save it with safe_serialization=True")
    return BaseWeights(path, parts)


def _files(folder: Path) -> list[SafetensorsFile]:
    """The files of a model in a folder: those that its index names, or all there are."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise AdapterError(f"{index}: is no index of a model's shards ({error}); fetch it again") from error
        return [read_safetensors(folder / str(shard)) for shard in shards]
    return [read_safetensors(file) for file in sorted(folder.glob("*.safetensors"))]


def _modules(files: Iterable[SafetensorsFile]) -> dict[str, StoredWeight]:
    return {
        key.removesuffix(".weight"): StoredWeight(file, spec)
        for file in files
        for key, spec in file.tensors.items()
        if not key.endswith(".bias")
    }


def _matching(module: str, names: Mapping[str, object], *, separator: str) -> list[str]:
    """The names that mean this module: itself, or with or without the words that a class of models puts before."""
    shorter = module.partition(separator)[2]
    for exact in (module, shorter):
        if exact in names:
            return [exact]
    longer = [name for name in names if name.endswith(f"{separator}{module}")]
    numbered = _NUMBERED.fullmatch(module)
    return longer or ([name for name in names if numbered and name.endswith(f".{numbered[1]}")])


def _example(names: Iterable[str]) -> str:
    first = next(iter(names), "")
    return f" (it has '{first}', …); give the base model that the adapter was trained on" if first else ""

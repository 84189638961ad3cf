"""Weights that torch.save wrote, read as a file of tensors without running code."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_squeeze.errors import AdapterError
from lora_squeeze.formats.hashing import RunningHash, check_identity, identity_of
from lora_squeeze.formats.tensors import DTYPES, TensorSpec, memory_of

__all__ = ["PickledFile"]

# torch → safetensors' spelling, of all that safetensors can hold.
_SPELLINGS = {
    **{dtype: name for name, dtype in DTYPES.items()},
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def _refuse_bombs(path: Path, size: int) -> None:
    """torch.save compresses nothing, so the parts of its archive are no larger than the file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > size:
            raise ValueError(f"its parts would unpack to {unpacked:,} bytes, and torch.save does not compress")


class PickledFile:
    """A torch.save file, memory-mapped and unpickled with weights_only=True: no code is run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        try:
            with path.open("rb") as file:
                self._identity = identity_of(file.fileno())
            size = self._identity[1]
            _refuse_bombs(path, size)
            state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch.load raises half a dozen types for a damaged file
            raise AdapterError(f"{path}: cannot be read as a plain state dict: {error}") from error
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise AdapterError(f"{path}: expected a dict of named tensors")
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
                raise AdapterError(f"{path}: '{key}' is no dense tensor; save a plain state dict")
            nbytes = value.numel() * value.element_size()
            if value.device.type != "cpu" or nbytes > size:
                raise AdapterError(f"{path}: '{key}' claims {nbytes:,} bytes, which the file does not hold")
            if value.dtype not in _SPELLINGS:
                raise AdapterError(f"{path}: '{key}' has dtype {value.dtype}, which safetensors cannot hold")
        self._state: dict[str, torch.Tensor] = state
        self.tensors: Mapping[str, TensorSpec] = {
            key: TensorSpec(key, _SPELLINGS[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())
            for key, tensor in state.items()
        }

    def read(self, key: str, *, borrow_as: str = "") -> torch.Tensor:
        """One tensor. Raises AdapterError if the file has changed."""
        self._check_unchanged()
        return self._state[key]  # mapped from the file: there is nothing to borrow

    def chunks(self, key: str) -> Iterator[bytes]:
        """One tensor's bytes. Raises AdapterError if the file has changed."""
        self._check_unchanged()
        tensor = self._state[key].contiguous()
        yield bytes(memory_of(tensor))

    def hash_along(self) -> None:
        """What is mapped is not read in pieces, so nothing can follow it."""

    def sha256(self) -> str:
        """SHA-256 of the whole file. Raises AdapterError if it is not the one that was opened."""
        return RunningHash(self.path, self._identity).result()

    def _check_unchanged(self) -> None:
        try:
            with self.path.open("rb") as file:
                check_identity(file.fileno(), self._identity, self.path)
        except OSError as error:
            raise AdapterError(f"{self.path}: cannot be read: {error.strerror}") from error

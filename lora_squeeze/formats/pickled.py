"""Weights that torch.save wrote, read as a file of tensors without running code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_squeeze.errors import AdapterError
from lora_squeeze.formats.tensors import TensorSpec, dtype_name, memory_of

__all__ = ["PickledFile"]


class PickledFile:
    """A torch.save file, memory-mapped and unpickled with weights_only=True: no code is run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        try:
            state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch.load raises half a dozen types for a damaged file
            raise AdapterError(f"{path}: cannot be read as a plain state dict: {error}") from error
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise AdapterError(f"{path}: expected a dict of tensors")
        self._state: dict[str, torch.Tensor] = state
        self.tensors = {
            key: TensorSpec(key, _spelling(tensor), tuple(tensor.shape), tensor.numel() * tensor.element_size())
            for key, tensor in state.items()
        }

    def read(self, key: str, *, borrow_as: str = "") -> torch.Tensor:
        return self._state[key]  # mapped from the file: there is nothing to borrow

    def chunks(self, key: str) -> Iterator[bytes]:
        tensor = self._state[key].contiguous()
        yield bytes(memory_of(tensor))


def _spelling(tensor: torch.Tensor) -> str:
    others = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
    others[torch.bool] = "BOOL"
    return others[tensor.dtype] if tensor.dtype in others else dtype_name(tensor.dtype)

"""Reading safetensors, one tensor at a time.

The safetensors package validates every header. Tensors are read with ordinary reads at their
offsets rather than through its memory map: resident memory then stays at one layer, and a file
that shrinks while it is read gives an error instead of a bus error.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from lora_squeeze.documents import parse_json
from lora_squeeze.errors import AdapterError, SettingsError
from lora_squeeze.formats.hashing import Identity, RunningHash, check_identity, identity_of
from lora_squeeze.parallel import ordered_map, runs
from lora_squeeze.scratch import lent, scratch

__all__ = [
    "DTYPES",
    "SafetensorsFile",
    "TensorSpec",
    "dtype_name",
    "dtype_spelling",
    "fingerprint",
    "memory_of",
    "read_safetensors",
]

# safetensors' spelling → torch. What is only carried over may have any dtype: bytes are bytes.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CHUNK = 1 << 20
# Tensors that a worker takes at a time where little is done with each.
_TOGETHER = 16

Measured = TypeVar("Measured")


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' spelling of a floating-point torch dtype. Raises KeyError for other dtypes."""
    return {known: name for name, known in DTYPES.items()}[dtype]


def dtype_spelling(dtype: str) -> str:
    """safetensors' spelling of a dtype that is written as there or as in torch, in any case: bf16, bfloat16 → BF16.

    Raises SettingsError for other dtypes.
    """
    known = {str(one).removeprefix("torch."): name for name, one in DTYPES.items()}
    found = known.get(dtype.lower(), dtype.upper())
    if found not in DTYPES:
        raise SettingsError(f"dtype '{dtype}' is not known; known are {', '.join(DTYPES)}")
    return found


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's key, dtype (safetensors' spelling), shape and size in bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file whose header has been read and checked."""

    path: Path
    tensors: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    identity: Identity  # when the header was read
    hashed: RunningHash = field(repr=False, compare=False)

    def read(self, key: str, *, borrow_as: str = "") -> torch.Tensor:
        """Read one tensor. Raises AdapterError if its dtype is unknown or the file has changed.

        borrow_as
            a role in this thread's scratch memory, to read into that.
        """
        spec = self.tensors[key]
        if spec.dtype not in DTYPES:
            raise AdapterError(
                f"{self.path}: tensor '{key}' has dtype {spec.dtype}; "
                f"LoRA factors of {', '.join(DTYPES)} can be squeezed: convert it first"
            )
        dtype = DTYPES[spec.dtype]
        tensor = lent(borrow_as, spec.shape, dtype) if borrow_as else torch.empty(spec.shape, dtype=dtype)
        self._read_into(key, memory_of(tensor))
        return tensor

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows start … stop of one tensor of a dtype in DTYPES."""
        spec = self.tensors[key]
        tensor = torch.empty((stop - start, *spec.shape[1:]), dtype=DTYPES[spec.dtype])
        self._read_into(key, memory_of(tensor), start=start * (spec.nbytes // spec.shape[0]))
        return tensor

    def chunks(self, key: str) -> Iterator[bytes]:
        """Read one tensor's bytes a MiB at a time, whatever its dtype."""
        return map(bytes, self._pieces(key))

    def hash_along(self) -> None:
        """Take the SHA-256 of what is read from now on, as it will be asked for."""
        self.hashed.follow()

    def sha256(self) -> str:
        """SHA-256 of the whole file. Raises AdapterError if it is not the one whose header was read."""
        return self.hashed.result()

    def fingerprint(self) -> str:
        """The `fingerprint` of the tensors. Raises AdapterError if the file has changed."""
        return fingerprint(self.tensors, self._of_each(_sha256))

    def checksums(self) -> dict[str, int]:
        """CRC-32 of each tensor's bytes. Raises AdapterError if the file has changed."""
        return self._of_each(_crc32)

    def _of_each(self, measure: Callable[[Iterator[memoryview]], Measured]) -> dict[str, Measured]:
        def measured(keys: Sequence[str]) -> list[tuple[str, Measured]]:
            return [(key, measure(self._pieces(key))) for key in keys]

        parts = runs(list(self.tensors), most=_TOGETHER)
        return dict(chain.from_iterable(ordered_map(measured, parts)))

    def _pieces(self, key: str) -> Iterator[memoryview]:
        """`chunks` in memory that this thread's next piece uses again."""
        owner = scratch("piece", (_CHUNK,), torch.uint8, torch.device("cpu"))  # named, so that it outlives the view
        memory = memory_of(owner)
        size = self.tensors[key].nbytes
        with self._opened(key) as file:
            for start in range(0, size, _CHUNK):
                piece = memory[: size - start]
                self._fill(piece, file, key, start)
                yield piece

    def _read_into(self, key: str, target: memoryview, *, start: int = 0) -> None:
        with self._opened(key) as file:
            self._fill(target, file, key, start)

    @contextmanager
    def _opened(self, key: str) -> Generator[FileIO, None, None]:
        try:
            with self.path.open("rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise AdapterError(f"{self.path}: cannot read tensor '{key}': {error.strerror}") from error

    def _fill(self, target: memoryview, file: FileIO, key: str, start: int) -> None:
        check_identity(file.fileno(), self.identity, self.path)
        position, rest = self.offsets[key] + start, target
        file.seek(position)
        while len(rest):
            count = file.readinto(rest)
            if not count:
                raise AdapterError(f"{self.path}: the file ends inside tensor '{key}'")
            rest = rest[count:]
        self.hashed.hand_in(position, target)


def read_safetensors(path: Path) -> SafetensorsFile:
    """Read and check a file's header. Raises AdapterError if it is missing or damaged."""
    try:
        with path.open("rb") as file:
            identity = identity_of(file.fileno())
            with safe_open(path, framework="pt"):  # "numpy" would import that as well
                pass
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = parse_json(file.read(length))
    except SafetensorError as error:
        if unknown := re.search(r"unknown variant `([^`]*)`", str(error)):
            key = _first_of_dtype(unknown[1], path)
            raise AdapterError(f"{path}: '{key}' has dtype {unknown[1]}, which safetensors does not know") from error
        raise AdapterError(f"{path}: not a sound safetensors file ({error}); fetch or save it again") from error
    except FileNotFoundError as error:
        raise AdapterError(f"{path}: no such file") from error
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    metadata = header.pop("__metadata__", {})
    in_file_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return SafetensorsFile(
        path=path,
        tensors={
            key: TensorSpec(
                key, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
            )
            for key, entry in in_file_order
        },
        offsets={key: 8 + length + entry["data_offsets"][0] for key, entry in in_file_order},
        metadata=metadata,
        identity=identity,
        hashed=RunningHash(path, identity),
    )


def _first_of_dtype(dtype: str, path: Path) -> str:
    """Which tensor a header that safetensors has refused gives this dtype."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = parse_json(file.read(length))
    return next((key for key, entry in header.items() if entry.get("dtype") == dtype), "?")


def fingerprint(specs: Mapping[str, TensorSpec], digests: Mapping[str, bytes]) -> str:
    """One SHA-256 for a set of tensors, wherever they lie in a file and whatever its metadata is.

    It is taken of a line for each tensor, by key: the JSON of its key, dtype, shape and the SHA-256
    of its bytes.
    """
    digest = hashlib.sha256()
    for key in sorted(specs):
        spec = specs[key]
        line = [key, spec.dtype, list(spec.shape), digests[key].hex()]
        digest.update(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _sha256(pieces: Iterator[memoryview]) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _crc32(pieces: Iterator[memoryview]) -> int:
    return functools.reduce(lambda found, piece: zlib.crc32(piece, found), pieces, 0)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, without NumPy. It must outlive the view."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")

"""Writing safetensors block by block, without holding what was written, and checking what the disk holds.

What has been written is sent to the disk while more is computed, so that little is left to wait for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import torch

from lora_squeeze.errors import OutputError
from lora_squeeze.formats.tensors import TensorSpec, fingerprint, memory_of, read_safetensors
from lora_squeeze.parallel import ordered_map, runs

__all__ = ["Block", "safetensors_size", "write_safetensors"]

# Written bytes after which the disk is asked to take them.
_FLUSHED_AT = 16 << 20


@dataclass(frozen=True)
class Block:
    """Tensors that are made together (a LoRA pair) and lie side by side in the file.

    layers
        those that `make` borrows, in this order.
    """

    specs: tuple[TensorSpec, ...]
    make: Callable[[], Sequence[torch.Tensor | Iterator[bytes]]]
    layers: tuple[str, ...] = ()


def write_safetensors(
    path: Path,
    blocks: Sequence[Block],
    metadata: Mapping[str, str],
    *,
    expect: Callable[[Sequence[str]], None] | None = None,
    late_metadata: Callable[[str], Mapping[str, str]] | None = None,
) -> None:
    """Write a new file block by block, fsync it, and check that the disk holds what was written.

    The header is known before the first tensor is made, so no more than a few blocks are in memory.
    expect
        told which layers this thread's next blocks will borrow.
    late_metadata
        called with the tensors' `fingerprint` when all are written; its values replace those in
        `metadata`, which must have the same length.

    Raises OutputError if the path cannot be written, the disk is full or what is read back differs.
    """
    blocks = _in_file_order(blocks)
    specs = [spec for block in blocks for spec in block.specs]
    header = _header(specs, metadata)
    offsets = list(accumulate((spec.nbytes for spec in specs), initial=len(header)))
    places = dict(zip((spec.key for spec in specs), offsets, strict=False))
    try:
        with path.open("xb", buffering=0) as file:
            write = _positional_writer(file)
            checksums: dict[str, int] = {}
            digests: dict[str, bytes] = {}
            hashed = late_metadata is not None

            def write_run(run: Sequence[Block]) -> None:
                if expect is not None:
                    expect([layer for block in run for layer in block.layers])
                for block in run:
                    ones, others = _write_block(block, places, write, hashed=hashed)
                    checksums.update(ones)
                    digests.update(others)

            parts = list(runs(blocks))
            with _flushing(file) as written:
                for run, _ in zip(parts, ordered_map(write_run, parts), strict=True):
                    written(sum(spec.nbytes for block in run for spec in block.specs))
            if late_metadata is not None:
                found = fingerprint({spec.key: spec for spec in specs}, digests)
                final = _header(specs, {**metadata, **late_metadata(found)})
                assert len(final) == len(header), "late metadata must be as long as what it replaces"
                header = final
            write(memoryview(header), 0)
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    _check_written(path, header, checksums)


def safetensors_size(blocks: Iterable[Block], metadata: Mapping[str, str]) -> int:
    """The exact size in bytes of the file that `write_safetensors` would write."""
    specs = [spec for block in _in_file_order(blocks) for spec in block.specs]
    return len(_header(specs, metadata)) + sum(spec.nbytes for spec in specs)


@contextmanager
def _flushing(file: IO[bytes]) -> Generator[Callable[[int], None], None, None]:
    """Told how many bytes have been written, send them to the disk beside the work. Raises OSError if it fails."""
    waiting = 0
    under_way: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="lora-squeeze-flush") as pool:

        def written(count: int) -> None:
            nonlocal waiting, under_way
            waiting += count
            if waiting >= _FLUSHED_AT and (under_way is None or under_way.done()):
                # The system tells of a failed write only once: not again in the last fsync.
                if under_way is not None:
                    under_way.result()
                waiting, under_way = 0, pool.submit(os.fsync, file.fileno())

        yield written
        if under_way is not None:
            under_way.result()


def _positional_writer(file: IO[bytes]) -> Callable[[memoryview, int], None]:
    lock = threading.Lock()

    def write(data: memoryview, position: int) -> None:
        with lock:
            file.seek(position)
            while len(data):
                data = data[file.write(data) :]

    return write


def _write_block(
    block: Block, places: Mapping[str, int], write: Callable[[memoryview, int], None], *, hashed: bool
) -> tuple[dict[str, int], dict[str, bytes]]:
    """Make a block's tensors, write each at its place and return its CRC-32 and, if asked for, its SHA-256."""
    checksums: dict[str, int] = {}
    digests: dict[str, bytes] = {}
    for spec, tensor in zip(block.specs, block.make(), strict=True):
        position, checksum, digest = places[spec.key], 0, hashlib.sha256()
        for piece in _chunks_of(tensor):
            checksum = zlib.crc32(piece, checksum)
            if hashed:
                digest.update(piece)
            write(memoryview(piece), position)
            position += len(piece)
        if position != places[spec.key] + spec.nbytes:
            raise AssertionError(f"tensor '{spec.key}' does not have the {spec.nbytes} bytes that were announced")
        checksums[spec.key], digests[spec.key] = checksum, digest.digest()
    return checksums, digests


def _check_written(path: Path, header: bytes, checksums: Mapping[str, int]) -> None:
    """Read the file back. Raises OutputError if it does not hold what was written."""
    written = read_safetensors(path)
    with path.open("rb") as file:
        intact = file.read(len(header)) == header
    if not intact or written.checksums() != checksums:
        raise OutputError(f"{path}: what was read back is not what was written; is the disk failing?")


def _chunks_of(tensor: torch.Tensor | Iterator[bytes]) -> Iterator[bytes | memoryview]:
    if not isinstance(tensor, torch.Tensor):
        yield from tensor
        return
    contiguous = tensor.contiguous()  # named, so that it outlives the view of its memory
    yield memory_of(contiguous)


def _in_file_order(blocks: Iterable[Block]) -> list[Block]:
    """Wide dtypes first, as safetensors itself does it, so that tensors are aligned where a block has one dtype."""
    return sorted(blocks, key=lambda block: -max(_item_size(spec) for spec in block.specs))


def _item_size(spec: TensorSpec) -> int:
    return spec.nbytes // max(1, math.prod(spec.shape))


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for spec in specs:
        header[spec.key] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format asks for 8-byte alignment of the data
    return struct.pack("<Q", len(text)) + text

"""Memory that each thread uses again and again.

Allocating and freeing a few megabytes for every layer costs more than filling them: each time the
kernel has to map and clear fresh pages, and the cache starts cold.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch

__all__ = ["beside", "lent", "scratch", "scratch_like"]


class _Memory(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device], torch.Tensor] = {}
        self.place = 0
        self.views: dict[tuple[str, torch.device, Sequence[int], torch.dtype], torch.Tensor] = {}


_memory = _Memory()


def scratch(role: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor, valid until this thread asks for the same role again."""
    wanted = (role, device, shape, dtype)
    if (known := _memory.views.get(wanted)) is not None:
        return known
    size = math.prod(shape) * dtype.itemsize
    buffer = _memory.buffers.get((role, device))
    if buffer is None or len(buffer) < size:
        buffer = _memory.buffers[role, device] = torch.empty(size, dtype=torch.uint8, device=device)
        _memory.views = {key: view for key, view in _memory.views.items() if key[:2] != (role, device)}
    view = _memory.views[wanted] = buffer[:size].view(dtype).view(shape)
    return view


def scratch_like(role: str, matrix: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`scratch` with the shape of this matrix, its rows or its columns contiguous as they are there."""
    if matrix.stride(1) == 1:
        return scratch(role, matrix.shape, dtype, device)
    return scratch(role, matrix.shape[::-1], dtype, device).T


def lent(role: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`scratch` on the CPU for a result, valid until this thread asks for the same role at the same place again."""
    return scratch(f"{role} {_memory.place}", shape, dtype, torch.device("cpu"))


@contextmanager
def beside(place: int) -> Generator[None, None, None]:
    """What is lent to this thread within the block lies beside what is lent at other places."""
    before, _memory.place = _memory.place, place
    try:
        yield
    finally:
        _memory.place = before

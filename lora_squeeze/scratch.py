"""Memory that each thread uses again and again.

Allocating and freeing a few megabytes for every layer costs more than filling them: each time the
kernel has to map and clear fresh pages, and the cache starts cold.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

__all__ = ["scratch", "scratch_like"]


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_role: dict[tuple[str, torch.device], torch.Tensor] = {}


_buffers = _Buffers()


def scratch(role: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor, valid until this thread asks for the same role again."""
    size = math.prod(shape) * dtype.itemsize
    buffer = _buffers.by_role.get((role, device))
    if buffer is None or len(buffer) < size:
        buffer = _buffers.by_role[role, device] = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer[:size].view(dtype).view(shape)


def scratch_like(role: str, matrix: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`scratch` with the shape of this matrix, its rows or its columns contiguous as they are there."""
    if matrix.stride(1) == 1:
        return scratch(role, matrix.shape, dtype, device)
    return scratch(role, (matrix.shape[1], matrix.shape[0]), dtype, device).T

"""Memory that each thread uses again and again.

Allocating and freeing a few megabytes for every layer costs more than filling them: each time the
kernel has to map and clear fresh pages, and the cache starts cold.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

__all__ = ["lent", "placed", "scratch", "scratch_views"]

Views = TypeVar("Views")


class _Memory(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device], torch.Tensor] = {}
        self.place = 0
        self.views: dict[tuple[str, torch.device, Sequence[int], torch.dtype, Callable[[torch.Tensor], Any]], Any] = {}


_memory = _Memory()


def scratch_views(
    role: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    take: Callable[[torch.Tensor], Views],
) -> Views:
    """What `take` makes of an uninitialised tensor, valid until this thread asks for the same role again.

    Taking a view costs as much as a small product. So the views are kept, as long as their memory is.
    """
    wanted = (role, device, shape, dtype, take)
    if (known := _memory.views.get(wanted)) is not None:
        return known
    size = math.prod(shape) * dtype.itemsize
    # Memory outlives the mode that this thread is in when it is first asked for.
    with torch.inference_mode(False):
        buffer = _memory.buffers.get((role, device))
        if buffer is None or len(buffer) < size:
            buffer = _memory.buffers[role, device] = torch.empty(size, dtype=torch.uint8, device=device)
            _memory.views = {key: view for key, view in _memory.views.items() if key[:2] != (role, device)}
        found = _memory.views[wanted] = take(buffer[:size].view(dtype).view(shape))
    return found


def scratch(role: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor, valid until this thread asks for the same role again."""
    return scratch_views(role, shape, dtype, device, _whole)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def lent(role: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`scratch` on the CPU for a result, valid until this thread asks for the same role at the same place again."""
    return scratch(f"{role} {_memory.place}", shape, dtype, torch.device("cpu"))


@contextmanager
def placed(place: int) -> Generator[None, None, None]:
    """What is lent to this thread within the block lies beside what is lent at other places."""
    before, _memory.place = _memory.place, place
    try:
        yield
    finally:
        _memory.place = before

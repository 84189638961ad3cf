"""The second moment of a tall factor: the r×r matrix of its columns' products, in float64.

Half of it follows from symmetry. Strips of columns, from the diagonal downwards, leave most of that
half out, with products that are still large enough to be fast.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from lora_squeeze.scratch import scratch_views

__all__ = ["second_moment"]

# Rows that are converted at a time, to stay within the cache: 1 MiB at rank 64.
_ROWS = 2048
# MKL multiplies float64 in tiles of 12 columns (measured on AMD EPYC): a width that is no multiple of
# it takes up to twice as long for each number, so a split in halves gains nothing.
_TILE = 12

_Pairs = list[tuple[Tensor, Tensor]]


def second_moment(tall: Tensor) -> Tensor:
    """tall^T @ tall in float64, converting a block of rows at a time: (rows, r) → (r, r)."""
    width, device = tall.shape[1], tall.device
    upright = tall.stride(1) == 1
    total, targets, mirrored = scratch_views("total", (width, width), torch.float64, device, _halves)
    total.zero_()
    for rows in tall.split(_ROWS):
        shape = rows.shape if upright else rows.shape[::-1]
        strips = _strips_of_rows if upright else _strips_of_columns
        converted, pairs = scratch_views("converted", shape, torch.float64, device, strips)
        converted.copy_(rows)
        for target, (left, right) in zip(targets, pairs, strict=True):
            target.addmm_(left, right)
    for target, source in mirrored:
        target.copy_(source)
    return total.clone()


def _halves(total: Tensor) -> tuple[Tensor, list[Tensor], _Pairs]:
    """The strips of the lower half, and what of the upper one is the mirror image of what."""
    strips = _strips(len(total), total.device.type)
    mirrored = [(total[start:end, end:], total[end:, start:end].T) for start, end in strips[:-1]]
    return total, [total[start:, start:end] for start, end in strips], mirrored


def _strips_of_rows(tall: Tensor) -> tuple[Tensor, _Pairs]:
    """What is multiplied with what for each strip."""
    strips = _strips(tall.shape[1], tall.device.type)
    return tall, [(tall[:, start:].T, tall[:, start:end]) for start, end in strips]


def _strips_of_columns(wide: Tensor) -> tuple[Tensor, _Pairs]:
    return _strips_of_rows(wide.T)


@lru_cache
def _strips(width: int, device_type: str) -> tuple[tuple[int, int], ...]:
    """Strips of columns, from the diagonal downwards, that leave out most of what follows from symmetry."""
    if device_type != "cpu":
        return ((0, width),)
    bounds = [0]
    while bounds[-1] < width:
        rest = width - bounds[-1]
        bounds.append(min(width, bounds[-1] + _TILE * math.ceil(rest / (2 * _TILE))))
    return tuple(pairwise(bounds))

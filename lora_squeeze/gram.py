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

from lora_squeeze.scratch import scratch_like

__all__ = ["second_moment"]

# Rows that are converted at a time, to stay within the cache: 1 MiB at rank 64.
_ROWS = 2048
# MKL multiplies float64 in tiles of 12 columns (measured on AMD EPYC): a width that is no multiple of
# it takes up to twice as long for each number, so a split in halves gains nothing.
_TILE = 12


def second_moment(tall: Tensor) -> Tensor:
    """tall^T @ tall in float64, converting a block of rows at a time: (rows, r) → (r, r)."""
    width, device = tall.shape[1], tall.device
    strips = _strips(width) if device.type == "cpu" else ((0, width),)
    total = torch.zeros(width, width, dtype=torch.float64, device=device)
    targets = [total[start:, start:end] for start, end in strips]
    # Taking a view costs as much as a small product, so each is taken once for all blocks of a size.
    views: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for rows in tall.split(_ROWS):
        converted = scratch_like("converted", rows, torch.float64, device)
        if (pairs := views.get(len(rows))) is None:
            pairs = [(converted[:, start:].T, converted[:, start:end]) for start, end in strips]
            views[len(rows)] = pairs
        converted.copy_(rows)
        for target, (left, right) in zip(targets, pairs, strict=True):
            target.addmm_(left, right)
    for start, end in strips[:-1]:
        total[start:end, end:] = total[end:, start:end].T
    return total


@lru_cache
def _strips(width: int) -> tuple[tuple[int, int], ...]:
    """Strips of columns, from the diagonal downwards, that leave out most of what follows from symmetry."""
    bounds = [0]
    while bounds[-1] < width:
        rest = width - bounds[-1]
        bounds.append(min(width, bounds[-1] + _TILE * math.ceil(rest / (2 * _TILE))))
    return tuple(pairwise(bounds))

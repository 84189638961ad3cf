"""From a change of basis to a layer of lower rank, and what that loses, rounding included."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_squeeze.adapter import LoraLayer
from lora_squeeze.gram import second_moment
from lora_squeeze.scratch import lent, scratch
from lora_squeeze.spectrum import Basis

__all__ = ["Truncation", "idle_rows", "truncate"]

# float32 products lose digits where the terms of up @ P are larger than their sum. Half-precision
# factors are rounded far more coarsely than that, up to this growth.
_FLOAT32_GROWTH = 256.0
# Rows of a factor that are converted at a time, to stay within the cache: 2 MiB at rank 64.
_ROWS = 8192


@dataclass(frozen=True)
class Truncation:
    """A layer of lower rank, and ‖ΔW − ΔW'‖_F / ‖ΔW‖_F with its rounding included."""

    layer: LoraLayer
    relative_error: float  # NaN or infinite if the result overflows its dtype


def truncate(
    layer: LoraLayer,
    found: Basis,
    rank: int,
    *,
    scale: float | None = None,
    down_dtype: torch.dtype | None = None,
    up_dtype: torch.dtype | None = None,
    borrow: bool = False,
) -> Truncation:
    """The best approximation of ΔW of at most this rank, balanced, and what it loses.

    scale
        of the result (default: the layer's own); the update stays the same, the factors share the
        difference.
    down_dtype, up_dtype
        of the result (default: float32 or float64, whichever it was computed in). Every number is
        rounded once.
    borrow
        the result may lie in memory that this thread's next `truncate` uses again.

    Directions beyond the numerical rank come out with a zero column in `up` and, where the source
    has one to offer, a non-zero row in `down`: they change nothing, but can learn again if training
    goes on.
    """
    scale = layer.scale if scale is None else scale
    ratio = layer.scale / scale if scale else 1.0
    half = abs(ratio) ** 0.5
    kept = min(rank, found.numerical_rank)
    p, q = found.p[:, :rank] * half, found.q[:rank] * half
    if kept < rank:
        p = torch.cat([p[:, :kept], p.new_zeros(p.shape[0], rank - kept)], dim=1)
        q = torch.cat([q[:kept], idle_rows(layer, found, rank - kept)])
    halves = layer.up.element_size() <= 2 and layer.down.element_size() <= 2
    safe = kept == 0 or float(found.growth[:kept].max()) <= _FLOAT32_GROWTH
    exact = torch.float32 if halves and safe else torch.float64
    q, p = q.to(exact), (p.T if ratio >= 0 else -p.T).to(exact)
    down, (down_cross, down_noise) = _project(layer.down, q, down_dtype or exact, "squeezed down" if borrow else "")
    up, (up_cross, up_noise) = _project(layer.up.T, p, up_dtype or exact, "squeezed up" if borrow else "")
    # With X = up P, Y = Q down and their rounding errors x and y, X^T X = Y Y^T = S and
    # ‖(X + x)(Y + y) - X Y‖² = ‖x (Y + y) + X y‖²: k×k numbers that suffer no cancellation. What was
    # cut off is orthogonal to X and to Y, so the two losses add up as squares.
    values = found.singular_values[:kept] * abs(ratio)
    down_sum = down_cross + down_noise
    rounding = (up_noise * (down_sum + down_cross.T)).sum() + 2 * (up_cross.T * down_sum).sum()
    rounding += values @ (up_noise.diagonal() + down_noise.diagonal())[:kept]
    energies = found.singular_values.square()
    cut, energy = float(energies[kept:].sum()) * layer.scale**2, float(energies.sum()) * layer.scale**2
    lost = cut + float(rounding) * scale**2
    return Truncation(
        layer=LoraLayer(name=layer.name, down=down, up=up.T, scale=scale),
        relative_error=math.sqrt(max(lost, 0.0) / energy) if energy > 0 else 0.0,
    )


def idle_rows(layer: LoraLayer, found: Basis, count: int) -> Tensor:
    """Rows q (count, r) whose q @ down are the strongest directions of down that are not kept."""
    rank = found.p.shape[0]
    kept = found.numerical_rank
    rest = torch.eye(rank, dtype=torch.float64, device=found.p.device) - found.p[:, :kept] @ found.q[:kept]
    gram = rest @ second_moment(layer.down.T).to(rest.device) @ rest.T
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]
    return vectors.T @ rest


def _project(wide: Tensor, projection: Tensor, dtype: torch.dtype, borrow_as: str) -> tuple[Tensor, Tensor]:
    """Round X = projection @ wide to dtype, a block of columns at a time, in the projection's precision.

    wide: (r, n); projection: (k, r). Returns the rounded X (k, n), laid out as `wide` is, and, with
    x its rounding errors, X x^T and x x^T as one (2, k, k) in float64.
    """
    exact, device, height = projection.dtype, projection.device, projection.shape[0]
    upright = wide.stride(1) == 1
    size = (height, wide.shape[1]) if upright else (wide.shape[1], height)
    result = lent(borrow_as, size, dtype) if borrow_as else torch.empty(size, dtype=dtype)
    moments = torch.zeros(2, height, height, dtype=exact, device=device)
    stored = wide if upright else wide.T
    blocks, targets = (matrix.split(_ROWS, int(upright)) for matrix in (stored, result))
    for block, target in zip(blocks, targets, strict=True):
        converted = scratch("converted", block.shape, exact, device).copy_(block)
        both = scratch("product and error", (2, *target.shape), exact, device)
        product, error = both
        # A product of transposes, where that is how the factors are laid out.
        torch.mm(projection, converted, out=product) if upright else torch.mm(converted, projection.T, out=product)
        target.copy_(product)
        if dtype is not exact:
            error.copy_(target).sub_(product)
            both, error = (both, error.T) if upright else (both.mT, error)
            moments.baddbmm_(both, error.expand(2, *error.shape))
    return result if upright else result.T, moments.double()

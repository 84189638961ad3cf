"""From a change of basis to a layer of lower rank, and what that loses, rounding included."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_squeeze.adapter import LoraLayer
from lora_squeeze.gram import second_moment
from lora_squeeze.scratch import lent, placed, scratch, scratch_views
from lora_squeeze.spectrum import Basis

__all__ = ["Cut", "Truncation", "idle_rows", "truncate", "truncate_together"]

# float32 products lose digits where the terms of up @ P are larger than their sum. Half-precision
# factors are rounded far more coarsely than that, up to this growth.
_FLOAT32_GROWTH = 256.0
# Numbers that k×k matrices of layers that are worked on together may have: 8 MiB for the four of them.
_MOST_PADDED = 1 << 18
# Rows of a factor that are converted at a time, to stay within the cache: 2 MiB at rank 64.
_ROWS = 8192


@dataclass(frozen=True)
class Cut:
    """A layer, its change of basis and what is to become of it; the fields are the arguments of `truncate`."""

    layer: LoraLayer
    basis: Basis
    rank: int
    scale: float
    down_dtype: torch.dtype | None = None
    up_dtype: torch.dtype | None = None

    @property
    def kept(self) -> int:
        """How many of its directions are not idle."""
        return min(self.rank, self.basis.numerical_rank)

    @property
    def ratio(self) -> float:
        """What the new factors have to be larger by, as the scale is smaller."""
        return self.layer.scale / self.scale if self.scale else 1.0


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
) -> Truncation:
    """The best approximation of ΔW of at most this rank, balanced, and what it loses.

    scale
        of the result (default: the layer's own); the update stays the same, the factors share the
        difference.
    down_dtype, up_dtype
        of the result (default: float32 or float64, whichever it was computed in). Every number is
        rounded once.

    Directions beyond the numerical rank come out with a zero column in `up` and, where the source
    has one to offer, a non-zero row in `down`: they change nothing, but can learn again if training
    goes on.
    """
    (result,) = truncate_together(
        [Cut(layer, found, rank, layer.scale if scale is None else scale, down_dtype, up_dtype)]
    )
    return result


@torch.no_grad()
def truncate_together(cuts: Sequence[Cut], *, borrow: bool = False) -> list[Truncation]:
    """`truncate` for each of these; faster than one at a time, as the small steps are done for all at once.

    borrow
        the results may lie in memory that this thread's next call uses again.
    """
    layers: list[LoraLayer] = []
    errors: list[float] = []
    for group in _groups(cuts):
        size, device = max(cut.rank for cut in group), group[0].basis.p.device
        roundings = torch.zeros(len(group), 2, 2, size, size, dtype=torch.float64, device=device)
        for cut, rounding in zip(group, roundings, strict=True):
            with placed(len(layers)):
                layers.append(_applied(cut, rounding, borrow=borrow))
        errors += _errors(group, roundings)
    return [Truncation(*one) for one in zip(layers, errors, strict=True)]


def _groups(cuts: Sequence[Cut]) -> Iterator[list[Cut]]:
    """Consecutive cuts whose k×k matrices, padded to one size, stay small."""
    group: list[Cut] = []
    size = 0
    for cut in cuts:
        size = max(size, cut.rank)
        if group and (len(group) + 1) * size**2 > _MOST_PADDED:
            yield group
            group, size = [], cut.rank
        group.append(cut)
    if group:
        yield group


def _applied(cut: Cut, rounding: Tensor, *, borrow: bool) -> LoraLayer:
    """The layer of lower rank. `rounding` (2, 2, k, k) takes up `_project`'s moments, down's first."""
    layer, found, rank, kept = cut.layer, cut.basis, cut.rank, cut.kept
    half = abs(cut.ratio) ** 0.5
    p, q = found.p[:, :rank], found.q[:rank]
    if half != 1:
        p, q = p * half, q * half
    if kept < rank:
        p = torch.cat([p[:, :kept], p.new_zeros(p.shape[0], rank - kept)], dim=1)
        q = torch.cat([q[:kept], idle_rows(layer, found, rank - kept)])
    halves = layer.up.element_size() <= 2 and layer.down.element_size() <= 2
    safe = _full_float32() and max(found.growth.tolist()[:kept], default=0.0) <= _FLOAT32_GROWTH
    exact = torch.float32 if halves and safe else torch.float64
    q, p = q.to(exact), (p.T if cut.ratio >= 0 else -p.T).to(exact)
    down = _project(layer.down, q, cut.down_dtype or exact, rounding[0], "squeezed down" if borrow else "")
    up = _project(layer.up.T, p, cut.up_dtype or exact, rounding[1], "squeezed up" if borrow else "")
    return LoraLayer(name=layer.name, down=down, up=up.T, scale=cut.scale)


def _full_float32() -> bool:
    """Whether float32 products have all their digits: a process that also trains may have given some up for speed."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set for one backend alone
        return False


def _errors(cuts: Sequence[Cut], roundings: Tensor) -> list[float]:
    """Each relative error, from (layers, 2, 2, k, k): of down and up, the products and squares of rounding errors."""
    # With X = up P, Y = Q down and their rounding errors x and y, X^T X = Y Y^T = S and
    # ‖(X + x)(Y + y) - X Y‖² = ‖x (Y + y) + X y‖²: k×k numbers that suffer no cancellation. What was
    # cut off is orthogonal to X and to Y, so the two losses add up as squares.
    size = roundings.shape[-1]
    spectra = [cut.basis.singular_values.tolist() for cut in cuts]
    kept = [
        [value * abs(cut.ratio) for value in values[: cut.kept]] + [0.0] * (size - cut.kept)
        for cut, values in zip(cuts, spectra, strict=True)
    ]
    sizes = torch.tensor(kept, dtype=torch.float64, device=roundings.device)
    (down_cross, down_noise), (up_cross, up_noise) = (pair.unbind(1) for pair in roundings.unbind(1))
    down_sum = down_cross + down_noise
    of_up = up_noise * (down_sum + down_cross.mT + torch.diag_embed(sizes)) + 2 * up_cross.mT * down_sum
    of_down = sizes * down_noise.diagonal(dim1=1, dim2=2)
    rounded = (of_up.sum((1, 2)) + of_down.sum(1)).tolist()
    return [_error(*one) for one in zip(cuts, spectra, rounded, strict=True)]


def _error(cut: Cut, values: Sequence[float], rounded: float) -> float:
    if not math.isfinite(rounded):
        return math.inf
    energies = [value * value for value in values]
    energy, lost = sum(energies), sum(energies[cut.kept :])
    if energy == 0 or cut.layer.scale == 0:
        return 0.0
    share = cut.scale / cut.layer.scale
    return math.sqrt(max(lost + rounded * share * share, 0.0) / energy)


@torch.no_grad()
def idle_rows(layer: LoraLayer, found: Basis, count: int) -> Tensor:
    """Rows q (count, r) whose q @ down are the strongest directions of down that are not kept."""
    rank = found.p.shape[0]
    kept = found.numerical_rank
    rest = torch.eye(rank, dtype=torch.float64, device=found.p.device) - found.p[:, :kept] @ found.q[:kept]
    gram = rest @ second_moment(layer.down.T).to(rest.device) @ rest.T
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]
    return vectors.T @ rest


def _project(wide: Tensor, projection: Tensor, dtype: torch.dtype, rounding: Tensor, borrow_as: str) -> Tensor:
    """Round X = projection @ wide to dtype, a block of columns at a time, in the projection's precision.

    wide: (r, n); projection: (k, r). Returns the rounded X (k, n), laid out as `wide` is. With x its
    rounding errors, X x^T and x x^T go into the corner of `rounding` (2, ≥ k, ≥ k).
    """
    exact, device, height = projection.dtype, projection.device, projection.shape[0]
    upright = wide.stride(1) == 1
    size = (height, wide.shape[1]) if upright else (wide.shape[1], height)
    result = lent(borrow_as, size, dtype) if borrow_as else torch.empty(size, dtype=dtype)
    # A product of transposes, where that is how the factors are laid out.
    stored, projection = (wide, projection) if upright else (wide.T, projection.T)
    moments = scratch("moments", (2, height, height), exact, device).zero_()
    for block, target in zip(_blocks(stored, upright), _blocks(result, upright), strict=True):
        converted = scratch("converted", block.shape, exact, device).copy_(block)
        views = _views_of_rows if upright else _views_of_columns
        product, error, both, errors = scratch_views("product and error", (2, *target.shape), exact, device, views)
        torch.mm(*((projection, converted) if upright else (converted, projection)), out=product)
        target.copy_(product)
        if dtype is not exact:
            error.copy_(target).sub_(product)
            moments.baddbmm_(both, errors)
    rounding[:, :height, :height] = moments
    return result if upright else result.T


def _blocks(stored: Tensor, upright: bool) -> Sequence[Tensor]:
    long = int(upright)
    return [stored] if stored.shape[long] <= _ROWS else stored.split(_ROWS, long)


def _views_of_rows(both: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, x, both of them, and x^T once for each of them."""
    product, error = both
    return product, error, both, error.T.expand(2, *error.T.shape)


def _views_of_columns(both: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    product, error = both
    return product, error, both.mT, error.expand(2, *error.shape)

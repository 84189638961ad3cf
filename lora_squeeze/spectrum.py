"""The kernel: one layer's factors → singular values and the change of basis that truncates them.

ΔW = up @ down has rank r, so everything happens in an r×r space. With roots
up^T up = L_B L_B^T and down down^T = L_A L_A^T, the singular value decomposition of the r×r core
L_B^T L_A = U S V^T has the singular values of ΔW, and with

    P = L_A V_k S_k^-1/2   (r, k)        Q = S_k^-1/2 U_k^T L_B^T   (k, r)

up @ P and Q @ down are the best rank-k approximation, balanced as in LoRA-Squeeze (arXiv
2602.10993, Algorithm 1, step 4: the root of Σ on both sides). Q P = I_k. Neither ΔW (out×in) nor
an orthogonal factor (out×r) is ever formed.

Four routes lead there and agree:

    gram        the two second-moment matrices in float64 and their Cholesky factors; a pair whose
                Grams are too ill-conditioned for that takes the `qr` route by itself
    qr          triangular factors of QR in float64: Algorithm 2 of the paper
    randomized  Algorithm 1 of the paper on ΔW as an operator: oversampling 10, 2 power iterations
    dense       the singular value decomposition of ΔW in float64: the reference

Shapes below: m = out_features, n = in_features, r = source rank, q = min(r, m, n).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_squeeze.adapter import LoraLayer
from lora_squeeze.errors import AdapterError

__all__ = ["METHODS", "Basis", "basis", "relative_error", "singular_values", "truncate"]

OVERSAMPLING = 10  # k_o of Algorithm 1
POWER_ITERATIONS = 2  # k_q of Algorithm 1

# Singular values below this fraction of ‖up‖‖down‖ (or of the largest) are rounding noise.
_NOISE = 1e-12
# A Gram matrix squares the condition number. Beyond this one of its root (Frobenius, after scaling
# the diagonal to one) float64 no longer gives seven digits of every singular value.
_GRAM_CONDITION = 1e5
# float32 products lose digits where the terms of up @ P are larger than their sum. Half-precision
# factors are rounded far more coarsely than that, up to this growth.
_FLOAT32_GROWTH = 256.0
_ROWS = 1024  # rows that are converted to float64 at a time: 512 KiB at rank 64, within the cache


@dataclass(frozen=True)
class Basis:
    """The singular values of up @ down (without the scale) and the change of basis to them."""

    singular_values: Tensor  # (q,) float64, descending
    p: Tensor  # (r, q) float64; columns of dead directions are zero
    q: Tensor  # (q, r) float64; rows of dead directions are zero
    numerical_rank: int
    growth: Tensor  # (q,) largest size of the terms of up @ p and q @ down relative to their sums


def basis(
    layer: LoraLayer, *, method: str = "gram", rank: int | None = None, seed: int = 0, device: str = "cpu"
) -> Basis:
    """Decompose one layer's update.

    rank
        how many leading components the `randomized` route should find (default: all); the
        others find all of them at the same cost.
    seed
        of the `randomized` route's test matrix.

    Raises AdapterError, naming the tensor, if a factor holds NaN or infinity.
    """
    up, down = layer.up.to(device), layer.down.to(device)
    if rank is None:
        rank = min(down.shape[0], up.shape[0], down.shape[1])
    try:
        if method == "randomized":
            return _randomized(up, down, rank=rank, seed=seed)
        return _ROUTES[method](up, down)
    except _NotFinite:
        culprits = [key for key, factor in (("down", down), ("up", up)) if not torch.isfinite(factor).all()]
        names = " and ".join({"down": "lora_A", "up": "lora_B"}[key] for key in culprits)
        raise AdapterError(
            f"layer '{layer.name}': {names} holds NaN or infinite values; the adapter is damaged or its training "
            "diverged, and a squeeze cannot repair that: go back to an earlier checkpoint"
        ) from None


def singular_values(layer: LoraLayer, found: Basis) -> tuple[float, ...]:
    """The singular values of the effective update, scale included, largest first."""
    return tuple((found.singular_values * abs(layer.scale)).tolist())


def truncate(layer: LoraLayer, found: Basis, rank: int) -> LoraLayer:
    """The best approximation of ΔW of at most this rank, balanced, in the same scale.

    Returns factors (out, rank) and (rank, in) in float32 or float64, not yet rounded to the dtype
    they will be stored in. Directions beyond the numerical rank come out with a zero column in
    `up` and, where the source has one to offer, a non-zero row in `down`: they change nothing,
    but can learn again if training goes on.
    """
    kept = min(rank, found.numerical_rank)
    p, q = found.p[:, :rank], found.q[:rank]
    if kept < rank:
        q = torch.cat([q[:kept], _idle_rows(layer, found, rank - kept)])
        p = torch.cat([p[:, :kept], p.new_zeros(p.shape[0], rank - kept)], dim=1)
    halves = layer.up.element_size() <= 2 and layer.down.element_size() <= 2
    safe = kept == 0 or float(found.growth[:kept].max()) <= _FLOAT32_GROWTH
    exact = torch.float32 if halves and safe else torch.float64
    up = layer.up.to(p.device, exact) @ p.to(exact)
    down = q.to(exact) @ layer.down.to(p.device, exact)
    return LoraLayer(name=layer.name, down=down, up=up, scale=layer.scale)


def relative_error(source: LoraLayer, approximation: LoraLayer, *, energy: float) -> float:
    """‖ΔW − ΔW'‖_F / ‖ΔW‖_F from the factors alone, good to 1e-7 of ‖ΔW‖_F.

    `energy` is ‖ΔW‖_F² of the source, scale included. Expands the norm of the difference into
    r×r products in float64; neither update is formed.
    """
    if energy <= 0:
        return 0.0
    scale = approximation.scale
    cross_up = _product_over_rows(source.up, approximation.up)
    cross_down = _product_over_rows(source.down.T, approximation.down.T)
    own_up = _product_over_rows(approximation.up, approximation.up)
    own_down = _product_over_rows(approximation.down.T, approximation.down.T)
    overlap = source.scale * scale * float((cross_up * cross_down).sum())
    own = scale * scale * float((own_up * own_down).sum())
    return float(max(energy + own - 2 * overlap, 0.0) / energy) ** 0.5


class _NotFinite(ArithmeticError):
    """A factor holds NaN or infinity; `basis` finds out which."""


def _gram(up: Tensor, down: Tensor) -> Basis:
    root_up = _cholesky_root(_product_over_rows(up, up))
    root_down = _cholesky_root(_product_over_rows(down.T, down.T))
    if root_up is None or root_down is None:
        return _qr(up, down)
    return _from_roots(root_up, root_down, size=min(*up.shape, down.shape[1]))


def _qr(up: Tensor, down: Tensor) -> Basis:
    root_up, root_down = _triangular_root(up), _triangular_root(down.T)
    return _from_roots(root_up, root_down, size=min(*up.shape, down.shape[1]))


def _dense(up: Tensor, down: Tensor) -> Basis:
    up64, down64 = up.double(), down.double()
    update = up64 @ down64
    _check_finite(update)
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    size = min(*up.shape, down.shape[1])
    # V is in the row space of down and U in the column space of up, so their coordinates there
    # are down @ V and U^T @ up: the same P and Q as on the other routes.
    return _from_coordinates(
        down64 @ right[:size].T, left[:, :size].T @ up64, values[:size], up64.norm(dim=0), down64.norm(dim=1)
    )


def _randomized(up: Tensor, down: Tensor, *, rank: int, seed: int) -> Basis:
    up64, down64 = up.double(), down.double()
    _check_finite(up64)
    _check_finite(down64)
    m, n = up.shape[0], down.shape[1]
    size = min(*up.shape, n)
    sketch = min(rank + OVERSAMPLING, m, n)
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn(n, sketch, generator=generator, dtype=torch.float64).to(up.device)
    sample = up64 @ (down64 @ test)
    for _ in range(POWER_ITERATIONS):
        orthogonal = torch.linalg.qr(sample).Q
        orthogonal = torch.linalg.qr(down64.T @ (up64.T @ orthogonal)).Q
        sample = up64 @ (down64 @ orthogonal)
    orthogonal = torch.linalg.qr(sample).Q
    left, values, right = torch.linalg.svd((orthogonal.T @ up64) @ down64, full_matrices=False)
    left = orthogonal @ left
    # The paper's A = U Σ^½ lies in the columns of up only up to the sketch; its coordinates there
    # are those of ΔW V Σ^-½, one half-step of the power iteration further.
    return _from_coordinates(
        down64 @ right[:size].T, left[:, :size].T @ up64, values[:size], up64.norm(dim=0), down64.norm(dim=1)
    )


_ROUTES: dict[str, Callable[[Tensor, Tensor], Basis]] = {"gram": _gram, "qr": _qr, "dense": _dense}
METHODS = ("gram", "qr", "randomized", "dense")


def _from_roots(root_up: Tensor, root_down: Tensor, *, size: int) -> Basis:
    """The change of basis from L_B (r, ·) and L_A (r, ·): rows belong to the latent directions."""
    left, values, right = torch.linalg.svd(root_up.T @ root_down, full_matrices=False)
    return _from_coordinates(
        root_down @ right[:size].T,
        left[:, :size].T @ root_up.T,
        values[:size],
        root_up.norm(dim=1),
        root_down.norm(dim=1),
    )


def _from_coordinates(
    right: Tensor, left: Tensor, values: Tensor, up_norms: Tensor, down_norms: Tensor
) -> Basis:
    """P = right · S^-½ and Q = S^-½ · left, with the directions that are only noise set to zero.

    right: L_A V (r, q); left: U^T L_B^T (q, r); up_norms: of up's columns (r,); down_norms: of
    down's rows (r,).
    """
    floor = _NOISE * float(up_norms.norm() * down_norms.norm())
    alive = values > max(floor, _NOISE * float(values[0]))
    roots = values.sqrt()
    inverse = torch.where(alive, 1.0 / roots, torch.zeros_like(roots))
    p, q = right * inverse, inverse[:, None] * left
    growth = torch.maximum(up_norms @ p.abs(), q.abs() @ down_norms) * inverse
    return Basis(
        singular_values=torch.where(alive, values, torch.zeros_like(values)),
        p=p,
        q=q,
        numerical_rank=int(alive.sum()),
        growth=growth,
    )


def _cholesky_root(gram: Tensor) -> Tensor | None:
    """L with gram = L L^T, or None where float64 Grams are not good enough (or not definite)."""
    _check_finite(gram)
    norms = gram.diagonal().sqrt()
    if not bool((norms > 0).all()):
        return None
    # With a unit diagonal, columns that differ only in size (as after an SVD) are no difficulty.
    factor, failed = torch.linalg.cholesky_ex(gram / (norms[:, None] * norms))
    if int(failed) != 0:
        return None
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    if float(factor.norm() * inverse.norm()) > _GRAM_CONDITION:
        return None
    return norms[:, None] * factor


def _triangular_root(tall: Tensor) -> Tensor:
    """R^T of the QR decomposition of a (rows, r) matrix, blocks of rows at a time: (r, ≤ r)."""
    width = tall.shape[1]
    block = max(_ROWS, 4 * width)
    triangle = tall.new_zeros((0, width), dtype=torch.float64)
    for rows in tall.split(block):
        triangle = torch.linalg.qr(torch.cat([triangle, rows.double()]), mode="r").R
    _check_finite(triangle)
    return triangle.T


def _product_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """left^T @ right in float64, converting a block of rows at a time: (a, b)."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for rows, others in zip(left.split(_ROWS), right.split(_ROWS), strict=True):
        converted = rows.double()
        total.addmm_(converted.T, converted if left is right else others.double())
    return total


def _idle_rows(layer: LoraLayer, found: Basis, count: int) -> Tensor:
    """Rows q (count, r) whose q @ down are the strongest directions of down that are not kept."""
    rank = found.p.shape[0]
    kept = found.numerical_rank
    rest = torch.eye(rank, dtype=torch.float64, device=found.p.device) - found.p[:, :kept] @ found.q[:kept]
    gram = rest @ _product_over_rows(layer.down.T, layer.down.T).to(rest.device) @ rest.T
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]
    return vectors.T @ rest


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise _NotFinite

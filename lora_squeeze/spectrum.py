"""The kernel: a layer's factors → singular values and the change of basis that truncates them.

ΔW = up @ down has rank r, so everything happens in an r×r space. With roots
up^T up = L_B L_B^T and down down^T = L_A L_A^T, the singular value decomposition of the r×r core
L_B^T L_A = U S V^T has the singular values of ΔW, and with

    P = L_A V_k S_k^-1/2   (r, k)        Q = S_k^-1/2 U_k^T L_B^T   (k, r)

up @ P and Q @ down are the best rank-k approximation, balanced as in LoRA-Squeeze (arXiv
2602.10993, Algorithm 1, step 4: the root of Σ on both sides). Q P = I_k. Neither ΔW (out×in) nor
an orthogonal factor (out×r) is ever formed.

Four routes lead there and agree:

    gram        the two second moments in float64, and the eigenvectors of L_A^T up^T up L_A = V S² V^T;
                squaring costs digits in the tail, so a layer whose spectrum or factors are too
                ill-conditioned for that takes the `qr` route by itself
    qr          triangular factors of QR in float64: Algorithm 2 of the paper
    randomized  Algorithm 1 of the paper on ΔW as an operator: oversampling 10, 2 power iterations
    dense       the singular value decomposition of ΔW in float64: the reference

Shapes below: m = out_features, n = in_features, r = source rank, q = min(r, m, n).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_squeeze.adapter import LoraLayer
from lora_squeeze.errors import AdapterError, SettingsError, reason_of
from lora_squeeze.gram import second_moment

__all__ = [
    "METHODS",
    "Basis",
    "bases",
    "basis",
    "basis_from_roots",
    "check_device",
    "singular_values",
    "triangular_root",
]

OVERSAMPLING = 10  # k_o of Algorithm 1
POWER_ITERATIONS = 2  # k_q of Algorithm 1

# Singular values below this fraction of ‖up‖‖down‖ (or of the largest) are rounding noise.
_NOISE = 1e-12
# The condition number (Frobenius, unit diagonal) of L_A, and the spread σ_q²/σ_1², up to which the
# second moments still give eight digits of every singular value.
_GRAM_CONDITION = 1e4
_GRAM_SPREAD = 1e-8
# Rows of a factor that are worked on at a time, to stay within the cache: 1 MiB at rank 64.
_ROWS = 2048


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
    return bases([layer], method=method, rank=rank, seed=seed, device=device)[0]


@torch.no_grad()
def bases(
    layers: Sequence[LoraLayer],
    *,
    method: str = "gram",
    rank: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> list[Basis]:
    """`basis` of each of these layers; faster than one at a time, as the code of each step stays in the cache."""
    if method not in METHODS:
        raise SettingsError(f"method '{method}' is not known; known are {', '.join(METHODS)}")
    factors = [(layer.up.to(device), layer.down.to(device)) for layer in layers]
    by_gram = _grams(factors) if method == "gram" else {}
    found: list[Basis] = []
    for place, (layer, (up, down)) in enumerate(zip(layers, factors, strict=True)):
        try:
            if method == "randomized":
                found.append(_randomized(up, down, rank=rank or down.shape[0], seed=seed))
            elif method == "dense":
                found.append(_dense(up, down))
            else:
                found.append(by_gram.get(place) or _qr(up, down))
        except _NotFinite:
            raise _damaged(layer) from None
    return found


def _damaged(layer: LoraLayer) -> AdapterError:
    factors = (("lora_A", layer.down), ("lora_B", layer.up))
    names = " and ".join(key for key, factor in factors if not torch.isfinite(factor).all())
    return AdapterError(
        f"layer '{layer.name}': {names} holds NaN or infinite values; the adapter is damaged or its training "
        "diverged, and a squeeze cannot repair that: go back to an earlier checkpoint"
    )


def check_device(device: str) -> None:
    """Raise SettingsError if torch cannot compute on this device."""
    try:
        torch.ones(1, device=device, dtype=torch.float64).sum().item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise SettingsError(
            f"device '{device}' cannot be used for float64: {reason_of(error)}; 'cpu' always works"
        ) from error


def singular_values(layer: LoraLayer, found: Basis) -> tuple[float, ...]:
    """The singular values of the effective update, scale included, largest first."""
    return tuple((found.singular_values * abs(layer.scale)).tolist())


class _NotFinite(ArithmeticError):
    """A factor holds NaN or infinity; `basis` finds out which."""


def _grams(factors: Sequence[tuple[Tensor, Tensor]]) -> dict[int, Basis]:
    """The bases of those (up, down) whose second moments say enough; factors of one rank are worked on together."""
    by_rank: defaultdict[int, list[int]] = defaultdict(list)
    for place, (up, down) in enumerate(factors):
        # Where second moments would be larger than the factors, they do not pay.
        if up.shape[1] <= max(up.shape[0], down.shape[1]):
            by_rank[up.shape[1]].append(place)
    found: dict[int, Basis] = {}
    for places in by_rank.values():
        ups = torch.stack([second_moment(factors[place][0]) for place in places])
        downs = torch.stack([second_moment(factors[place][1].T) for place in places])
        found.update((place, own) for place, own in zip(places, _gram(ups, downs), strict=True) if own)
    return found


def _gram(moments_up: Tensor, moments_down: Tensor) -> list[Basis | None]:
    """From up^T up and down down^T, (layers, r, r) each; None where squaring has cost too many digits."""
    up_norms, down_norms = (moments.diagonal(dim1=-2, dim2=-1).sqrt() for moments in (moments_up, moments_down))
    roots, sound = _cholesky_roots(moments_down, down_norms)
    halves = moments_up @ roots
    cores = roots.mT @ halves
    sound &= cores.sum(dim=(1, 2)).isfinite()
    # What is not sound would stop the decomposition of all.
    squares, vectors = torch.linalg.eigh(torch.where(sound[:, None, None], cores, _identity(cores)))
    sound &= squares[:, 0] > _GRAM_SPREAD * squares[:, -1]
    values, vectors = squares.flip(1).sqrt(), vectors.flip(2)
    found = _from_coordinates(roots @ vectors, (halves @ vectors).mT / values[..., None], values, up_norms, down_norms)
    return [own if good else None for own, good in zip(found, sound.tolist(), strict=True)]


def _qr(up: Tensor, down: Tensor) -> Basis:
    root_up, root_down = triangular_root(up), triangular_root(down.T)
    return basis_from_roots(root_up, root_down, size=min(*up.shape, down.shape[1]))


def _dense(up: Tensor, down: Tensor) -> Basis:
    up64, down64 = up.double(), down.double()
    update = up64 @ down64
    _check_finite(update)
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    size = min(*up.shape, down.shape[1])
    # V is in the row space of down and U in the column space of up, so their coordinates there
    # are down @ V and U^T @ up: the same P and Q as on the other routes.
    return _from_coordinates_of_one(
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
    return _from_coordinates_of_one(
        down64 @ right[:size].T, left[:, :size].T @ up64, values[:size], up64.norm(dim=0), down64.norm(dim=1)
    )


METHODS = ("gram", "qr", "randomized", "dense")


def basis_from_roots(root_up: Tensor, root_down: Tensor, *, size: int) -> Basis:
    """The change of basis from L_B (r, ·) and L_A (r, ·): rows belong to the latent directions."""
    left, values, right = torch.linalg.svd(root_up.T @ root_down, full_matrices=False)
    return _from_coordinates_of_one(
        root_down @ right[:size].T,
        left[:, :size].T @ root_up.T,
        values[:size],
        root_up.norm(dim=1),
        root_down.norm(dim=1),
    )


def _from_coordinates_of_one(*arguments: Tensor) -> Basis:
    return _from_coordinates(*(argument[None] for argument in arguments))[0]


def _from_coordinates(right: Tensor, left: Tensor, values: Tensor, up_norms: Tensor, down_norms: Tensor) -> list[Basis]:
    """P = right · S^-½ and Q = S^-½ · left, with the directions that are only noise set to zero.

    right: L_A V (layers, r, q); left: U^T L_B^T (layers, q, r); values: (layers, q); up_norms: of up's columns
    (layers, r); down_norms: of down's rows (layers, r).
    """
    floors = _NOISE * torch.maximum(up_norms.norm(dim=1) * down_norms.norm(dim=1), values[:, 0])
    dead = values <= floors[:, None]
    values, inverses = values.masked_fill(dead, 0.0), values.rsqrt().masked_fill_(dead, 0.0)
    p, q = right * inverses[:, None], inverses[..., None] * left
    terms = torch.maximum(up_norms[:, None] @ p.abs(), (q.abs() @ down_norms[..., None]).mT)
    growths = terms[:, 0] * inverses
    alive = (~dead).sum(dim=1).tolist()
    parts = (values.unbind(), p.unbind(), q.unbind(), alive, growths.unbind())
    return [Basis(*own) for own in zip(*parts, strict=True)]


def _cholesky_roots(moments: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """L with moment = L L^T of each, and whether it is far enough from singular; norms: roots of the diagonals."""
    # With a unit diagonal, rows that differ only in size (as after an SVD) are no difficulty.
    # A zero row divides to NaN, which the factorisation reports as a failure.
    factors, failures = torch.linalg.cholesky_ex(moments / (norms[..., None] * norms[:, None]))
    inverses = torch.linalg.solve_triangular(factors, _identity(moments), upper=False)
    conditions = factors.norm(dim=(1, 2)) * inverses.norm(dim=(1, 2))
    return factors * norms[..., None], (failures == 0) & (conditions <= _GRAM_CONDITION)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def triangular_root(tall: Tensor) -> Tensor:
    """R^T of the QR decomposition of a (rows, r) matrix, blocks of rows at a time: (r, ≤ r)."""
    width = tall.shape[1]
    block = max(_ROWS, 4 * width)
    triangle = tall.new_zeros((0, width), dtype=torch.float64)
    for rows in tall.split(block):
        triangle = torch.linalg.qr(torch.cat([triangle, rows.double()]), mode="r").R
    _check_finite(triangle)
    return triangle.T


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise _NotFinite

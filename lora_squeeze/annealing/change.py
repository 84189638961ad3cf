"""What a switch does to one layer: two small matrices, B' = B P and A' = Q A, and what they lose.

The kept directions are those of the truncated singular value decomposition of ΔW; within them any
invertible k×k matrix T is free: P T and T⁻¹ Q give the same update. It decides the geometry that the
optimizer sees from then on:

    balanced  A' A'ᵀ = B'ᵀ B' = Σ, as in LoRA-Squeeze (arXiv 2602.10993, algorithm 1, step 4)
    keep      P'ᵀ P' = Q' Q'ᵀ: both factors are projected with equal force, so that A and B keep the
              sizes they have. T = X^½ with X the geometric mean of (PᵀP)⁻¹ and Q Qᵀ. Where no
              direction is dropped, P' is orthogonal, and a layer that keeps its rank is left as it is.

Where A Aᵀ = Bᵀ B already, the two agree up to a rotation.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from lora_squeeze.adapter import LayerSpec, LoraLayer
from lora_squeeze.decomposition import spectrum_of
from lora_squeeze.errors import SettingsError
from lora_squeeze.records import Spectrum
from lora_squeeze.spectrum import Basis, bases
from lora_squeeze.truncation import idle_rows

__all__ = ["BALANCES", "Change", "changes_to", "check_balance", "decomposed"]

BALANCES = ("keep", "balanced")

# Of the mean size of A's rows: an idle row that is shorter has nothing to start from.
_TOO_SHORT = 1e-6
_TOGETHER = 64  # layers

_Projection: TypeAlias = tuple[Tensor, Tensor]  # P (r, k) and Q (k, r)
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Change:
    """A layer's change of basis. q @ p is the identity on the `kept` first directions.

    p, q
        (r, k) and (k, r), float64. Beyond `kept`, directions are dead: p's columns are zero, and q's
        rows take what A has left.
    fresh
        (k - kept - …, in) rows that A gets at the end, where it has nothing left; None otherwise.
    """

    p: Tensor
    q: Tensor
    kept: int
    fresh: Tensor | None = None

    @property
    def rank(self) -> int:
        """The new one."""
        return self.p.shape[1]

    def up(self, up: Tensor) -> Tensor:
        """B P: (out, r) → (out, k), in up's dtype."""
        return (up.to(self.p) @ self.p).to(up.dtype)

    def down(self, down: Tensor) -> Tensor:
        """Q A: (r, in) → (k, in), in down's dtype."""
        rows = (self.q @ down.to(self.q)).to(down.dtype)
        if self.fresh is not None:
            rows[-len(self.fresh) :] = self.fresh.to(rows)
        return rows


def check_balance(balance: str) -> None:
    """Raise SettingsError if this is not one of BALANCES."""
    if balance not in BALANCES:
        raise SettingsError(f"balance '{balance}' is not known; known are {', '.join(BALANCES)}")


def decomposed(
    layers: Mapping[str, LoraLayer], specs: Mapping[str, LayerSpec]
) -> tuple[dict[str, Basis], tuple[Spectrum, ...]]:
    """Live layers' bases and spectra, computed where the factors are (on the CPU without float64 there)."""
    found: dict[str, Basis] = {}
    for device, names in _groups(layers, lambda name: layers[name].up.device):
        where = "cpu" if device.type == "mps" else str(device)
        found.update(zip(names, bases([layers[name] for name in names], device=where), strict=True))
    return found, tuple(spectrum_of(specs[name], layer, found[name]) for name, layer in layers.items())


def changes_to(
    ranks: Mapping[str, int], layers: Mapping[str, LoraLayer], found: Mapping[str, Basis], *, balance: str = "keep"
) -> dict[str, Change]:
    """The changes of basis that truncate these layers to these ranks.

    Directions beyond the numerical rank come out with a zero column in B and a non-zero row in A: they
    change nothing, but can learn again. Where A has no direction left to offer, the row is drawn as PEFT
    draws a new one, by a seed that depends on the layer's name and rank alone.
    """
    check_balance(balance)
    projections: dict[str, _Projection] = {}
    for name in layers:
        kept = min(ranks[name], found[name].numerical_rank)
        projections[name] = found[name].p[:, :kept], found[name].q[:kept]
    if balance == "keep":
        as_it_is = [name for name in layers if ranks[name] == len(found[name].p)]
        projections.update(_all_evenly({name: one for name, one in projections.items() if name not in as_it_is}))
        for name in as_it_is:
            identity = torch.eye(ranks[name], dtype=torch.float64, device=found[name].p.device)
            projections[name] = identity, identity
    return {name: _filled(layers[name], found[name], projections[name], rank=ranks[name]) for name in layers}


def _filled(layer: LoraLayer, found: Basis, projection: _Projection, *, rank: int) -> Change:
    """The change with directions that are idle, as many as there are too few."""
    p, q = projection
    kept = len(q)
    if kept == rank:
        return Change(p, q, kept)
    idle = idle_rows(layer, found, rank - kept)
    p = torch.cat([p, p.new_zeros(len(p), rank - kept)], dim=1)
    return Change(p, torch.cat([q, idle]), kept, _fresh_rows(layer, idle))


def _all_evenly(projections: Mapping[str, _Projection]) -> Iterator[tuple[str, _Projection]]:
    """`_evenly` of each, those of one size at once: on small matrices the calls cost more than the work."""
    for (_, kept, _), names in _groups(
        projections, lambda name: (*projections[name][0].shape, projections[name][0].device)
    ):
        ps, qs = (torch.stack(some) for some in zip(*(projections[name] for name in names), strict=True))
        if kept:
            ps, qs = _evenly(ps, qs)
        yield from zip(names, zip(ps, qs, strict=True), strict=True)


def _evenly(p: Tensor, q: Tensor) -> _Projection:
    """P T and T⁻¹ Q with equal Gram matrices, T = X^½ and X (PᵀP) X = Q Qᵀ; p: (…, r, k), q: (…, k, r)."""
    # Directions of very different size are no difficulty once their two norms agree.
    scales = (q.norm(dim=-1) / p.norm(dim=-2)).sqrt()
    p, q = p * scales.unsqueeze(-2), q / scales.unsqueeze(-1)
    root, inverse_root = _roots(p.mT @ p)
    middle, _ = _roots(root @ (q @ q.mT) @ root)
    t, t_inverse = _roots(inverse_root @ middle @ inverse_root)
    return p @ t, t_inverse @ q


def _roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The square roots of positive definite matrices, and their inverses."""
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    roots = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt().unsqueeze(-2)
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def _groups(names: Iterable[str], key: Callable[[str], _Key]) -> Iterator[tuple[_Key, list[str]]]:
    """Names of one key together, a bounded number at a time."""
    groups: dict[_Key, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    for found, group in groups.items():
        for start in range(0, len(group), _TOGETHER):
            yield found, group[start : start + _TOGETHER]


def _fresh_rows(layer: LoraLayer, idle: Tensor) -> Tensor | None:
    """New rows for those idle directions (the last ones) of which A has nothing."""
    down = layer.down.to(idle)
    lengths = (idle @ down).norm(dim=1)
    typical = float(down.norm(dim=1).mean())
    count = int((lengths <= _TOO_SHORT * typical).sum())
    if not count:
        return None
    generator = torch.Generator().manual_seed(zlib.crc32(f"{layer.name} {len(idle)}".encode()))
    rows = torch.rand(count, down.shape[1], generator=generator, dtype=torch.float64) * 2 - 1
    return (rows / down.shape[1] ** 0.5).to(idle.device)  # kaiming_uniform_(a=√5), as PEFT initialises lora_A

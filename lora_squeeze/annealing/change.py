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
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_squeeze.adapter import LayerSpec, LoraLayer
from lora_squeeze.decomposition import spectrum_of
from lora_squeeze.errors import SettingsError
from lora_squeeze.records import Spectrum
from lora_squeeze.spectrum import Basis, basis, idle_rows

__all__ = ["BALANCES", "Change", "change_to", "check_balance", "decomposed"]

BALANCES = ("keep", "balanced")

# Of the mean size of A's rows: an idle row that is shorter has nothing to start from.
_TOO_SHORT = 1e-6


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


def decomposed(layer: LoraLayer, spec: LayerSpec) -> tuple[Basis, Spectrum]:
    """A live layer's basis and spectrum, computed where its factors are (on the CPU without float64 there)."""
    device = layer.up.device
    found = basis(layer, device="cpu" if device.type == "mps" else str(device))
    return found, spectrum_of(spec, layer, found)


def change_to(rank: int, layer: LoraLayer, found: Basis, *, balance: str = "keep") -> Change:
    """The change of basis that truncates a layer to this rank.

    Directions beyond the numerical rank come out with a zero column in B and a non-zero row in A: they
    change nothing, but can learn again. Where A has no direction left to offer, the row is drawn as PEFT
    draws a new one, by a seed that depends on the layer's name and rank alone.
    """
    check_balance(balance)
    source = found.p.shape[0]
    if balance == "keep" and rank == source:
        identity = torch.eye(rank, dtype=torch.float64, device=found.p.device)
        return Change(identity, identity, kept=rank)
    kept = min(rank, found.numerical_rank)
    p, q = found.p[:, :kept], found.q[:kept]
    if balance == "keep" and kept:
        p, q = _evenly(p, q)
    if kept == rank:
        return Change(p, q, kept)
    idle = idle_rows(layer, found, rank - kept)
    p = torch.cat([p, p.new_zeros(source, rank - kept)], dim=1)
    return Change(p, torch.cat([q, idle]), kept, _fresh_rows(layer, idle))


def _evenly(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """P T and T⁻¹ Q with equal Gram matrices: T T = X and X (PᵀP) X = Q Qᵀ."""
    # Directions of very different size are no difficulty once their two norms agree.
    scales = (q.norm(dim=1) / p.norm(dim=0)).sqrt()
    p, q = p * scales, q / scales[:, None]
    root, inverse_root = _roots(p.T @ p)
    middle, _ = _roots(root @ (q @ q.T) @ root)
    t, t_inverse = _roots(inverse_root @ middle @ inverse_root)
    return p @ t, t_inverse @ q


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    roots = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


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

"""Policies: spectra → ranks. Pure functions of numbers; no tensor is touched.

Every policy takes the spectra of all layers first and returns a `Ranks` plan that never asks a
layer for more than its own rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from lora_squeeze.errors import RankError
from lora_squeeze.records import Ranks, Spectrum

__all__ = ["By", "candidate_ranks", "fixed", "retention_curve", "variance"]

By = Literal["mean", "worst"]


class Ranked(Protocol):
    """Anything that has a layer's name and rank: a spectrum, or a layer that was not decomposed."""

    @property
    def name(self) -> str: ...
    @property
    def rank(self) -> int: ...


def fixed(layers: Iterable[Ranked], rank: int) -> Ranks:
    """The same rank for all layers; a layer whose own rank is lower keeps it.

    Post-Squeeze of LoRA-Squeeze (arXiv 2602.10993). Raises RankError for a rank below 1.
    """
    if rank < 1:
        raise RankError(f"rank {rank} is not possible: a LoRA layer has a rank of at least 1")
    return Ranks(policy=f"fixed={rank}", by_layer={s.name: min(rank, s.rank) for s in layers})


def variance(
    spectra: Sequence[Spectrum], keep: float = 0.95, *, by: By = "mean", candidates: Iterable[int] = ()
) -> Ranks:
    """One rank for all layers: the smallest candidate whose retained variance is at least `keep`.

    V(k) = Σ_{i≤k} σ² / Σ σ² per layer (arXiv 2602.10993, appendix F); `by` says whether its mean
    over the layers or its minimum has to reach `keep`. Layers that are exactly zero do not count.
    candidates: default the powers of two up to the source rank. Where none of them keeps enough,
    the source rank does.
    """
    if not 0 < keep <= 1:
        raise RankError(f"a retained variance of {keep} is not possible: it is a fraction above 0 and up to 1")
    source_rank = max((s.rank for s in spectra), default=1)
    curve = {"mean": _mean, "worst": min}[by]
    for rank in candidate_ranks(source_rank, candidates):
        if curve(retention_curve(spectra, rank)) >= keep:
            break
    else:
        rank = source_rank
    return Ranks(policy=f"variance={keep:g}", by_layer=fixed(spectra, rank).by_layer)


def candidate_ranks(source_rank: int, given: Iterable[int] = ()) -> tuple[int, ...]:
    """The ranks to look at, ascending and without repetition.

    Powers of two up to the source rank and the source rank itself, or the given ones; those
    beyond the source rank become the source rank. Raises RankError for a rank below 1.
    """
    ranks = list(given)
    if impossible := [rank for rank in ranks if rank < 1]:
        raise RankError(f"candidate rank {impossible[0]} is not possible: ranks start at 1")
    if not ranks:
        ranks = [1 << power for power in range(source_rank.bit_length())] + [source_rank]
    return tuple(sorted({min(rank, source_rank) for rank in ranks}))


def retention_curve(spectra: Iterable[Spectrum], rank: int) -> list[float]:
    """V(rank) of every layer that is not exactly zero; [1.0] if there is none."""
    return [s.retained_variance(rank) for s in spectra if s.energy > 0] or [1.0]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

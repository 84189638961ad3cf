"""Spectra → what each candidate rank retains, and the rank that is recommended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_squeeze.errors import RankError
from lora_squeeze.policies import By, candidate_ranks, retention_curve, variance
from lora_squeeze.records import Analysis, Spectrum
from lora_squeeze.spelling import percent

__all__ = ["analyze"]


def analyze(
    spectra: Sequence[Spectrum],
    *,
    source: str = "",
    source_rank: int = 0,
    target_ranks: Iterable[int] = (),
    min_variance_retention: float = 0.95,
    by: By = "mean",
    notes: Iterable[str] = (),
) -> Analysis:
    """Measure retained variance at each candidate rank and recommend the smallest that suffices.

    source_rank
        0 takes the largest rank found; any other value must agree with it.

    Raises RankError if a declared rank contradicts the tensors or a rank or threshold is impossible.
    """
    found = max((s.rank for s in spectra), default=0)
    if source_rank not in (0, found):
        raise RankError(
            f"source rank {source_rank} was declared, but the largest rank in the tensors of {source or 'the adapter'} "
            f"is {found}; leave it out to take it from the tensors"
        )
    ranks = candidate_ranks(found, target_ranks)
    curves = {rank: retention_curve(spectra, rank) for rank in ranks}
    energy = sum(s.energy for s in spectra)
    weighted = {rank: sum(s.retained_energy(rank) for s in spectra) / energy if energy > 0 else 1.0 for rank in ranks}
    recommended = variance(spectra, min_variance_retention, by=by, candidates=ranks).largest
    return Analysis(
        source=source,
        source_rank=found,
        target_ranks=ranks,
        min_variance_retention=min_variance_retention,
        by=by,
        recommended_rank=recommended,
        mean_variance={rank: sum(curve) / len(curve) for rank, curve in curves.items()},
        min_variance={rank: min(curve) for rank, curve in curves.items()},
        max_variance={rank: max(curve) for rank, curve in curves.items()},
        energy_variance=weighted,
        spectra=tuple(spectra),
        notes=(*notes, *_own_notes(spectra, weighted, recommended, min_variance_retention, by)),
    )


def _own_notes(
    spectra: Sequence[Spectrum], weighted: dict[int, float], recommended: int, keep: float, by: By
) -> list[str]:
    notes: list[str] = []
    zero = [s.name for s in spectra if s.energy == 0]
    if zero:
        notes.append(f"{len(zero)} of {len(spectra)} layers are exactly zero and do not count (first: {zero[0]})")
    by_energy = next((rank for rank, share in weighted.items() if share >= keep), max(weighted))
    if by_energy < recommended and by == "worst":
        worst = min((s for s in spectra if s.energy > 0), key=lambda s: s.retained_variance(by_energy))
        share = worst.energy / sum(s.energy for s in spectra)
        notes.append(
            f"weighted by energy, rank {by_energy} is enough for {percent(keep)}: the layer that asks for more, "
            f"{worst.name}, has {share:.2%} of the energy"
        )
    elif by_energy < recommended:
        notes.append(
            f"weighted by energy, rank {by_energy} is enough for {percent(keep)}: the mean over layers and the energy "
            "disagree because layers of little energy count as much there as those that do the work"
        )
    elif by_energy > recommended:
        notes.append(
            f"weighted by energy, only rank {by_energy} retains {percent(keep)}: the layers that do the work need more "
            "than the mean over layers says"
        )
    if recommended not in weighted:
        notes.append(f"no candidate retains {percent(keep)}: the recommendation is the source rank")
    return notes

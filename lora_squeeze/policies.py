"""Policies: spectra → ranks. Pure functions of numbers; no tensor is touched.

A policy has one spelling everywhere: `energy=0.9` on the command line and in TOML is the function
`energy(spectra, 0.9)` here (a dash becomes an underscore). All of them take `limits` and return a
`Ranks` plan that never asks a layer for more than its own rank. σ are those of the effective
update, scale included: with unequal scales nothing else is comparable across layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any, Literal

from lora_squeeze.budget import cheapest_for_energy, filled, most_energy, price_of, smallest
from lora_squeeze.errors import RankError
from lora_squeeze.limits import NO_LIMITS, Group, Limits, Ranked, groups
from lora_squeeze.records import Ranks, Spectrum
from lora_squeeze.sizes import read_size
from lora_squeeze.spelling import spell

__all__ = [
    "POLICIES",
    "By",
    "Policy",
    "candidate_ranks",
    "check_policy",
    "cumulative",
    "effective_rank",
    "energy",
    "fixed",
    "knee",
    "optimal_threshold",
    "para_energy",
    "para_rank",
    "params",
    "parse_policy",
    "retention_curve",
    "sigma_ratio",
    "size",
    "stable_rank",
    "variance",
]

By = Literal["mean", "worst"]


def fixed(layers: Iterable[Ranked], rank: int, *, limits: Limits = NO_LIMITS) -> Ranks:
    """The same rank for all layers; a layer whose own rank is lower keeps it.

    Post-Squeeze of LoRA-Squeeze (arXiv 2602.10993). Raises RankError for a rank below 1.
    """
    if rank < 1:
        raise RankError(f"rank {rank} is not possible: a LoRA layer has a rank of at least 1")
    layers = list(layers)
    return _limited(f"fixed={rank}", layers, [min(rank, layer.rank) for layer in layers], limits)


def variance(
    spectra: Sequence[Spectrum],
    keep: float = 0.95,
    *,
    by: By = "mean",
    candidates: Iterable[int] = (),
    limits: Limits = NO_LIMITS,
) -> Ranks:
    """One rank for all layers: the smallest candidate whose retained variance is at least `keep`.

    V(k) = Σ_{i≤k} σ² / Σ σ² per layer (arXiv 2602.10993, appendix F); `by` says whether its mean
    over the layers or its minimum has to reach `keep`. Layers that are exactly zero do not count.
    candidates: default the powers of two up to the source rank. Where none of them keeps enough,
    the source rank does.
    """
    _check_fraction("variance", keep)
    if by not in ("mean", "worst"):
        raise RankError(f"by '{by}' is not possible: the mean or the worst layer must reach it")
    source_rank = max((s.rank for s in spectra), default=1)
    curve = {"mean": _mean, "worst": min}[by]
    for rank in candidate_ranks(source_rank, candidates):
        if curve(retention_curve(spectra, rank)) >= keep:
            break
    else:
        rank = source_rank
    return _limited(f"variance={spell(keep)}", spectra, [min(rank, s.rank) for s in spectra], limits)


def energy(spectra: Sequence[Spectrum], keep: float, *, limits: Limits = NO_LIMITS) -> Ranks:
    """Per layer the smallest k with Σ_{i≤k} σ² ≥ keep · Σ σ² (PEFT's fractional rank, kohya's sv_fro)."""
    _check_fraction("energy", keep)
    return _per_layer(f"energy={spell(keep)}", spectra, lambda s: _first_reaching(s.cumulative_energy, keep), limits)


def cumulative(spectra: Sequence[Spectrum], keep: float, *, limits: Limits = NO_LIMITS) -> Ranks:
    """Per layer the smallest k with Σ_{i≤k} σ ≥ keep · Σ σ (kohya's sv_cumulative)."""
    _check_fraction("cumulative", keep)

    def rank(spectrum: Spectrum) -> int:
        return _first_reaching(tuple(accumulate(spectrum.singular_values, initial=0.0)), keep)

    return _per_layer(f"cumulative={spell(keep)}", spectra, rank, limits)


def sigma_ratio(spectra: Sequence[Spectrum], ratio: float, *, limits: Limits = NO_LIMITS) -> Ranks:
    """Per layer the components with σ_i ≥ σ_1 / ratio (kohya's sv_ratio). `ratio` is at least 1."""
    if not ratio >= 1:
        raise RankError(f"sigma-ratio={spell(ratio)} is not possible: it is σ_1/σ_k, at least 1")

    def rank(spectrum: Spectrum) -> int:
        return sum(value * ratio >= spectrum.singular_values[0] for value in spectrum.singular_values)

    return _per_layer(f"sigma-ratio={spell(ratio)}", spectra, rank, limits)


def stable_rank(spectra: Sequence[Spectrum], times: float = 1.0, *, limits: Limits = NO_LIMITS) -> Ranks:
    """Per layer ⌈times · ‖ΔW‖_F² / σ_1²⌉: the stable rank (Rudelson & Vershynin, 2007)."""
    _check_positive("stable-rank", times)
    return _per_layer(
        f"stable-rank={spell(times)}", spectra, lambda s: _ceil(times * s.energy / s.singular_values[0] ** 2), limits
    )


def effective_rank(spectra: Sequence[Spectrum], times: float = 1.0, *, limits: Limits = NO_LIMITS) -> Ranks:
    """Per layer ⌈times · exp(H(p))⌉, p = σ/Σσ, H the entropy: the effective rank (Roy & Vetterli, 2007)."""
    _check_positive("effective-rank", times)
    return _per_layer(f"effective-rank={spell(times)}", spectra, lambda s: _ceil(times * s.effective_rank), limits)


def optimal_threshold(spectra: Sequence[Spectrum], times: float = 1.0, *, limits: Limits = NO_LIMITS) -> Ranks:
    """Per layer the components with σ > times · 2.858 · median(σ) (Gavish & Donoho, 2014, unknown noise).

    2.858 is ω(1), the coefficient of a square matrix. Theirs is the median of all σ of a matrix in noise, of which
    none is zero. Those of an update beyond the rank of its r×r core are zero whatever the noise, and would make the
    threshold zero: the core is the matrix, and the median is that of its non-zero σ. An adapter is no signal in
    white noise, so take it as a convention of the field.
    """
    _check_positive("optimal-threshold", times)

    def rank(spectrum: Spectrum) -> int:
        threshold = times * 2.858 * median(value for value in spectrum.singular_values if value > 0)
        return sum(value > threshold for value in spectrum.singular_values)

    return _per_layer(f"optimal-threshold={spell(times)}", spectra, rank, limits)


def knee(spectra: Sequence[Spectrum], times: float = 1.0, *, limits: Limits = NO_LIMITS) -> Ranks:
    """Per layer ⌈times · the k at which V(k) is farthest above its chord⌉ (Kneedle: Satopää et al., 2011)."""
    _check_positive("knee", times)

    def rank(spectrum: Spectrum) -> int:
        sums, count = spectrum.cumulative_energy, len(spectrum.singular_values)
        rises = [total / sums[-1] - k / count for k, total in enumerate(sums)]
        return _ceil(times * rises.index(max(rises)))

    return _per_layer(f"knee={spell(times)}", spectra, rank, limits)


def para_rank(spectra: Sequence[Spectrum], fraction: float, *, limits: Limits = NO_LIMITS) -> Ranks:
    """PARA's rank budget: the ⌈γ · Σ ranks⌉ largest components of all layers pooled (arXiv 2604.27796).

    One global threshold over σ; a layer may fall to rank 0 and is then left out of the adapter.
    Equal σ are decided by name.
    """
    _check_fraction("para-rank", fraction)
    found = groups(spectra, limits)
    count = _ceil(fraction * sum(s.rank for s in spectra))
    ranks = most_energy(spectra, found, _one, count)
    return _planned(
        f"para-rank={spell(fraction)}", spectra, found, ranks if any(ranks) else smallest(spectra, found, _one)
    )


def para_energy(spectra: Sequence[Spectrum], keep: float, *, limits: Limits = NO_LIMITS) -> Ranks:
    """PARA's energy budget: the shortest prefix of all σ² pooled, largest first, with keep · Σ σ².

    One global threshold over σ (arXiv 2604.27796); a layer may fall to rank 0.
    """
    _check_fraction("para-energy", keep)
    found = groups(spectra, limits)
    target = keep * sum(s.energy for s in spectra)
    return _planned(f"para-energy={spell(keep)}", spectra, found, cheapest_for_energy(spectra, found, target))


def params(
    spectra: Sequence[Spectrum], budget: float, *, limits: Limits = NO_LIMITS, whole: int | None = None
) -> Ranks:
    """The components that keep most energy within a budget of parameters; a layer may fall to rank 0.

    budget
        up to 1: a fraction of the source's parameters; above: their number.
    whole
        how many the source has, where that is not what these spectra say of their ranks.

    A component costs out + in parameters and is worth σ² per parameter; never above the budget, and
    within one component of the optimum (see `lora_squeeze.budget`).
    """
    _check_positive("params", budget)
    found = groups(spectra, limits)
    if whole is None:
        whole = sum(s.rank * s.component_size for s in spectra)
    allowed = _floor(budget * whole if budget <= 1 else budget)

    def cost(spectrum: Spectrum) -> int:
        return spectrum.component_size

    floor = smallest(spectra, found, cost)
    least = sum(price_of(spectra, group, rank, cost) for rank, group in zip(floor, found, strict=True))
    if allowed < least:
        raise RankError(f"params={spell(budget)} is not possible: the smallest ranks allowed have {least} parameters")
    ranks = most_energy(spectra, found, cost, allowed)
    return _planned(f"params={spell(budget)}", spectra, found, ranks if any(ranks) else floor)


@dataclass(frozen=True)
class Cost:
    """What files cost: the bytes of one component of each layer, and the size that a plan would have."""

    component_bytes: Mapping[str, int]
    file_size: Callable[[Ranks], int]


def size(spectra: Sequence[Spectrum], budget: int, *, cost: Cost, limits: Limits = NO_LIMITS) -> Ranks:
    """The components that keep most energy in a weight file of at most `budget` bytes, header included.

    cost
        from `file_cost(adapter)`: it depends on the dtypes, the names and what else is in the file.
    """
    found = groups(spectra, limits)

    def component_bytes(spectrum: Spectrum) -> int:
        return cost.component_bytes[spectrum.name]

    def planned(ranks: Sequence[int]) -> Ranks:
        return _planned(f"size={budget}", spectra, found, ranks)

    ranks = smallest(spectra, found, component_bytes)
    if (least := cost.file_size(planned(ranks))) > budget:
        # The header holds the policy's spelling, so a budget of more digits makes a larger file.
        least = cost.file_size(_planned(f"size={least}", spectra, found, ranks))
        raise RankError(f"size={budget} is not possible: the smallest ranks allowed make a file of {least} bytes")
    # The header grows with the layers that are kept, so its size is known only with the plan.
    available = budget
    while available > 0:
        try:
            attempt = most_energy(spectra, found, component_bytes, available)
        except RankError:  # nothing fits beside the header
            break
        excess = cost.file_size(planned(attempt)) - budget if any(attempt) else 0
        if excess <= 0:
            ranks = attempt if any(attempt) else ranks
            break
        available -= excess
    return planned(
        filled(spectra, found, list(ranks), component_bytes, lambda tried: budget - cost.file_size(planned(tried)))
    )


POLICIES: dict[str, Callable[..., Ranks]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        fixed,
        variance,
        energy,
        para_rank,
        para_energy,
        params,
        size,
        sigma_ratio,
        cumulative,
        stable_rank,
        effective_rank,
        optimal_threshold,
        knee,
    )
}
_WITHOUT_VALUE = ("variance", "stable-rank", "effective-rank", "optimal-threshold", "knee")


@dataclass(frozen=True)
class Policy:
    """A policy and its value, as they are spelled: `choose` turns spectra into ranks."""

    spelling: str
    name: str
    choose: Callable[..., Ranks]
    value: float = 0.0


def parse_policy(spelling: str) -> Policy:
    """Read "NAME=VALUE" (a few policies have a default value). Raises RankError for anything else."""
    name, separator, text = (part.strip() for part in spelling.partition("="))
    if name not in POLICIES:
        raise RankError(f"unknown policy '{name}'; known are {', '.join(POLICIES)}")
    if not separator:
        if name not in _WITHOUT_VALUE:
            raise RankError(f"policy '{name}' needs a value: {name}=…")
        return Policy(name, name, POLICIES[name])
    read = {"fixed": int, "size": read_size}.get(name, float)
    try:
        value: Any = read(text)
    except (ValueError, OverflowError):
        raise RankError(f"policy '{spelling}': '{text}' is not a value that {name} can take") from None
    return Policy(spelling, name, partial(_call, POLICIES[name], value), value)


def check_policy(spelling: str) -> None:
    """Raise RankError for a policy that suits no adapter: an unknown one, or a value out of its range."""
    policy = parse_policy(spelling)
    if policy.name not in ("params", "size"):
        policy.choose([Spectrum("layer", 1, 1, 1, (1.0,))])  # too small to be asked for a budget
    else:
        _check_positive(policy.name, policy.value)


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


def _one(_spectrum: Spectrum) -> int:
    return 1


def _call(policy: Callable[..., Ranks], value: Any, spectra: Sequence[Spectrum], **options: Any) -> Ranks:
    return policy(spectra, value, **options)


def _per_layer(policy: str, spectra: Sequence[Spectrum], rank_of: Callable[[Spectrum], int], limits: Limits) -> Ranks:
    """A rule that looks at one layer at a time; a layer that is exactly zero needs one component."""
    wanted = [max(1, min(rank_of(s), s.rank)) if s.energy > 0 else 1 for s in spectra]
    return _limited(policy, spectra, wanted, limits)


def _limited(policy: str, layers: Sequence[Ranked], wanted: Sequence[int], limits: Limits) -> Ranks:
    found = groups(layers, limits, least=1)
    return _planned(policy, layers, found, [group.round_up(max(wanted[m] for m in group.members)) for group in found])


def _planned(policy: str, layers: Sequence[Ranked], found: Sequence[Group], ranks: Sequence[int]) -> Ranks:
    by_layer: dict[str, int] = dict.fromkeys((layer.name for layer in layers), 0)
    for group, rank in zip(found, ranks, strict=True):
        for member in group.members:
            by_layer[layers[member].name] = min(rank, layers[member].rank)
    if layers and not any(by_layer.values()):
        raise RankError(f"{policy} would leave nothing of the adapter: every layer would have rank 0")
    return Ranks(policy=policy, by_layer=by_layer)


def _first_reaching(sums: Sequence[float], keep: float) -> int:
    """The first k whose sum is keep of the last; the last digits of a sum are not held against it."""
    target = keep * sums[-1] * (1 - 1e-12)
    return next(k for k, total in enumerate(sums) if total >= target)


def _ceil(value: float) -> int:
    """Rounded up, but not because of the last digits of a product."""
    return math.ceil(value * (1 - 1e-9))


def _floor(value: float) -> int:
    """Rounded down, but not because of the last digits of a product: 0.57 · 100 is 57, and no larger budget."""
    return math.floor(value * (1 + 1e-14))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _check_fraction(policy: str, value: float) -> None:
    if not 0 < value <= 1:
        raise RankError(f"{policy}={spell(value)} is not possible: it is a fraction above 0 and up to 1")


def _check_positive(policy: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise RankError(f"{policy}={spell(value)} is not possible: it is above 0")

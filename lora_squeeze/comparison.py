"""All policies at equal parameters: each policy's value is set so that it just stays within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lora_squeeze.budget import Unreachable
from lora_squeeze.errors import RankError
from lora_squeeze.limits import NO_LIMITS, Limits
from lora_squeeze.policies import POLICIES, Cost, fixed, params, size
from lora_squeeze.records import Outcome, Ranks, Spectrum
from lora_squeeze.spelling import spell

__all__ = ["ENDS", "compare_policies", "outcome_of", "policies_at"]

_HALVINGS = 30
# The ends between which a policy's value is sought: from hardly anything kept to everything.
ENDS: dict[str, tuple[float, float]] = {
    "variance": (1e-6, 1.0),
    "energy": (1e-6, 1.0),
    "cumulative": (1e-6, 1.0),
    "para-rank": (1e-6, 1.0),
    "para-energy": (1e-6, 1.0),
    "sigma-ratio": (1.0, 1e12),
    "stable-rank": (1e-3, 1e3),
    "effective-rank": (1e-3, 1e3),
    "optimal-threshold": (1e9, 1e-9),
    "knee": (1e-3, 1e3),
}


def compare_policies(
    spectra: Sequence[Spectrum], fraction: float, *, cost: Cost, limits: Limits = NO_LIMITS
) -> list[Outcome]:
    """What every policy keeps with at most this fraction of the source's parameters, best first.

    Raises RankError for a fraction not above 0 and up to 1.
    """
    plans = policies_at(spectra, fraction, cost=cost, limits=limits)
    outcomes = [outcome_of(spectra, plan, cost=cost, fraction=fraction) for plan in plans]
    return sorted(outcomes, key=lambda one: -one.energy_kept)


def policies_at(spectra: Sequence[Spectrum], fraction: float, *, cost: Cost, limits: Limits = NO_LIMITS) -> list[Ranks]:
    """The plan of every policy with its value set as high as this fraction of the parameters allows.

    Policies that cannot go that low (all but the global ones keep one component a layer) are left out.
    Raises RankError for a fraction not above 0 and up to 1.
    """
    if not 0 < fraction <= 1:
        raise RankError(f"a fraction of {spell(fraction)} of the parameters is not possible: above 0 and up to 1")
    every_rank = range(1, max(s.rank for s in spectra) + 1)
    budget = math.floor(fraction * sum(s.rank * s.component_size for s in spectra))
    fixed_plans = (fixed(spectra, rank, limits=limits) for rank in every_rank)
    plans = [plan for plan in fixed_plans if _parameters(spectra, plan) <= budget][-1:]
    for name, ends in ENDS.items():
        options: dict[str, Any] = {"candidates": every_rank} if name == "variance" else {}
        plan = _largest_within(partial(_plan, name, spectra, limits=limits, **options), ends, spectra, budget)
        plans += [plan] if plan else []
    try:
        plans.append(params(spectra, fraction, limits=limits))
        same_bytes = size(spectra, cost.file_size(plans[-1]), cost=cost, limits=limits)
        plans += [same_bytes] if _parameters(spectra, same_bytes) <= budget else []
    except RankError:
        pass  # not even the smallest ranks allowed fit
    return plans


def _plan(name: str, spectra: Sequence[Spectrum], value: float, **options: Any) -> Ranks:
    return POLICIES[name](spectra, value, **options)


def outcome_of(spectra: Sequence[Spectrum], ranks: Ranks, *, cost: Cost, fraction: float | None = None) -> Outcome:
    """What a plan keeps and what it costs."""
    whole = sum(s.energy for s in spectra)
    kept = sum(s.retained_energy(ranks.by_layer[s.name]) for s in spectra)
    return Outcome(
        policy=ranks.policy,
        fraction=fraction,
        parameters=_parameters(spectra, ranks),
        source_parameters=sum(s.rank * s.component_size for s in spectra),
        energy_kept=kept / whole if whole > 0 else 1.0,
        worst_layer=min(s.retained_variance(ranks.by_layer[s.name]) for s in spectra),
        largest_rank=ranks.largest,
        layers_left_out=sum(rank == 0 for rank in ranks.by_layer.values()),
        file_bytes=cost.file_size(ranks),
    )


def _largest_within(
    plan_at: Callable[[float], Ranks], ends: tuple[float, float], spectra: Sequence[Spectrum], budget: int
) -> Ranks | None:
    """The plan with most parameters within the budget, by bisection of the value's exponent."""

    def attempt(exponent: float) -> tuple[bool, Ranks | None]:
        try:
            plan = plan_at(math.exp(exponent))
        except Unreachable:
            return False, None
        except RankError:  # nothing would be left: that is within any budget
            return True, None
        within = _parameters(spectra, plan) <= budget
        return within, plan if within else None

    low, high = (math.log(end) for end in ends)
    within, best = attempt(high)
    if within:
        return best
    within, best = attempt(low)
    if not within:
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        within, plan = attempt(middle)
        if within:
            low, best = middle, plan
        else:
            high = middle
    return best


def _parameters(spectra: Sequence[Spectrum], ranks: Ranks) -> int:
    return sum(s.component_size * ranks.by_layer[s.name] for s in spectra)

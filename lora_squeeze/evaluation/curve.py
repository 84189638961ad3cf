"""Quality against size: several policies at several sizes, run in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_squeeze.comparison import outcome_of, policies_at
from lora_squeeze.compression import file_cost
from lora_squeeze.decomposition import Decomposition
from lora_squeeze.errors import RankError
from lora_squeeze.evaluation.bootstrap import DRAWS
from lora_squeeze.evaluation.measure import Trial, evaluated, run, squeezed
from lora_squeeze.evaluation.scoring import metrics_for
from lora_squeeze.evaluation.subject import Contestant, Subject, loaded
from lora_squeeze.limits import NO_LIMITS, Limits
from lora_squeeze.measurements import Curve, CurvePoint
from lora_squeeze.policies import POLICIES
from lora_squeeze.records import Ranks
from lora_squeeze.spelling import percent

__all__ = ["curve"]


def curve(
    subject: Subject,
    decompositions: dict[str, Decomposition],
    trial: Trial,
    *,
    policies: Sequence[str] = ("fixed", "params"),
    fractions: Sequence[float] = (0.5, 0.25, 0.125, 0.0625, 0.03125),
    metrics: Sequence[str] = (),
    limits: Limits = NO_LIMITS,
    data: str = "",
    draws: int = DRAWS,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Curve:
    """Measure what each policy keeps of the quality at each size.

    decompositions
        name → decomposition of the same adapter, as {"": plain, "on data": calibrated}.
    policies
        by name; each gets the largest value that stays within a fraction of the parameters. A policy that
        cannot go that low is left out there.

    Plans that several policies agree on are run once. Raises RankError or DataError.
    """
    if unknown := [policy for policy in policies if policy not in POLICIES]:
        raise RankError(f"unknown policy '{unknown[0]}'; known are {', '.join(POLICIES)}")
    names = metrics_for(trial.kind, metrics)
    planned = [
        (label, fraction, plan)
        for label, found in decompositions.items()
        for fraction in fractions
        for plan in policies_at(found.spectra, fraction, cost=file_cost(found.adapter), limits=limits)
        if plan.policy.partition("=")[0] in policies
    ]
    if not planned:
        raise RankError(
            f"none of {', '.join(policies)} can go as low as {percent(max(fractions))} of the parameters; ask for more"
        )
    contestants: list[Contestant] = [loaded(subject)]
    places: dict[tuple[str, tuple[int, ...]], int] = {}
    for label, _, plan in planned:
        if _key(label, plan) not in places:
            places[_key(label, plan)] = len(contestants)
            contestants += squeezed(subject, decompositions[label], [plan])
    scores = run(subject, contestants, trial, on_batch=on_batch)
    measured = evaluated(subject, contestants, scores, names, data=data, draws=draws, seed=seed)
    points: list[CurvePoint] = []
    for label, fraction, plan in planned:
        found = decompositions[label]
        outcome = outcome_of(found.spectra, plan, cost=file_cost(found.adapter), fraction=fraction)
        own = measured.adapters[places[_key(label, plan)]]
        points.append(CurvePoint(plan.policy.partition("=")[0], label, outcome, own.metrics))
    return Curve(
        base=subject.base,
        data=data,
        examples=trial.count,
        original=measured.original,
        points=tuple(points),
        adapter_sha256=next((found.adapter.sha256() for found in decompositions.values()), ""),
    )


def _key(label: str, plan: Ranks) -> tuple[str, tuple[int, ...]]:
    return label, tuple(plan.by_layer.values())

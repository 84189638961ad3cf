"""Records of a campaign's runs → means over seeds, curves, and gains of squeezing. Numbers only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_squeeze.campaign.manifest import Manifest, RunEntry

__all__ = [
    "METRICS",
    "Mean",
    "curve",
    "family_of",
    "groups_of",
    "main_metric",
    "mean_of",
    "means_side_by_side",
    "metrics_of",
    "squeezed_against_direct",
]

# What runs are compared by, the most telling first, and whether more of it is better.
METRICS: Mapping[str, bool] = {
    "eval_accuracy": True,
    "eval_reward": True,
    "reward": True,
    "eval_rewards/accuracies": True,
    "eval_mean_token_accuracy": True,
    "eval_loss": False,
    "train_loss": False,
}


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its standard error (0 for one seed)."""

    mean: float
    error: float
    count: int


def mean_of(values: Iterable[float]) -> Mean:
    """Mean ± s.e.m.: the sample's standard deviation over √n."""
    found = list(values)
    mean = sum(found) / len(found)
    spread = sum((value - mean) ** 2 for value in found) / (len(found) - 1) if len(found) > 1 else 0.0
    return Mean(mean, math.sqrt(spread / len(found)), len(found))


def metrics_of(manifest: Manifest) -> tuple[str, ...]:
    """The metrics that any finished run has, the most telling first; the losses of GRPO say nothing."""
    found = {key for entry in manifest.runs if entry.status == "finished" for key in entry.metrics}
    if "reward" in found:
        found -= {"eval_loss", "train_loss"}
    return tuple(key for key in METRICS if key in found)


def main_metric(manifest: Manifest) -> str:
    """The most telling metric of all finished runs; "" if none has finished."""
    return next(iter(metrics_of(manifest)), "")


def groups_of(manifest: Manifest, *others: Manifest) -> dict[str, list[RunEntry]]:
    """The finished runs that a mean is taken over: those of a condition, apart where they began at several ranks.

    With `use_recommended_rank`, the first run is at the full rank and further seeds of its condition at the
    recommended one. Such conditions are called "sft (rank 8)", "sft (rank 2)".
    others
        campaigns beside which this one is to stand: what is apart there is apart here.
    """
    mixed: set[str] = set()
    for one in (manifest, *others):
        ranks = {(entry.condition, entry.source_rank) for entry in one.runs if entry.status == "finished"}
        mixed |= {condition for condition, count in Counter(name for name, _ in ranks).items() if count > 1}
    groups: dict[str, list[RunEntry]] = {}
    for condition in manifest.conditions:
        runs = [one for one in manifest.runs if one.condition == condition and one.status == "finished"]
        if condition not in mixed:
            groups[condition] = runs
            continue
        for entry in runs:
            groups.setdefault(f"{condition} (rank {entry.source_rank})", []).append(entry)
    return groups


def means_side_by_side(a: Manifest, b: Manifest, metric: str) -> list[tuple[str, Mean | None, Mean | None]]:
    """Each condition of either campaign, with its mean over seeds in both; None where nothing was measured."""
    of_a, of_b = groups_of(a, b), groups_of(b, a)

    def mean(runs: Iterable[RunEntry]) -> Mean | None:
        values = [one.metrics[metric] for one in runs if metric in one.metrics]
        return mean_of(values) if values else None

    conditions = dict.fromkeys((*of_a, *of_b))
    return [(name, mean(of_a.get(name, ())), mean(of_b.get(name, ()))) for name in conditions]


def curve(logged: Sequence[Sequence[Mapping[str, Any]]], metric: str, *, points: int) -> tuple[tuple[int, Mean], ...]:
    """A learning curve over seeds: (last step of each of so many stretches, mean ± s.e.m. of the seeds' means)."""
    last = max((int(entry["step"]) for run in logged for entry in run if metric in entry), default=0)
    found: list[tuple[int, Mean]] = []
    for number in range(points):
        start, end = last * number // points, last * (number + 1) // points
        means = [_mean_between(run, metric, start, end) for run in logged]
        if known := [one for one in means if one is not None]:
            found.append((end, mean_of(known)))
    return tuple(found)


def _mean_between(run: Sequence[Mapping[str, Any]], metric: str, start: int, end: int) -> float | None:
    values = [float(entry[metric]) for entry in run if metric in entry and start < int(entry["step"]) <= end]
    return sum(values) / len(values) if values else None


def squeezed_against_direct(
    manifest: Manifest, squeezed: Mapping[str, Mapping[str, Mapping[str, float]]], metric: str
) -> dict[tuple[int, int], Mean]:
    """(source rank, target rank) → gain of squeezing over training at the target directly, over conditions and seeds.

    squeezed
        run → target rank → its metrics after squeezing (LoRA-Squeeze, arXiv 2602.10993, figure 4).

    Runs are compared within a seed and within conditions that differ in nothing but the rank. A gain is
    positive where squeezing is better, whichever way the metric counts.
    """
    direct = {
        (family_of(entry), entry.seed, entry.rank): entry for entry in manifest.runs if entry.status == "finished"
    }
    gains: dict[tuple[int, int], list[float]] = {}
    for entry in direct.values():
        for rank, metrics in squeezed.get(entry.name, {}).items():
            other = direct.get((family_of(entry), entry.seed, int(rank)))
            if other is not None and metric in metrics and metric in other.metrics:
                gain = metrics[metric] - other.metrics[metric]
                gains.setdefault((entry.rank, int(rank)), []).append(gain if METRICS[metric] else -gain)
    return {ranks: mean_of(found) for ranks, found in sorted(gains.items())}


def family_of(entry: RunEntry) -> str:
    """A condition without its rank."""
    prefix, _, overrides = entry.condition.partition("~")
    kept = [one for one in overrides.split(",") if one and not one.startswith("lora_rank=")]
    return "~".join([prefix, *kept])

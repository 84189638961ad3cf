"""Measurements → numbers over seeds: what the page's tables and the figures show."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.in_squeeze_runs import LEAST, SEEDS, SOURCE, TARGETS, TUNED_AT, Results, Run, best_rate
from lora_squeeze.evaluation.bootstrap import estimates
from lora_squeeze.student import sign_of
from reproductions.small.adapters import TREC
from reproductions.small.experiments import BELOW, RANKS, measurement
from reproductions.small.measuring import Measurement, Result
from reproductions.small.tasks import TASKS

Done = Mapping[Measurement, Result]


@dataclass(frozen=True)
class Mean:
    """Of one number of each seed."""

    values: tuple[float, ...]

    @property
    def value(self) -> float:
        """Their mean."""
        return statistics.mean(self.values)

    @property
    def error(self) -> float:
        """The standard error of the mean; 0 if there is one seed."""
        return statistics.stdev(self.values) / len(self.values) ** 0.5 if len(self.values) > 1 else 0.0

    @property
    def sign(self) -> int:
        """1 or −1 if the 95 % interval of the mean lies above or below 0; 0: within noise, or one seed alone."""
        return sign_of(self.value, self.error, len(self.values))


def over_seeds(values: Iterable[float | None]) -> Mean | None:
    """The mean of those that there are; None if there are none."""
    found = tuple(value for value in values if value is not None)
    return Mean(found) if found else None


def differences(some: Sequence[float | None], others: Sequence[float | None]) -> Mean | None:
    """some − others, paired by seed."""
    pairs = zip(some, others, strict=True)
    return over_seeds(None if one is None or other is None else one - other for one, other in pairs)


# --- LoRA-Squeeze -------------------------------------------------------------------------------------------------


def direct(runs: Results, rank: int, rate: float) -> list[float | None]:
    """Test accuracy of direct training, by seed."""
    kind = "source" if rank == SOURCE else "direct"
    found = [runs.get(Run(kind, rank, rate, seed).key) for seed in SEEDS]
    return [None if one is None else one["test"] for one in found]


def squeezed(runs: Results, done: Done, source: int, rank: int) -> list[float | None]:
    """Test accuracy of Post-Squeeze from a source rank, at that one's own rate, by seed."""
    rate = best_rate(runs, source)
    return [of(done, Measurement(TREC, source, rate, seed, f"fixed={rank}"), "accuracy") for seed in SEEDS]


def gain(runs: Results, done: Done, source: int, rank: int) -> Mean | None:
    """Of Post-Squeeze over direct training at the target rank, each at its own rate."""
    return differences(squeezed(runs, done, source, rank), direct(runs, rank, best_rate(runs, rank)))


def gains(runs: Results, done: Done) -> dict[tuple[int, int], Mean]:
    """(source rank, target rank) → gain, where it is known."""
    pairs = [(source, rank) for source in RANKS for rank in RANKS if rank < source]
    found = {pair: gain(runs, done, *pair) for pair in pairs}
    return {pair: one for pair, one in found.items() if one is not None}


def tuned(found: Mapping[tuple[int, int], Mean]) -> dict[tuple[int, int], Mean]:
    """Those over direct training at a rate that was tuned at that very rank, not at a neighbour."""
    return {(source, rank): one for (source, rank), one in found.items() if TUNED_AT[rank] == rank}


def annealed(runs: Results) -> dict[int, Mean]:
    """Rank → In-Squeeze Minimum over direct training there at its own rate."""
    high, found = best_rate(runs, SOURCE), dict[int, Mean]()
    for rank in sorted(TARGETS):
        minimum = [runs.get(Run("in-squeeze", rank, high, seed, f"minimum={LEAST}").key) for seed in SEEDS]
        scores = [None if one is None else one["test"] for one in minimum]
        change = differences(scores, direct(runs, rank, best_rate(runs, rank)))
        found |= {rank: change} if change else {}
    return found


@dataclass(frozen=True)
class Routes:
    """Another route against `gram` at one rank: over the seeds, answers that differ, and by how much a loss at most."""

    accuracy: Mean
    differing: int
    answers: int
    largest: float


def routes(runs: Results, done: Done, route: str) -> dict[int, Routes]:
    """By target rank."""
    found: dict[int, Routes] = {}
    for rank in BELOW:
        plain = [measurement(runs, seed, f"fixed={rank}") for seed in SEEDS]
        pairs = [
            (done[one], done[replace(one, route=route)])
            for one in plain
            if {one, replace(one, route=route)} <= done.keys()
        ]
        if pairs:
            found[rank] = Routes(
                Mean(tuple(other["accuracy"] - one["accuracy"] for one, other in pairs)),
                sum(a != b for one, other in pairs for a, b in zip(one["predicted"], other["predicted"], strict=True)),
                sum(len(one["predicted"]) for one, _ in pairs),
                max(abs(a - b) for one, other in pairs for a, b in zip(one["losses"], other["losses"], strict=True)),
            )
    return found


# --- retention ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """One task at one rank.

    retention
        V(k), the mean over layers (LoRA-Squeeze, appendix F). energy: of all layers together.
    lost
        accuracy as trained − accuracy. share: of what the adapter is better than the most frequent class.
    """

    retention: Mean
    energy: Mean
    accuracy: Mean
    lost: Mean
    share: float


def retention(runs: Results, done: Done) -> dict[str, dict[int, Kept]]:
    """Task → rank → what is kept; tasks that have been measured."""
    found: dict[str, dict[int, Kept]] = {}
    for task in TASKS:
        for rank in BELOW:
            whole = [measurement(runs, seed, "", task=task) for seed in SEEDS]
            pairs = [
                (done[one], done[replace(one, policy=f"fixed={rank}")])
                for one in whole
                if {one, replace(one, policy=f"fixed={rank}")} <= done.keys()
            ]
            if not pairs:
                continue
            lost = Mean(tuple(one["accuracy"] - other["accuracy"] for one, other in pairs))
            above = statistics.mean(one["accuracy"] - one["majority"] for one, _ in pairs)
            found.setdefault(task, {})[rank] = Kept(
                Mean(tuple(other["retention"] for _, other in pairs)),
                Mean(tuple(other["energy_kept"] for _, other in pairs)),
                Mean(tuple(other["accuracy"] for _, other in pairs)),
                lost,
                lost.value / above if above > 0 else 0.0,
            )
    return found


def as_trained(runs: Results, done: Done, task: str) -> Mean | None:
    """Accuracy at rank 64."""
    return over_seeds(of(done, measurement(runs, seed, "", task=task), "accuracy") for seed in SEEDS)


def rank_correlation(some: Sequence[float], others: Sequence[float]) -> float:
    """Spearman's, ties sharing their places."""
    return statistics.correlation(_places(some), _places(others))


def _places(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


# --- policies and calibration -------------------------------------------------------------------------------------


def by_seed(runs: Results, done: Done, policy: str, what: str, **how: str) -> list[float | None]:
    """One number of TREC's adapters of rank 64."""
    return [of(done, measurement(runs, seed, policy, **how), what) for seed in SEEDS]


def verdicts(runs: Results, done: Done, policy: str, moments: str) -> list[str]:
    """Of each seed: what the paired bootstrap over texts says of the loss in the metric of data, against without."""
    found: list[str] = []
    for seed in SEEDS:
        pair = [done.get(measurement(runs, seed, policy, moments=one)) for one in ("", moments)]
        if all(pair):
            scores = [{"loss": _column(one["losses"])} for one in pair if one]
            found.append(estimates(scores, ["loss"])[1]["loss"].verdict)
    return found


def _column(losses: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor(losses, dtype=torch.float64)
    return values, torch.ones_like(values)


def of(done: Done, one: Measurement, what: str) -> Any:
    """One number of a measurement; None if it has not been made."""
    return done[one][what] if one in done else None

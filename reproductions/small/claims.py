"""What the papers claim, and what is found here: a verdict for each, from the numbers alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection

from benchmarks.in_squeeze_runs import SOURCE, Results, best_rate
from reproductions.small import findings
from reproductions.small.experiments import BELOW, SIZES, sized
from reproductions.small.findings import Done, Kept, Mean
from reproductions.small.tasks import TASKS
from reproductions.small.wording import count, points

Claim = tuple[str, str, str]  # what is claimed, what is found, the verdict


def claims(runs: Results, done: Done) -> list[Claim]:
    """Those that have been measured."""
    high = best_rate(runs, SOURCE)
    same: dict[int, Mean] = {}
    for rank in BELOW:
        change = findings.differences(findings.squeezed(runs, done, SOURCE, rank), findings.direct(runs, rank, high))
        same |= {rank: change} if change else {}
    gains = findings.gains(runs, done)
    kept = findings.retention(runs, done)
    found = [
        _better(
            "Tuned at the highest rank alone, Post-Squeeze beats direct training at every lower rank (Figure 3)", same
        )
        if same
        else None,
        _gains(gains) if gains else None,
        _extreme(runs, done),
        _annealing(runs),
        _routes(runs, done),
        _halving(kept),
        _prediction(kept),
        _para(runs, done),
        _global_threshold(runs, done),
    ]
    return [one for one in found if one]


def _gains(found: dict[tuple[int, int], Mean]) -> Claim:
    """Judged where direct training has the rate that is best for it: else a gain may be the rate's."""
    claim = "With every rank at its own rate, Post-Squeeze gains a few tenths of a point (Figure 4)"
    tuned = findings.tuned(found)
    if not tuned:
        return _better(claim, found)
    _, text, _ = _better(claim, found)
    return claim, f"{text}; over ranks whose rate was tuned there: {count(tuned.values())}", verdict(tuned.values())


def _better(claim: str, found: dict[int, Mean] | dict[tuple[int, int], Mean]) -> Claim:
    best = max(one.value for one in found.values())
    worst = min(one.value for one in found.values())
    text = f"{count(found.values())}; from {100 * worst:+.1f} to {100 * best:+.1f} points"
    return claim, text, verdict(found.values())


def _extreme(runs: Results, done: Done) -> Claim | None:
    whole = findings.direct(runs, SOURCE, best_rate(runs, SOURCE))
    lost = findings.differences(findings.squeezed(runs, done, SOURCE, 1), whole)
    if not lost:
        return None
    lower = sum(value < 0 for value in lost.values)
    text = f"{SOURCE} → 1: {points(lost)} points against rank {SOURCE}, lower in {lower} of {len(lost.values)} seeds"
    return "An extreme gap collapses: 128 → 1 loses 12.8 points at 4B, 29.6 at 1B", text, verdict([lost], better=-1)


def _annealing(runs: Results) -> Claim | None:
    """The best of the paper's methods at rank 1 against direct training, at rank 1 and above."""
    found = findings.annealed(runs)
    if not found:
        return None
    each = ", ".join(f"{points(one)} at rank {rank}" for rank, one in found.items())
    return (
        "In-Squeeze Minimum beats direct training, at rank 1 by four tenths of a point",
        f"{each}, against direct training at its own rate: {count(found.values())}",
        verdict(found.values()),
    )


def _routes(runs: Results, done: Done) -> Claim | None:
    found = findings.routes(runs, done, "randomized")
    if not found:
        return None
    differing, answers = (
        sum(one) for one in zip(*((one.differing, one.answers) for one in found.values()), strict=True)
    )
    largest = max(abs(one.accuracy.value) for one in found.values())
    text = f"{differing} of {answers:,} answers differ; accuracy by {100 * largest:.2f} points at most"
    return (
        "The memory-efficient and the standard variant do not differ (Figure 5)",
        text,
        "confirmed" if differing <= answers / 1000 else "not confirmed",
    )


def _halving(kept: dict[str, dict[int, Kept]]) -> Claim | None:
    halved = [by_rank[32].retention.value for by_rank in kept.values() if 32 in by_rank]
    if not halved:
        return None
    text = f"{SOURCE} → 32 keeps {min(halved):.1%} to {max(halved):.1%} over {len(halved)} tasks"
    return (
        "Halving the rank keeps about 96 % of the variance (of rank 128) or 94 % (of 32) on every task",
        text,
        "confirmed" if min(halved) >= 0.94 else "not confirmed",
    )


def _prediction(kept: dict[str, dict[int, Kept]]) -> Claim | None:
    complete = {task: one[1] for task, one in kept.items() if 1 in one}
    if len(complete) < 4:
        return None
    found = correlation([one.retention.value for one in complete.values()], [one.share for one in complete.values()])
    least = min(complete, key=lambda task: complete[task].retention.value)
    most = max(complete, key=lambda task: complete[task].share)
    text = (
        f"{SOURCE} → 1, {len(complete)} tasks: rank correlation of retention and share of the gain lost {found:+.2f}; "
        f"lowest retention: {TASKS[least].title}; largest loss: {TASKS[most].title}"
    )
    return "The tasks that keep least are those that collapse at rank 1 (Figures 6 and 7)", text, correlated(found)


def correlated(found: float) -> str:
    """Whether low retention goes with a large loss; six tasks give 0.83 by chance once in twenty, either side."""
    return "confirmed" if found <= -0.83 else "not confirmed" if found >= 0.83 else "within noise"


def correlation(some: list[float], others: list[float]) -> float:
    """Spearman's; 0 where one side is all the same."""
    try:
        return findings.rank_correlation(some, others)
    except statistics.StatisticsError:
        return 0.0


def _para(runs: Results, done: Done) -> Claim | None:
    whole = findings.by_seed(runs, done, "", "accuracy")
    found = {
        size: findings.differences(findings.by_seed(runs, done, sized("para-rank", size), "accuracy"), whole)
        for size in SIZES[1:]
    }
    lost = {size: one for size, one in found.items() if one}
    if not lost:
        return None
    above = {size: Mean(tuple(value + 0.01 for value in one.values)) for size, one in lost.items()}
    text = "; ".join(
        f"{points(one)} points at {size:.0%}, which is {LIMIT[above[size].sign]}" for size, one in lost.items()
    )
    return "PARA: 75 to 90 % fewer parameters at less than 1 % of accuracy", text, verdict(above.values())


LIMIT = {1: "less than 1", -1: "more than 1", 0: "within noise of 1"}


def _global_threshold(runs: Results, done: Done) -> Claim | None:
    found: dict[float, Mean] = {}
    for size in SIZES:
        pair = (findings.by_seed(runs, done, sized(policy, size), "accuracy") for policy in ("para-rank", "fixed"))
        change = findings.differences(*pair)
        found |= {size: change} if change else {}
    if not found:
        return None
    text = ", ".join(f"{points(one)} points at {size:.0%}" for size, one in found.items())
    return (
        "PARA: ranks by one threshold over all layers beat one rank for all, at equal parameters",
        text,
        verdict(found.values()),
    )


def verdict(found: Collection[Mean], *, better: int = 1) -> str:
    """Confirmed if all are better, not if any is worse; of one seed nothing is known."""
    if all(len(one.values) < 2 for one in found):
        return "one seed"
    signs = Counter(better * one.sign for one in found)
    if signs[1] == len(found):
        return "confirmed"
    if signs[-1]:
        return "not confirmed"
    return "within noise" if not signs[1] else "in part"

"""What the papers claim, and what is found here: a verdict for each, from the numbers alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection

from benchmarks.in_squeeze_runs import LEAST, SEEDS, SOURCE, Results, Run, best_rate
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
        _better("With every rank at its own rate, Post-Squeeze gains a few tenths of a point (Figure 4)", gains)
        if gains
        else None,
        _extreme(runs, done),
        _annealing(runs),
        _routes(runs, done),
        _halving(kept),
        _prediction(kept),
        _para(runs, done),
        _global_threshold(runs, done),
    ]
    return [one for one in found if one]


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
    text = f"{SOURCE} → 1: {points(lost)} points against rank {SOURCE}"
    return "An extreme gap collapses: 128 → 1 loses 12.8 points at 4B, 29.6 at 1B", text, verdict([lost], better=-1)


def _annealing(runs: Results) -> Claim | None:
    """The best of the paper's methods at rank 1 against direct training there."""
    high, own = best_rate(runs, SOURCE), findings.direct(runs, 1, best_rate(runs, 1))
    minimum = [runs.get(Run("in-squeeze", 1, high, seed, f"minimum={LEAST}").key) for seed in SEEDS]
    change = findings.differences([None if one is None else one["test"] for one in minimum], own)
    if not change:
        return None
    text = f"In-Squeeze Minimum {points(change)} points against direct training at rank 1, its own rate"
    return "In-Squeeze to rank 1 beats direct training there, by four tenths of a point", text, verdict([change])


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
    verdict = "confirmed" if found <= -0.83 else "not confirmed" if found >= 0 else "within noise"
    return "The tasks that keep least are those that collapse at rank 1 (Figures 6 and 7)", text, verdict


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
    text = ", ".join(f"{points(one)} points at {size:.0%}" for size, one in lost.items())
    fine = all(one.value >= -0.01 for one in lost.values())
    return (
        "PARA: 75 to 90 % fewer parameters at less than 1 % of accuracy",
        text,
        "confirmed" if fine else "not confirmed",
    )


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

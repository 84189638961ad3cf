"""Which measurements there are to be made: first those that tune the rates, then one seed after the other."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.in_squeeze_runs import SEEDS
from reproductions.vision.measuring import Done, Measurement
from reproductions.vision.training import CONT, SOURCE

BELOW = (32, 16, 8, 4, 2, 1)
DIRECT = (8, 1)  # ranks that are trained directly, too
RATES = {64: (2.5e-4, 5e-4, 1e-3), 8: (5e-4, 1e-3, 2e-3), 1: (1e-3, 2e-3, 4e-3)}  # tried at these ranks


def tuning(rank: int) -> Iterator[Measurement]:
    """On the validation part alone, with seed 0."""
    for rate in RATES[rank]:
        yield Measurement("direct", rank, rate, 0, split="validation")


def best_rate(done: Done, rank: int) -> float | None:
    """By accuracy on the validation part; None if it has not been tuned yet. The test has no say in it."""
    tried = {one.rate: done[one]["accuracy"] for one in tuning(rank) if one in done}
    return max(tried, key=lambda rate: tried[rate]) if len(tried) == len(RATES[rank]) else None


def planned(done: Done) -> list[Measurement]:
    """All that can be made by now: rates have to be tuned before the rest."""
    found = list(tuning(SOURCE))
    high = best_rate(done, SOURCE)
    if high is None:
        return found
    found.append(Measurement("none", 0, 0.0, 0))
    for seed in SEEDS:
        found += [Measurement("direct", SOURCE, high, seed, to) for to in (0, *BELOW)]
        found += [Measurement("direct", rank, high, seed) for rank in DIRECT]
        found += [Measurement(f"{kind}-squeeze", CONT, high, seed) for kind in ("cont", "in")]
    for rank in reversed(DIRECT):
        found += tuning(rank)
        if own := best_rate(done, rank):
            found += [Measurement("direct", rank, own, seed) for seed in SEEDS]
    return list(dict.fromkeys(found))

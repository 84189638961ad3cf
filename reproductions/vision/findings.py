"""Measurements → numbers over seeds: what the page's tables and the figure show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.in_squeeze_runs import SEEDS
from reproductions.small.findings import Mean, differences, over_seeds
from reproductions.vision.experiments import best_rate
from reproductions.vision.measuring import Done, Measurement
from reproductions.vision.training import CONT, SOURCE

Values = Sequence[float | None]  # one of each seed; None: not measured


def post(done: Done, to: int, what: str = "accuracy") -> Values:
    """Of Post-Squeeze from rank 64 to another; to rank 64 itself: as trained."""
    return direct(done, SOURCE, best_rate(done, SOURCE), what, to=0 if to == SOURCE else to)


def direct(done: Done, rank: int, rate: float | None, what: str = "accuracy", *, to: int = 0) -> Values:
    """Of training at a rank; nothing if its rate has not been tuned."""
    return [_of(done, None if rate is None else Measurement("direct", rank, rate, seed, to), what) for seed in SEEDS]


def annealed(done: Done, kind: str, what: str = "accuracy") -> Values:
    """Of In- or Cont-Squeeze from rank 64 to 1, at the rate of rank 64."""
    rate = best_rate(done, SOURCE)
    return [_of(done, None if rate is None else Measurement(kind, CONT, rate, seed), what) for seed in SEEDS]


def brought(done: Done, rank: int) -> Mean | None:
    """Accuracy with the images minus accuracy with a grey one, of Post-Squeeze."""
    return differences(post(done, rank), post(done, rank, "ablated"))


def alone(done: Done, what: str) -> float | None:
    """A number of the model without any LoRA, or of the data, which is the same for every seed."""
    return _of(done, Measurement("none", 0, 0.0, 0), what)


def retained(done: Done, rank: int) -> Mean | None:
    """Retained variance, the mean of the layers."""
    return Mean((1.0,)) if rank == SOURCE else over_seeds(post(done, rank, "retention"))


def _of(done: Done, one: Measurement | None, what: str) -> Any:
    return done[one].get(what) if one is not None and one in done else None

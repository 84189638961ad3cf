"""Which measurements each experiment takes of one seed, the most telling experiments first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.in_squeeze_runs import SEEDS, SOURCE, Results, best_rate
from reproductions.small.adapters import TREC
from reproductions.small.measuring import GRADIENTS, OUTPUTS, Measurement
from reproductions.small.tasks import TASKS

RANKS = (64, 32, 16, 8, 4, 2, 1)
BELOW = RANKS[1:]
SIZES = (0.5, 0.25, 0.1)  # PARA: of the parameters
POLICIES = ("para-rank", "para-energy", "params", "fixed")
SMALL_SIZES = {16: 0.25, 8: 0.125, 4: 0.0625, 2: 0.03125}  # calibration: one rank for all, and as many parameters


def measurement(results: Results, seed: int, policy: str, **how: str) -> Measurement:
    """Of an adapter of rank 64 at the rate that was the best one there on TREC's 50 classes."""
    return Measurement(**{"task": TREC, **how}, rank=SOURCE, rate=best_rate(results, SOURCE), seed=seed, policy=policy)


def post_squeeze(results: Results, seed: int) -> Iterator[Measurement]:
    """From rank 64 to every lower one."""
    for policy in ("", *(f"fixed={rank}" for rank in BELOW)):
        yield measurement(results, seed, policy)


def para(results: Results, seed: int) -> Iterator[Measurement]:
    """PARA's budgets, and others with as many parameters."""
    for size in SIZES:
        for policy in POLICIES:
            yield measurement(results, seed, sized(policy, size))


def sized(policy: str, size: float) -> str:
    """A policy within a share of the parameters, as a measurement spells it."""
    return f"fixed={max(1, int(SOURCE * size))}" if policy == "fixed" else f"{policy}@{size:g}"


def retention(results: Results, seed: int) -> Iterator[Measurement]:
    """Every task's adapter, as trained and at every lower rank."""
    for task in TASKS:
        for policy in ("", *(f"fixed={rank}" for rank in BELOW)):
            yield measurement(results, seed, policy, task=task)


def calibration(results: Results, seed: int) -> Iterator[Measurement]:
    """Truncation in the metric of data, and plain truncation."""
    for moments in ("", GRADIENTS, OUTPUTS):
        for rank, size in SMALL_SIZES.items():
            for policy in (f"fixed={rank}", sized("params", size)):
                yield measurement(results, seed, policy, moments=moments)


def gains(results: Results, seed: int) -> Iterator[Measurement]:
    """From every rank that was trained directly to every lower one."""
    for place, source in enumerate(RANKS):
        for rank in RANKS[place + 1 :]:
            yield Measurement(TREC, source, best_rate(results, source), seed, f"fixed={rank}")


def routes(results: Results, seed: int) -> Iterator[Measurement]:
    """Algorithm 1 of LoRA-Squeeze, on the update itself, and Algorithm 2 by way of QR."""
    for route in ("randomized", "qr"):
        for rank in BELOW:
            yield measurement(results, seed, f"fixed={rank}", route=route)


EXPERIMENTS: dict[str, Callable[[Results, int], Iterator[Measurement]]] = {
    one.__name__: one for one in (post_squeeze, gains, routes, para, calibration, retention)
}


def planned(results: Results) -> list[Measurement]:
    """All of them, each once, one seed after the other."""
    found = (one for seed in SEEDS for experiment in EXPERIMENTS.values() for one in experiment(results, seed))
    return list(dict.fromkeys(found))

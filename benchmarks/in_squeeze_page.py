"""The measured part of docs/in-squeeze.md, from the results of the runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence

from benchmarks.in_squeeze_runs import (
    BATCH,
    CONTINUED,
    HEAD,
    LEAST,
    RATES,
    SEEDS,
    SOURCE,
    STEPS,
    TARGETS,
    TUNED_AT,
    WARMUP,
    Results,
    Run,
    best_rate,
)
from benchmarks.machine import describe, table


def mean(values: Sequence[float]) -> str:
    """In percent, with the standard error of the mean over the seeds."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.1%} (1 seed)"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1%} ± {100 * error:.1f}"


def section(results: Results) -> str:
    """The measured part of the page."""
    high = best_rate(results, SOURCE)
    rates = {rank: best_rate(results, rank) for rank in (SOURCE, *TARGETS)}
    parts = [_setting(high, rates), _comparison(results, high, rates), _times(results, high, rates)]
    parts += [_treatments(results, high)]
    parts += [_geometry(results, high), _costs(results, high)]
    return "\n\n".join(part for part in parts if part)


def scores(results: Results, make: Callable[[int], Run], branch: str = "") -> list[float]:
    found = [results.get(make(seed).key) for seed in SEEDS]
    return [(one["branches"][branch] if branch else one)["test"] for one in found if one]


def _setting(high: float, rates: dict[int, float]) -> str:
    tuned = ", ".join(f"{rates[rank]:g} at rank {rank}" for rank in sorted(RATES))
    borrowed = ", ".join(f"rank {rank} that of {at}" for rank, at in TUNED_AT.items() if rank in TARGETS and rank != at)
    tried = "; ".join(f"{', '.join(f'{rate:g}' for rate in some)} at rank {rank}" for rank, some in RATES.items())
    return (
        f"all-MiniLM-L6-v2 on TREC's 50 fine classes, all linear layers adapted, {STEPS} steps of {BATCH} questions "
        f"for every run, AdamW, {WARMUP} steps of warm-up and then a constant rate ({HEAD:g} for the new head), "
        f"three seeds; {describe()}. Learning rates tried: {tried}; best on the validation split with seed 0: "
        f"{tuned}; not tuned itself: {borrowed}. Cont-Squeeze: {STEPS - CONTINUED} steps at rank {SOURCE} and "
        f"{CONTINUED} at the lower rank's own rate, {CONTINUED // 4} of them warm-up. In-Squeeze halves from rank "
        f"{SOURCE} at the rate of rank {SOURCE} ({high:g}); every stage of Minimum Steps has at least {LEAST} steps."
    )


Method = tuple[str, Callable[[int], Callable[[int], Run]], str]  # name, rank → seed → run, branch of that run


def _methods(high: float, rates: dict[int, float]) -> list[Method]:
    return [
        ("direct, its own rate", lambda rank: lambda seed: Run("direct", rank, rates[rank], seed), ""),
        (f"direct, rank {SOURCE}'s rate", lambda rank: lambda seed: Run("direct", rank, high, seed), ""),
        ("Post-Squeeze", lambda _: lambda seed: Run("source", SOURCE, high, seed), "post"),
        ("Cont-Squeeze", lambda _: lambda seed: Run("source", SOURCE, high, seed), "cont"),
        ("In-Squeeze Standard", lambda rank: lambda seed: Run("in-squeeze", rank, high, seed, "standard"), ""),
        ("In-Squeeze Minimum", lambda rank: lambda seed: Run("in-squeeze", rank, high, seed, f"minimum={LEAST}"), ""),
    ]


def _comparison(results: Results, high: float, rates: dict[int, float]) -> str:
    rows: list[list[str]] = []
    for name, make, branch in _methods(high, rates):
        cells = [mean(scores(results, make(rank), f"{branch} {rank}" if branch else "")) for rank in TARGETS]
        rows.append([name, *cells])
    full = mean(scores(results, lambda seed: Run("source", SOURCE, high, seed)))
    return f"Test accuracy, mean ± standard error over the seeds; at rank {SOURCE} it is {full}.\n\n" + table(
        ["", *(f"rank {rank}" for rank in TARGETS)], rows
    )


def _times(results: Results, high: float, rates: dict[int, float]) -> str:
    rows: list[list[str]] = []
    for name, make, branch in _methods(high, rates):
        cells: list[str] = []
        for rank in TARGETS:
            found = [results.get(make(rank)(seed).key) for seed in SEEDS]
            times = [(one["branches"][f"{branch} {rank}"] if branch else one)["cpu_seconds"] for one in found if one]
            cells.append(f"{statistics.mean(times):.0f} s" if times else "–")
        rows.append([name, *cells])
    return (
        "CPU time of the training, switches included, mean over the seeds; other work went on beside it, which alone "
        "makes a tenth of difference:\n\n" + table(["", *(f"rank {rank}" for rank in TARGETS)], rows)
    )


def _treatments(results: Results, high: float) -> str:
    rows: list[list[str]] = []
    for name, options in (
        ("as above: state transported, balance kept, rate continued", {}),
        ("state reset at every switch", {"state": "reset"}),
        ("factors balanced at every switch", {"balance": "balanced"}),
        ("each rank's own rate", {"per_rank": True}),
    ):
        make = lambda rank, o: lambda seed: Run("in-squeeze", rank, high, seed, f"minimum={LEAST}", **o)  # noqa: E731
        rows.append([name, *(mean(scores(results, make(rank, options))) for rank in (1, 8))])
    return "In-Squeeze Minimum, treated differently:\n\n" + table(["", "to rank 1", "to rank 8"], rows)


def _geometry(results: Results, high: float) -> str:
    found = results.get(Run("geometry", SOURCE, high).key)
    if found is None:
        return ""
    rows: list[list[str]] = []
    for optimizer in ("adamw", "sgd"):
        for balance in ("keep", "balanced"):
            for state in ("transport", "reset"):
                one = found[f"{optimizer} {balance} {state}"]
                way = [f"{one['off']:.3f}", f"{one['length']:.2f}", f"{one['validation']:.1%}"]
                rows.append([optimizer, balance, state, *way])
        rows.append([optimizer, "–", "no switch", "0", "1", f"{found[f'{optimizer} unswitched']['validation']:.1%}"])
    down, up = found["adamw sizes"]
    return (
        "A switch at rank 64 that drops nothing, after 40 steps: how far off the unswitched way the update is 20 steps "
        "later, how long its own way is (both relative to the unswitched way), and the validation accuracy then. The "
        f"median ‖A‖ and ‖B‖ of the layers before it are {down:.2f} and {up:.2f} (AdamW).\n\n"
        + table(["optimizer", "balance", "state", "off its way", "length", "validation"], rows)
    )


def _costs(results: Results, high: float) -> str:
    rows: list[list[str]] = []
    for rank in (64, 32, 8, 1):
        one = results.get(Run("cost", rank, high).key)
        if one:
            rows.append([
                str(rank), f"{one['step_cpu_seconds'] * 1000:.0f} ms", f"{one['peak_mib']:.0f} MiB",
                f"{one['training_state_mib']:.1f} MiB",
            ])  # fmt: skip
    annealed = [
        one
        for key, one in results.items()
        if json.loads(key)["kind"] == "in-squeeze" and one["switching_cpu_seconds"] > 0
    ]
    if not rows or not annealed:
        return ""
    share = [one["switching_cpu_seconds"] / one["cpu_seconds"] for one in annealed]
    each = [one["switching_cpu_seconds"] for one in annealed]
    return (
        "CPU time of a step (the least of 15, the widest batch), the process's peak memory, and what of it are "
        "factors, gradients and Adam's moments:\n\n"
        + table(["rank", "step", "peak", "factors and their state"], rows)
        + f"\n\nAll switches of a run together took {statistics.median(each):.2f} s of CPU time (median of "
        f"{len(share)} runs), {statistics.median(share):.2%} of its training; they depend neither on the batch nor "
        "on the number of steps."
    )

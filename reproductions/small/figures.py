"""The figures of the page, as PNG. Colours are the Okabe-Ito palette and a map from orange to violet: both can be told
apart by people who are colour-blind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.in_squeeze_page import scores
from benchmarks.in_squeeze_runs import LEAST, SOURCE, TARGETS, Results, Run, best_rate
from reproductions.small import findings
from reproductions.small.experiments import BELOW, POLICIES, RANKS, SIZES, SMALL_SIZES, sized
from reproductions.small.findings import Done, Mean
from reproductions.small.measuring import GRADIENTS, OUTPUTS
from reproductions.small.tasks import TASKS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e7ea",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 130,
    "font.size": 9,
}

Line = tuple[str, dict[float, Mean]]


def draw(runs: Results, done: Done, folder: Path) -> list[Path]:
    """Draw what there are measurements for."""
    drawn: list[Path] = []
    for name, (size, plot) in FIGURES.items():
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=size, layout="constrained")
            if plot(figure, runs, done):
                drawn.append(folder / f"{name}.png")
                figure.savefig(drawn[-1], metadata={"Software": "lora-squeeze"})
    return drawn


def _gains(figure: Figure, runs: Results, done: Done) -> bool:
    found = findings.gains(runs, done)
    if not found:
        return False
    axes = figure.add_subplot()
    sources, targets = RANKS[:-1], BELOW[::-1]
    cells = [[100 * found[s, t].value if (s, t) in found else float("nan") for t in targets] for s in sources]
    most = max(abs(100 * one.value) for one in found.values())
    image = axes.imshow(cells, cmap="PuOr", vmin=-most, vmax=most, aspect="auto")
    for (source, target), one in found.items():
        text = f"{100 * one.value:+.1f}\n± {100 * one.error:.1f}"
        dark = abs(100 * one.value) > 0.6 * most
        place = targets.index(target), sources.index(source)
        axes.text(*place, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(targets)), [str(rank) for rank in targets])
    axes.set_yticks(range(len(sources)), [str(rank) for rank in sources])
    axes.set(xlabel="target rank", ylabel="source rank", title="Post-Squeeze − direct training, points of accuracy")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return True


def _rates(figure: Figure, runs: Results, done: Done) -> bool:
    high = best_rate(runs, SOURCE)
    lines = [
        ("Post-Squeeze from 64", _over(BELOW, lambda rank: findings.squeezed(runs, done, SOURCE, rank))),
        (f"direct, rank 64's rate ({high:g})", _over(RANKS, lambda rank: findings.direct(runs, rank, high))),
        ("direct, each rank's own rate", _over(RANKS, lambda rank: findings.direct(runs, rank, best_rate(runs, rank)))),
    ]
    return _accuracy_by_rank(figure, lines, "The rate tuned at rank 64 alone")


def _methods(figure: Figure, runs: Results, done: Done) -> bool:
    high = best_rate(runs, SOURCE)

    def direct(rank: int, seed: int) -> Run:
        return Run("direct", rank, best_rate(runs, rank), seed)

    def source(seed: int) -> Run:
        return Run("source", SOURCE, high, seed)

    lines = [
        ("direct, own rate", _found(lambda rank: scores(runs, partial(direct, rank)))),
        ("Post-Squeeze", _found(lambda rank: scores(runs, source, f"post {rank}"))),
        ("Cont-Squeeze", _found(lambda rank: scores(runs, source, f"cont {rank}"))),
        ("In-Squeeze Standard", _found(lambda rank: _annealed(runs, rank, high, "standard"))),
        ("In-Squeeze Minimum", _found(lambda rank: _annealed(runs, rank, high, f"minimum={LEAST}"))),
    ]
    return _accuracy_by_rank(figure, lines, "At equal steps", TARGETS)


def _annealed(runs: Results, rank: int, rate: float, schedule: str) -> list[float]:
    return scores(runs, lambda seed: Run("in-squeeze", rank, rate, seed, schedule))


def _found(values: Callable[[int], list[float]]) -> dict[float, Mean]:
    return {rank: Mean(tuple(found)) for rank in TARGETS if (found := values(rank))}


def _over(ranks: tuple[int, ...], values: Callable[[int], list[float | None]]) -> dict[float, Mean]:
    found = {rank: findings.over_seeds(values(rank)) for rank in ranks}
    return {rank: one for rank, one in found.items() if one is not None}


def _accuracy_by_rank(figure: Figure, lines: list[Line], title: str, ranks: Sequence[int] = RANKS) -> bool:
    axes = figure.add_subplot()
    _lines(axes, lines, percent=True)
    _ranks(axes, ranks)
    axes.set(ylabel="test accuracy, %", title=title)
    axes.legend()
    return any(line for _, line in lines)


def _routes(figure: Figure, runs: Results, done: Done) -> bool:
    found = {route: findings.routes(runs, done, route) for route in ("randomized", "qr")}
    axes = figure.add_subplot()
    names = {"randomized": "Algorithm 1 (`randomized`)", "qr": "Algorithm 2 by QR (`qr`)"}
    lines: list[Line] = [
        (names[route], {rank: one.accuracy for rank, one in by_rank.items()}) for route, by_rank in found.items()
    ]
    _lines(axes, lines, percent=True)
    _ranks(axes, BELOW)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(-1, 1)
    axes.set(ylabel="accuracy − that of `gram`, points", title="Ways to compute the same truncation")
    axes.legend()
    return any(found.values())


def _retention(figure: Figure, runs: Results, done: Done) -> bool:
    found = findings.retention(runs, done)
    left, right = figure.subplots(1, 2)
    for task, colour, marker in zip(TASKS, COLOURS, MARKERS, strict=False):
        if task in found:
            kept = found[task]
            shares = [100 * one.retention.value for one in kept.values()]
            style = {"color": colour, "marker": marker, "markersize": 4, "label": TASKS[task].title}
            left.plot(list(kept), shares, **style)
            errors = [100 * one.lost.error for one in kept.values()]
            right.errorbar(shares, [100 * one.lost.value for one in kept.values()], errors, capsize=2, **style)
    _ranks(left, BELOW)
    left.set(ylabel="retained variance, mean of the layers, %", title="Retention")
    right.set(xlabel="retained variance, %", ylabel="points of accuracy lost", title="What it says of the loss")
    right.invert_xaxis()
    right.legend(fontsize=8)
    return bool(found)


def _para(figure: Figure, runs: Results, done: Done) -> bool:
    drawn = False
    for axes, what in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        lines: list[Line] = []
        for policy in POLICIES:
            by_size = {size: findings.by_seed(runs, done, sized(policy, size), what) for size in SIZES}
            means = {100 * size: findings.over_seeds(values) for size, values in by_size.items()}
            lines.append((policy, {size: one for size, one in means.items() if one}))
        _lines(axes, lines, percent=what == "accuracy")
        if whole := findings.over_seeds(findings.by_seed(runs, done, "", what)):
            value = whole.value * (100 if what == "accuracy" else 1)
            axes.axhline(value, color="black", linestyle=":", label=f"rank {SOURCE}")
        _sizes(axes, SIZES)
        axes.set(ylabel="test accuracy, %" if what == "accuracy" else "test loss, nats")
        axes.legend()
        drawn = drawn or any(line for _, line in lines)
    return drawn


def _calibration(figure: Figure, runs: Results, done: Done) -> bool:
    drawn = False
    for axes, form in zip(figure.subplots(1, 2, sharey=True), ("fixed", "params"), strict=True):
        lines: list[Line] = []
        for moments in (OUTPUTS, GRADIENTS):
            by_size: dict[float, Mean] = {}
            for rank, size in SMALL_SIZES.items():
                policy = f"fixed={rank}" if form == "fixed" else sized("params", size)
                on_data, plain = (findings.by_seed(runs, done, policy, "loss", moments=one) for one in (moments, ""))
                if found := findings.differences(on_data, plain):
                    by_size[100 * size] = found
            lines.append((f"in the metric of {moments}", by_size))
        _lines(axes, lines)
        axes.axhline(0, color="black", linewidth=0.8)
        _sizes(axes, list(SMALL_SIZES.values()))
        axes.set(title=form)
        axes.legend()
        drawn = drawn or any(line for _, line in lines)
    figure.axes[0].set_ylabel("test loss − that of plain truncation, nats")
    return drawn


def _lines(axes: Any, lines: list[Line], *, percent: bool = False) -> None:
    """A little beside one another, so that lines that agree can be told apart."""
    factor = 100 if percent else 1
    for place, (label, line) in enumerate(lines):
        beside = 1 + 0.03 * (place - (len(lines) - 1) / 2)
        values, errors = ([factor * what(one) for one in line.values()] for what in (_value, _error))
        style = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 4, "capsize": 2, "label": label}
        axes.errorbar([x * beside for x in line], values, errors, **style)


def _value(one: Mean) -> float:
    return one.value


def _error(one: Mean) -> float:
    return one.error


def _ranks(axes: Any, ranks: Sequence[int] = RANKS) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel("rank")


def _sizes(axes: Any, sizes: Sequence[float]) -> None:
    """The smallest to the right."""
    axes.set_xscale("log")
    axes.set_xlim(130 * max(sizes), 77 * min(sizes))
    axes.set_xticks([100 * size for size in sizes], [f"{100 * size:.3g} %" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("parameters")


FIGURES: dict[str, tuple[tuple[float, float], Callable[[Figure, Results, Done], bool]]] = {
    "gains": ((5.6, 4.4), _gains),
    "rates": ((5.6, 3.6), _rates),
    "methods": ((5.6, 3.6), _methods),
    "routes": ((5.6, 3.0), _routes),
    "retention": ((9.0, 3.8), _retention),
    "para": ((9.0, 3.6), _para),
    "calibration": ((9.0, 3.6), _calibration),
}

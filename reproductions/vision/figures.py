"""The figure of the page, as PNG, in the style of the text experiments' figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reproductions.small.figures import COLOURS, MARKERS, STYLE, Line, _lines, _ranks
from reproductions.small.findings import over_seeds
from reproductions.vision import findings
from reproductions.vision.experiments import BELOW, DIRECT, best_rate
from reproductions.vision.findings import Values
from reproductions.vision.measuring import Done
from reproductions.vision.training import CONT, SOURCE

NAME = "ranks.png"
RANKS = (SOURCE, *BELOW)


def draw(done: Done, folder: Path) -> list[Path]:
    """Draw what there are measurements for."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        if not _accuracy(left, done):
            return []
        _retained(right, done)
        _legend(figure, left)
        figure.savefig(folder / NAME, metadata={"Software": "lora-squeeze"})
    return [folder / NAME]


def _accuracy(axes: Any, done: Done) -> bool:
    high, trained = best_rate(done, SOURCE), (SOURCE, *DIRECT)
    own = {rank: findings.direct(done, rank, best_rate(done, rank)) for rank in trained}
    lines: list[Line] = [
        ("Post-Squeeze from 64", _line({rank: findings.post(done, rank) for rank in RANKS})),
        ("direct, rank 64's rate", _line({rank: findings.direct(done, rank, high) for rank in trained})),
        ("direct, each rank's own rate", _line(own)),
        ("Cont-Squeeze", _line({CONT: findings.annealed(done, "cont-squeeze")})),
        ("In-Squeeze Minimum", _line({CONT: findings.annealed(done, "in-squeeze")})),
    ]
    if not lines[0][1]:
        return False
    _lines(axes, [line for line in lines if line[1]], percent=True)
    ablated = _line({rank: findings.post(done, rank, "ablated") for rank in RANKS})
    style = {"color": COLOURS[0], "marker": MARKERS[0], "markersize": 4, "linestyle": "--", "capsize": 2}
    values = [100 * one.value for one in ablated.values()]
    errors = [100 * one.error for one in ablated.values()]
    axes.errorbar(list(ablated), values, errors, markerfacecolor="white", label="Post-Squeeze, grey image", **style)
    for what, label, dots in (("accuracy", "no LoRA", "-."), ("blind", "best answer by the question alone", ":")):
        if (value := findings.alone(done, what)) is not None:
            axes.axhline(100 * value, color="black", linewidth=1, linestyle=dots, label=label)
    _ranks(axes, RANKS)
    axes.set(ylabel="test accuracy, %", title="Answers to open questions about images")
    axes.set_ylim(0, 102)
    return True


def _legend(figure: Figure, axes: Any) -> None:
    """Below both panels; between the lines there is no room for it. The two levels come last."""
    found = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: isinstance(pair[0], Line2D))
    handles, labels = zip(*found, strict=True)
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _retained(axes: Any, done: Done) -> None:
    kept = {rank: 100 * one.value for rank in RANKS if (one := findings.retained(done, rank))}
    axes.plot(list(kept), list(kept.values()), color=COLOURS[0], marker=MARKERS[0], markersize=4)
    for rank, value in kept.items():
        axes.annotate(f"{value:.0f}", (rank, value), textcoords="offset points", xytext=(6, -10), fontsize=8)
    _ranks(axes, RANKS)
    axes.set_ylim(0, 104)
    axes.set(ylabel="retained variance, mean of the layers, %", title="What is left of the update")


def _line(found: dict[int, Values]) -> dict[float, Any]:
    means = {rank: over_seeds(values) for rank, values in found.items()}
    return {rank: one for rank, one in means.items() if one}

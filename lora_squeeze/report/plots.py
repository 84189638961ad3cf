"""The figures of a report as PNG and SVG, for papers and slides. Needs matplotlib.

Colours are viridis, whose lightness rises evenly, and the Okabe-Ito palette: both can be told apart
by people who are colour-blind, and in print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_squeeze.exploration import Exploration, Setting
from lora_squeeze.extras import require
from lora_squeeze.report.arrangement import arrange

__all__ = ["FIGURES", "FORMATS", "draw", "draw_with"]

FORMATS = ("png", "svg")
_MAP = "viridis"
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8793a0"
# Names come from anybody's files: "$" in them is no mathematics. SVG text stays text, the same at each run.
_STYLE = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lora-squeeze",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e7ea",
    "axes.axisbelow": True,
    "legend.frameon": True,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.size": 9,
}


def draw(name: str, exploration: Exploration, file: Path) -> None:
    """Draw one of FIGURES into a file; its suffix says whether as PNG or SVG.

    Raises MissingExtra if matplotlib is not installed.
    """
    draw_with(lambda figure: FIGURES[name](figure, exploration), file)


def draw_with(plot: Callable[[Any], None], file: Path) -> None:
    """Have `plot` draw on a new figure, in the style of all of them, and save it. Raises MissingExtra."""
    matplotlib = require("matplotlib", "plots")
    require("matplotlib.backends.backend_agg", "plots")
    with matplotlib.rc_context(_STYLE):
        figure = require("matplotlib.figure", "plots").Figure(layout="constrained")
        plot(figure)
        metadata = {"Date": None, "Creator": "lora-squeeze"} if file.suffix == ".svg" else {"Software": "lora-squeeze"}
        figure.savefig(file, metadata=metadata)


def _retained_variance(figure: Any, exploration: Exploration) -> None:
    curves = exploration.curves
    ranks = list(curves.target_ranks)
    figure.set_size_inches(6, 4)
    axes = figure.add_subplot()
    worst, best = list(curves.min_variance.values()), list(curves.max_variance.values())
    axes.fill_between(ranks, worst, best, color=_BLUE, alpha=0.12, linewidth=0)
    axes.plot(ranks, best, color=_GREEN, linewidth=1.3, label="best layer")
    axes.plot(ranks, list(curves.energy_variance.values()), "--", color=_ORANGE, label="weighted by energy")
    axes.plot(ranks, list(curves.mean_variance.values()), color=_BLUE, linewidth=2.2, label="mean of the layers")
    axes.plot(ranks, worst, color=_RED, linewidth=1.3, label="worst layer")
    recommended = exploration.analysis.recommended_rank
    axes.axvline(recommended, color="black", linestyle=":", linewidth=1, label=f"recommended: {recommended}")
    axes.set_xscale("log", base=2)
    _plain(axes.xaxis, exploration.analysis.target_ranks)
    axes.set(xlabel="rank", ylabel="retained variance", title="Retained variance at one rank for all layers")
    _percent(axes.yaxis)
    axes.legend(loc="lower right")


def _policies(figure: Any, exploration: Exploration) -> None:
    figure.set_size_inches(7, 4.4)
    axes = figure.add_subplot()
    markers = "osv^<>DPX*hpd"
    names = list(dict.fromkeys(setting.policy for setting in exploration.settings))
    colors = require("matplotlib", "plots").colormaps[_MAP]
    for place, name in enumerate(names):
        mine = [setting.outcome for setting in exploration.settings if setting.policy == name]
        axes.plot(
            [one.parameters / one.source_parameters for one in mine],
            [max(1 - one.energy_kept, 0.0) or math.nan for one in mine],
            color=colors(place / len(names)),
            marker=markers[place % len(markers)],
            markevery=max(1, len(mine) // 8),
            markersize=4,
            linewidth=1.1,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="parameters", ylabel="energy lost", title="Energy lost by every policy, at every size")
    axes.set_xlim(1 / max(2, exploration.analysis.source_rank), 1.0)
    axes.set_ylim(bottom=1e-4)
    _percent(axes.xaxis, digits=1)
    _log_percent(axes.yaxis)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _spectra(figure: Any, exploration: Exploration) -> None:
    """The layers of most energy, and all others behind them."""
    figure.set_size_inches(7.5, 4.2)
    axes = figure.add_subplot()
    spectra = sorted((one for one in exploration.analysis.spectra if one.energy > 0), key=lambda one: -one.energy)
    for one in spectra[8:]:
        axes.plot(
            range(1, len(one.singular_values) + 1), _positive(one.singular_values), color=_GREY, alpha=0.25, lw=0.7
        )
    colors = require("matplotlib", "plots").colormaps[_MAP]
    for place, one in enumerate(spectra[:8]):
        values = _positive(one.singular_values)
        axes.plot(range(1, len(values) + 1), values, color=colors(place / 8), lw=1.4, label=_short(one.name, 40))
    axes.set_yscale("log")
    _log_numbers(axes.yaxis)
    axes.set(xlabel="component", ylabel="singular value", title="Spectra; in colour, the layers of most energy")
    if spectra:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)


def _heatmap(title: str, values: Callable[[Exploration], Sequence[float]]) -> Callable[[Any, Exploration], None]:
    def drawn(figure: Any, exploration: Exploration) -> None:
        found = arrange([one.name for one in exploration.analysis.spectra])
        columns, rows = len(found.columns), len(found.rows)
        table = [[float("nan")] * columns for _ in range(rows)]
        for (column, row), value in zip(found.places, values(exploration), strict=True):
            table[row][column] = value
        figure.set_size_inches(max(4.0, min(24.0, 2.6 + 0.28 * columns)), max(2.2, min(40.0, 1.3 + 0.26 * rows)))
        axes = figure.add_subplot()
        image = axes.imshow(table, cmap=_MAP, aspect="auto", interpolation="nearest")
        step = -(-columns // 40)
        label = max(map(len, found.columns), default=0)
        axes.set_xticks(
            range(0, columns, step), [_short(one, 24) for one in found.columns[::step]], rotation=90 * (label > 5)
        )
        axes.set_yticks(range(rows), [_short(one, 40) for one in found.rows], fontsize=8 if rows <= 60 else 4)
        axes.grid(visible=False)
        axes.set(xlabel=found.what or "block", title=title.format(setting=exploration.first))
        figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)

    return drawn


def _first(exploration: Exploration) -> Setting:
    return next(setting for setting in exploration.settings if setting.spelling == exploration.first)


def _shares(exploration: Exploration) -> list[float]:
    whole = sum(one.energy for one in exploration.analysis.spectra) or 1.0
    return [100 * one.energy / whole for one in exploration.analysis.spectra]


def _positive(values: Sequence[float]) -> list[float]:
    return [value if value > 0 else float("nan") for value in values]


def _short(label: str, length: int) -> str:
    return label if len(label) <= length else "…" + label[1 - length :]


def _percent(axis: Any, *, digits: int = 0) -> None:
    axis.set_major_formatter(require("matplotlib.ticker", "plots").PercentFormatter(1.0, decimals=digits or None))


def _log_numbers(axis: Any) -> None:
    ticker = require("matplotlib.ticker", "plots")
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    # Within a decade or so the numbers between its ends are labelled, too; by default as mathematics.
    axis.set_minor_formatter(ticker.LogFormatter(labelOnlyBase=False))


def _log_percent(axis: Any) -> None:
    def percent(value: float, _place: int) -> str:
        return f"{100 * value:g}%"

    ticker = require("matplotlib.ticker", "plots")
    axis.set_major_formatter(ticker.FuncFormatter(percent))
    axis.set_minor_formatter(ticker.NullFormatter())


def _plain(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_ticks(list(ticks), [str(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


# File name → what draws it.
FIGURES: dict[str, Callable[[Any, Exploration], None]] = {
    "retained-variance": _retained_variance,
    "policies": _policies,
    "spectra": _spectra,
    "effective-rank": _heatmap("Effective rank", lambda one: [s.effective_rank for s in one.analysis.spectra]),
    "energy": _heatmap("Spectral energy, % of the adapter", _shares),
    "chosen-ranks": _heatmap("Ranks of {setting}", lambda one: _first(one).ranks),
}

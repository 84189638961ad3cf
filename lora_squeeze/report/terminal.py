"""Figures for the terminal: a curve of bars, and a heatmap in colour and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lora_squeeze.exploration import Exploration
from lora_squeeze.records import Analysis
from lora_squeeze.report.arrangement import arrange

__all__ = ["exploration_figures"]

# Viridis at nine places; the text on it is black or white, whichever can be read.
_MAP = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
_BARS = 40


def exploration_figures(exploration: Exploration, *, width: int) -> RenderableType:
    """Retained variance by rank, and the effective rank of every layer, fitted to so many columns."""
    analysis = exploration.analysis
    return Group(
        f"Adapter: {escape(analysis.source)}",
        "",
        "Retained variance at one rank for all layers: █ worst layer, ▓ up to the mean, ░ up to the best",
        _curve(analysis),
        "",
        "Effective rank (the rank that equal singular values of the same entropy would have)",
        *_heatmap(exploration, width),
    )


def _curve(analysis: Analysis) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for rank in analysis.target_ranks:
        worst, mean, best = (
            round(_BARS * curve[rank])
            for curve in (analysis.min_variance, analysis.mean_variance, analysis.max_variance)
        )
        bar = Text.assemble(
            ("█" * worst, "red"), ("▓" * (mean - worst), "blue"), ("░" * (best - mean), "green"), " " * (_BARS - best)
        )
        recommended = "<--" if rank == analysis.recommended_rank else ""
        table.add_row(f"{rank:>4}", bar, f"{analysis.mean_variance[rank]:.1%}", recommended)
    return table


def _heatmap(exploration: Exploration, width: int) -> list[RenderableType]:
    """One table, or several one above the other where the columns do not fit."""
    found = arrange([one.name for one in exploration.analysis.spectra])
    values = dict(zip(found.places, (one.effective_rank for one in exploration.analysis.spectra), strict=True))
    most = max(values.values()) or 1.0
    labels = [_short(one, 30) for one in found.rows]
    cell = max(4, *(len(_short(one, 8)) + 1 for one in found.columns))
    fitting = max(1, (width - max(map(len, labels)) - 2) // cell)
    return [
        _block(range(first, min(first + fitting, len(found.columns))), found.columns, labels, values, most, cell)
        for first in range(0, len(found.columns), fitting)
    ]


def _block(
    columns: range,
    names: Sequence[str],
    labels: Sequence[str],
    values: dict[tuple[int, int], float],
    most: float,
    cell: int,
) -> Table:
    table = Table(box=None, show_header=True, pad_edge=False, padding=(0, 0), header_style="")
    table.add_column(no_wrap=True)
    for column in columns:
        table.add_column(Text(_short(names[column], 8)), justify="right", no_wrap=True, min_width=cell)
    for row, label in enumerate(labels):
        if any((column, row) in values for column in columns):
            table.add_row(Text(f"{label}  "), *(_cell(values.get((column, row)), most, cell) for column in columns))
    return table


def _cell(value: float | None, most: float, width: int) -> Text:
    if value is None:
        return Text(" " * width)
    place = round(value / most * (len(_MAP) - 1))
    ink = "black" if place > 4 else "white"
    return Text(f"{value:.0f} ".rjust(width), style=f"{ink} on {_MAP[place]}")


def _short(label: str, length: int) -> str:
    return label if len(label) <= length else "…" + label[1 - length :]

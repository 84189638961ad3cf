"""Quality against size as a figure (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_squeeze.errors import OutputError
from lora_squeeze.extras import require
from lora_squeeze.measurements import Curve, CurvePoint

__all__ = ["plot_curve"]


def plot_curve(curve: Curve, path: Path) -> None:
    """Draw one panel a metric, one line a policy with its 95 % interval; the format is that of the file's name.

    Raises OutputError if it cannot be written, MissingExtra without matplotlib.
    """
    figures = require("matplotlib.figure", "plots")
    metrics = list(curve.original.metrics)
    figure = figures.Figure(figsize=(5.5 * len(metrics), 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        _panel(axes, curve, metric)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: the figure cannot be written: {error}") from error


def _panel(axes: Any, curve: Curve, metric: str) -> None:
    for line in dict.fromkeys((point.policy, point.label) for point in curve.points):
        points = sorted(_of(curve.points, line), key=lambda point: point.outcome.parameters)
        sizes = [point.outcome.parameters for point in points]
        estimates = [point.metrics[metric] for point in points]
        name = f"{line[0]} {line[1]}".strip()
        axes.plot(sizes, [one.value for one in estimates], marker="o", markersize=4, label=name)
        axes.fill_between(sizes, [one.low for one in estimates], [one.high for one in estimates], alpha=0.12)
    axes.axhline(curve.original.metrics[metric].value, color="black", linewidth=1, linestyle="--", label="original")
    axes.set_xscale("log", base=2)
    ticks = sorted({point.outcome.parameters for point in curve.points})
    axes.set_xlim(min(ticks) / 1.2, max(ticks) * 1.2)
    axes.set_xlabel("parameters")
    axes.set_ylabel(metric)
    axes.set_title(f"{metric} on {curve.examples:,} examples", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _of(points: Iterable[CurvePoint], line: tuple[str, str]) -> Iterable[CurvePoint]:
    return (point for point in points if (point.policy, point.label) == line)

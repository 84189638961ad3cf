"""Quality against size as a figure (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_squeeze.errors import OutputError
from lora_squeeze.extras import require
from lora_squeeze.measurements import Curve, CurvePoint, Estimate

__all__ = ["plot_curve"]


def plot_curve(curve: Curve, path: Path) -> None:
    """Draw one panel a metric and one line a policy; the format is that of the file's name.

    Bands are the 95 % intervals of the paired differences to the original, around its value.

    Raises OutputError if it cannot be written, MissingExtra without matplotlib.
    """
    figures = require("matplotlib.figure", "plots")
    metrics = list(curve.original.metrics)
    with require("matplotlib", "plots").rc_context({"text.parse_math": False}):  # "$" in a name is no mathematics
        figure = figures.Figure(figsize=(5.5 * len(metrics), 4), layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            _panel(axes, curve, metric)
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise OutputError(f"{path}: the figure cannot be written: {error}") from error


def _panel(axes: Any, curve: Curve, metric: str) -> None:
    own = curve.original.metrics[metric].value
    for line in dict.fromkeys((point.policy, point.label) for point in curve.points):
        points = sorted(_of(curve.points, line), key=lambda point: point.outcome.parameters)
        shares = [point.outcome.parameters / point.outcome.source_parameters for point in points]
        estimates = [point.metrics[metric] for point in points]
        ends = [_band(one, own) for one in estimates]
        axes.plot(shares, [one.value for one in estimates], marker="o", markersize=4, label=" ".join(line).strip())
        axes.fill_between(shares, [low for low, _ in ends], [high for _, high in ends], alpha=0.12)
    axes.axhline(own, color="black", linewidth=1, linestyle="--", label="original")
    axes.set_xscale("log", base=2)
    ticks = sorted({point.outcome.fraction for point in curve.points if point.outcome.fraction})
    axes.set_xticks(ticks, [f"{tick:.3g}" if tick < 0.001 else f"{100 * tick:.3g} %" for tick in ticks])
    axes.set_xlabel("parameters, of the original's")
    axes.set_ylabel(metric)
    axes.set_title(f"{metric} on {curve.examples:,} examples", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _band(estimate: Estimate, original: float) -> tuple[float, float]:
    """Where the number lies if the original's is what it is: the paired interval, where there is one."""
    if estimate.difference_low is not None and estimate.difference_high is not None:
        return original + estimate.difference_low, original + estimate.difference_high
    if estimate.low is not None and estimate.high is not None:
        return estimate.low, estimate.high
    return estimate.value, estimate.value  # of one example there is none


def _of(points: Iterable[CurvePoint], line: tuple[str, str]) -> Iterable[CurvePoint]:
    return (point for point in points if (point.policy, point.label) == line)

"""What was measured, as a page shows it: the quality curve of an adapter, the results of a campaign."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_squeeze.measurements import Curve, Estimate

if TYPE_CHECKING:
    from lora_squeeze.campaign.overview import Overview
    from lora_squeeze.campaign.results import Mean

__all__ = ["campaign_section", "quality_section"]


def quality_section(curve: Curve) -> dict[str, Any]:
    """Points of every line, with the ends of their intervals around the original's value."""
    metrics = list(curve.original.metrics)
    return {
        "title": f"Measured quality: {curve.examples:,} examples{f' of {curve.data}' if curve.data else ''}",
        "metrics": metrics,
        "original": {metric: curve.original.metrics[metric].value for metric in metrics},
        "points": [
            {
                "line": " ".join((point.policy, point.label)).strip(),
                "setting": point.outcome.policy,
                "parameters": point.outcome.parameters,
                "share": point.outcome.parameters / point.outcome.source_parameters,
                "metrics": {
                    metric: _point(point.metrics[metric], curve.original.metrics[metric].value) for metric in metrics
                },
            }
            for point in curve.points
        ],
    }


def _point(estimate: Estimate, original: float) -> dict[str, Any]:
    low, high = estimate.low, estimate.high
    if estimate.difference_low is not None and estimate.difference_high is not None:
        low, high = original + estimate.difference_low, original + estimate.difference_high
    return {"value": estimate.value, "low": low, "high": high, "verdict": estimate.verdict}


def campaign_section(found: Overview) -> dict[str, Any]:
    """Conditions, learning curves, gains and runs."""
    manifest = found.manifest
    finished = sum(entry.status == "finished" for entry in manifest.runs)
    return {
        "title": "Campaign",
        "facts": [
            ("Runs finished", f"{finished} of {manifest.num_runs}"),
            ("Conditions", str(len(manifest.conditions))),
            ("Seeds", ", ".join(map(str, manifest.seeds)) or "none"),
            ("Recommended rank", str(manifest.squeeze.recommended_rank or "none")),
        ],
        "metric": found.metric,
        "metrics": found.metrics,
        "conditions": [
            {"name": name, "means": {metric: _mean(mean) for metric, mean in means.items()}}
            for name, means in found.means.items()
        ],
        "logged": found.logged,
        "curves": [
            {"name": name, "points": [{"step": step, **_mean(mean)} for step, mean in points]}
            for name, points in found.curves.items()
        ],
        "gains": [
            {"source": source, "target": target, **_mean(mean)} for (source, target), mean in found.gains.items()
        ],
        "runs": [
            {
                "name": entry.name,
                "status": entry.status,
                "rank": entry.rank,
                "source_rank": entry.source_rank,
                "steps": entry.steps,
                "seconds": entry.seconds,
                "metrics": entry.metrics,
                "error": entry.error,
            }
            for entry in manifest.runs
        ],
        "run": found.run,
        "config": f"{manifest.config_file}, {manifest.timestamp}",
    }


def _mean(one: Mean) -> dict[str, float]:
    return {"mean": one.mean, "error": one.error, "count": one.count}

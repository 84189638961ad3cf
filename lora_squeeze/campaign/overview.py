"""All that a campaign has to say, as one record: for whatever shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_squeeze.campaign.manifest import Manifest, RunEntry, read_manifest, refreshed, run_folder
from lora_squeeze.campaign.results import (
    METRICS,
    Mean,
    curve,
    groups_of,
    main_metric,
    mean_of,
    metrics_of,
    squeezed_against_direct,
)
from lora_squeeze.campaign.squeezed import read_squeezed
from lora_squeeze.errors import TrainingError

__all__ = ["Overview", "overview"]


@dataclass(frozen=True)
class Overview:
    """A campaign's conditions in numbers.

    metric
        by which they are compared; metrics: all that were measured, the most telling first.
    means
        condition → metric → mean over seeds; runs that began at several ranks are apart (see `groups_of`).
    logged, curves
        what was logged while training, and condition → (step, mean over seeds of the stretch before it).
    gains
        (source rank, target rank) → what squeezing gained over training at the target directly.
    adapter
        of the run that was squeezed, or of the first that has finished.
    """

    folder: Path
    manifest: Manifest
    metric: str
    metrics: tuple[str, ...]
    means: dict[str, dict[str, Mean]]
    logged: str
    curves: dict[str, tuple[tuple[int, Mean], ...]]
    gains: dict[tuple[int, int], Mean]
    run: str
    adapter: Path


def overview(folder: Path, *, metric: str = "", points: int = 20) -> Overview:
    """Read a campaign's folder.

    metric
        default: the most telling one that was measured.
    points
        stretches of the training that a learning curve has.

    Raises TrainingError if it is no campaign, no run of it has finished or the metric is unknown.
    """
    manifest = refreshed(read_manifest(folder), folder)
    finished = [entry for entry in manifest.runs if entry.status == "finished"]
    if not finished:
        raise TrainingError(f"{folder}: no run has finished yet, so there is nothing to report")
    chosen = metric or main_metric(manifest)
    if chosen and chosen not in METRICS:
        raise TrainingError(f"metric '{chosen}' is unknown; known are {', '.join(METRICS)}")
    metrics = metrics_of(manifest)
    by_condition = {name: runs for name, runs in groups_of(manifest).items() if runs}
    logged = "reward" if "reward" in chosen else "loss"
    logs = {name: [run_folder(folder, one).read_metrics() for one in runs] for name, runs in by_condition.items()}
    curves = {name: curve(runs, logged, points=points) for name, runs in logs.items()}
    first = next((entry for entry in finished if entry.name == manifest.squeeze.run), finished[0])
    return Overview(
        folder=folder,
        manifest=manifest,
        metric=chosen,
        metrics=metrics,
        means={name: _means(runs, metrics) for name, runs in by_condition.items()},
        logged=logged,
        curves={name: points for name, points in curves.items() if points},
        gains=squeezed_against_direct(manifest, read_squeezed(folder), chosen) if chosen else {},
        run=first.name,
        adapter=folder / first.adapter,
    )


def _means(runs: list[RunEntry], metrics: tuple[str, ...]) -> dict[str, Mean]:
    values = {key: [one.metrics[key] for one in runs if key in one.metrics] for key in metrics}
    return {key: mean_of(found) for key, found in values.items() if found}

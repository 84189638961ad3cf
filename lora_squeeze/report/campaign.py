"""Campaigns as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from lora_squeeze.report.training import metrics_line
from lora_squeeze.spelling import percent
from lora_squeeze.student import sign_of

if TYPE_CHECKING:
    from lora_squeeze.campaign.manifest import Manifest, RunEntry, SqueezeEntry
    from lora_squeeze.campaign.results import Mean
    from lora_squeeze.campaign.spec import Campaign

__all__ = ["curves_table", "gains_table", "plan_table", "results_table", "squeeze_table", "status_table"]

_STYLES = {"finished": "green", "failed": "bold red", "running": "yellow", "pending": "dim"}


def plan_table(campaign: Campaign) -> RenderableType:
    """What a campaign would run."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("Run", "Method", "Rank", "Steps", "Data"):
        table.add_column(heading, overflow="fold")
    for run in campaign.runs:
        settings = run.settings
        steps = settings.steps or f"{settings.training.epochs:g} epochs"
        rank = str(settings.rank or "as the adapter")
        if settings.in_squeeze.schedule:
            rank += f", {settings.in_squeeze.schedule}"
        table.add_row(
            escape(run.name), escape(settings.method), escape(rank), str(steps), escape(", ".join(settings.data.source))
        )
    return table


def status_table(manifest: Manifest, latest: Callable[[RunEntry], Mapping[str, Any]]) -> RenderableType:
    """Every run with what is known of it; `latest` gives the last logged metrics of one that has not finished."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("Run", overflow="fold")
    for heading, justify in (("Status", "left"), ("Rank", "right"), ("Step", "right"), ("Seconds", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # pyright: ignore[reportArgumentType]
    table.add_column("", overflow="fold")
    for entry in manifest.runs:
        done = entry.status == "finished"
        metrics: Mapping[str, Any] = entry.metrics if done else latest(entry)
        said = entry.error if entry.status == "failed" else metrics_line(metrics)
        attempts = f" ({entry.attempts}.)" if entry.attempts > 1 else ""
        table.add_row(
            escape(entry.name),
            f"[{_STYLES[entry.status]}]{entry.status}[/]{attempts}",
            str(entry.rank or ""),
            escape(str(entry.steps if done else metrics.get("step", ""))),
            f"{entry.seconds:.1f}" if done else "",
            escape(said),
        )
    return table


def squeeze_table(squeeze: SqueezeEntry) -> RenderableType:
    """The variance table of the first finished run, the recommended rank marked."""
    if squeeze.status == "failed":
        return f"[bold red]The squeeze failed:[/] {escape(squeeze.error)}"
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("Rank", "Mean Var%", "Min Var%", "Max Var%", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in squeeze.table:
        curves = (f"{row[key]:.2%}" for key in ("mean_variance", "min_variance", "max_variance"))
        recommended = bool(row["recommended"])
        style = "bold green" if recommended else None
        table.add_row(escape(str(row["rank"])), *curves, "<--" if recommended else "", style=style)
    lines = [f"Squeezed: {escape(run)} → {escape(path)}" for run, path in squeeze.outputs.items()]
    if squeeze.error:
        lines.append(f"[yellow]Not squeezed:[/] {escape(squeeze.error)}")
    if squeeze.wandb:
        lines.append(f"W&B: {escape(squeeze.wandb)}")
    return Group(
        f"Auto-squeeze: {escape(squeeze.run)}",
        f"Source rank: {squeeze.source_rank}",
        f"Layers analyzed: {squeeze.num_layers}",
        "",
        table,
        "",
        f"Recommended rank: {squeeze.recommended_rank} "
        f"(>= {percent(squeeze.min_variance_retention)} variance retained)",
        *lines,
    )


def results_table(rows: Sequence[tuple[str, Mapping[str, Mean]]], metrics: Sequence[str]) -> RenderableType:
    """Conditions × metrics: mean ± standard error over seeds."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("Condition", overflow="fold")
    table.add_column("Runs", justify="right")
    for metric in metrics:
        table.add_column(escape(metric), justify="right", no_wrap=True)
    for condition, means in rows:
        count = max((one.count for one in means.values()), default=0)
        cells = (_mean(means[metric]) if metric in means else "" for metric in metrics)
        table.add_row(escape(condition), str(count), *cells)
    return table


def curves_table(curves: Mapping[str, Sequence[tuple[int, Mean]]], metric: str) -> RenderableType:
    """Learning curves: the mean of each stretch of the training, over seeds."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("Condition", overflow="fold")
    longest = max(curves.values(), key=len)
    for step, _ in longest:
        table.add_column(f"→ {step}", justify="right", no_wrap=True)
    for condition, points in curves.items():
        table.add_row(escape(condition), *(f"{mean.mean:.3g}" for _, mean in points))
    return Group(f"{escape(metric)} while training", table)


def gains_table(gains: Mapping[tuple[int, int], Mean], metric: str) -> RenderableType:
    """Source rank × target rank: what squeezing gained over training at the target rank directly."""
    sources, targets = (sorted({ranks[side] for ranks in gains}) for side in (0, 1))
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("Source", justify="right")
    for target in targets:
        table.add_column(f"→ {target}", justify="right", no_wrap=True)
    for source in sources:
        cells = (_gain(gains.get((source, target))) for target in targets)
        table.add_row(str(source), *cells)
    return Group(f"Gain of squeezing over training at that rank directly, {escape(metric)}", table)


def _mean(one: Mean) -> str:
    return f"{one.mean:.4g} ± {one.error:.2g}" if one.count > 1 else f"{one.mean:.4g}"


def _gain(one: Mean | None) -> str:
    if one is None:
        return ""
    colour = ("dim", "green", "red")[sign_of(one.mean, one.error, one.count)]
    return f"[{colour}]{one.mean:+.4f}" + (f" ± {one.error:.2g}[/]" if one.count > 1 else "[/]")

"""Tables of what was measured on data."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from lora_squeeze.measurements import Curve, Estimate, Evaluated, Evaluation, Kept, MomentsSummary
from lora_squeeze.report.table import bytes_text, compression_table

__all__ = ["curve_table", "evaluation_table", "kept_table", "moments_table"]


def moments_table(summary: MomentsSummary) -> RenderableType:
    """What a file of moments was made of, one property a row."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("Moments", escape(summary.path))
    table.add_row("Adapter", f"SHA-256 {summary.adapter_sha256[:12]}…" if summary.adapter_sha256 else "in memory")
    table.add_row("Base model", escape(summary.base_model))
    table.add_row("Data", escape("; ".join(summary.sources)))
    table.add_row("Tokens", f"{summary.tokens:,} of {summary.examples:,} examples")
    table.add_row("Layers", f"{summary.layers:,}")
    table.add_row("Gradients", "yes: errors are weighted by the loss" if summary.gradients else "no: outputs alone")
    parts: list[RenderableType] = [table]
    if summary.unreached:
        parts.append(
            f"[yellow]Note:[/yellow] {len(summary.unreached)} layers were never reached by these data "
            f"(first: {escape(summary.unreached[0])})"
        )
    return Group(*parts)


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """One row an adapter: what it scored, and what the difference to the first is worth."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("Adapter", overflow="fold")
    for heading in ("Rank", "Parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    metrics = list(evaluation.original.metrics)
    for metric in metrics:
        table.add_column(escape(metric.capitalize()), justify="right", no_wrap=True)
        if _compared(evaluation, metric):
            table.add_column("against the first", no_wrap=True)
    for one in evaluation.adapters:
        table.add_row(
            escape(one.adapter),
            str(one.rank or "–"),
            f"{one.parameters:,}" if one.parameters else "–",
            *(cell for metric in metrics for cell in _cells(evaluation, one, metric)),
        )
    counted = f", {evaluation.tokens:,} tokens count" if evaluation.tokens else ""
    return Group(
        f"Base model: {escape(evaluation.base)}",
        f"Data: {escape(evaluation.data)} ({evaluation.examples:,} examples{counted})",
        "",
        table,
        "",
        "In brackets: where 95 % of paired bootstrap draws lie. Within noise: the interval of the difference holds 0.",
        *_few(evaluation),
        *(f"[yellow]Note:[/yellow] {escape(note)}" for note in evaluation.notes),
    )


def kept_table(kept: Kept, *, layers: bool = False) -> RenderableType:
    """The path to the smallest adapter that is good enough, and what was written."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("Tried")
    for heading in ("Parameters", escape(kept.metric.capitalize()), "", "holds in"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in kept.steps:
        table.add_row(
            escape(step.policy),
            f"{step.parameters:,}",
            _number(kept.metric, step.value),
            "passes" if step.passes else "[red]fails[/red]",
            f"{step.confidence:.0%}",
            style="bold" if step is kept.confirmed else None,
        )
    side = "at most" if kept.metric == "loss" else "at least"
    surely = ", and in 95% of bootstrap draws" if kept.confident else ""
    return Group(
        f"Criterion: {escape(kept.metric)} {side} {_number(kept.metric, kept.limit)} (the original's is "
        f"{_number(kept.metric, kept.original)}) on {kept.examples:,} examples{surely}",
        "",
        table,
        "",
        compression_table(kept.compression, layers=layers),
    )


def curve_table(curve: Curve) -> RenderableType:
    """One row a policy and size: what it keeps and costs, and what it scores against the original."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    names = [f"{point.outcome.policy} {point.label}".strip() for point in curve.points]
    table.add_column("Policy", no_wrap=True, min_width=max(map(len, ["original", *names])))
    for heading in ("Parameters", "Weights", "Largest rank", "Energy kept"):
        table.add_column(heading, justify="right", no_wrap=True)
    metrics = list(curve.original.metrics)
    for metric in metrics:
        table.add_column(escape(metric.capitalize()), justify="right", no_wrap=True)
        table.add_column("")  # where there is no room for all of it, this is what takes more lines
    own = curve.original
    cells = [cell for metric in metrics for cell in (_number(metric, own.metrics[metric].value), "")]
    table.add_row("original", f"{own.parameters:,}", "", str(own.rank), "", *cells, style="bold")
    for point in sorted(curve.points, key=lambda one: -(one.outcome.fraction or 0)):
        cells = []
        for metric in metrics:
            estimate = point.metrics[metric]
            cells += [_number(metric, estimate.value), _difference(metric, estimate)]
        table.add_row(
            escape(f"{point.outcome.policy} {point.label}".strip()),
            f"{point.outcome.parameters:,}",
            bytes_text(point.outcome.file_bytes),
            str(point.outcome.largest_rank),
            f"{point.outcome.energy_kept:.2%}",
            *cells,
        )
    return Group(
        f"Base model: {escape(curve.base)}",
        f"Data: {escape(curve.data)} ({curve.examples:,} examples)",
        "",
        table,
        "",
        "Differences to the original, with the middle 95 % of paired bootstrap draws.",
    )


def _few(evaluation: Evaluation) -> Iterator[str]:
    verdicts = {found.verdict for one in evaluation.adapters for found in one.metrics.values()}
    if "too few examples" in verdicts:
        yield (
            f"[yellow]Note:[/yellow] chance alone explains any difference on {evaluation.examples} example"
            f"{'s' if evaluation.examples > 1 else ''}: they are too few to say better or worse"
        )


def _compared(evaluation: Evaluation, metric: str) -> bool:
    return any(one.metrics[metric].difference is not None for one in evaluation.adapters)


def _cells(evaluation: Evaluation, one: Evaluated, metric: str) -> list[str]:
    estimate = one.metrics[metric]
    if not _compared(evaluation, metric):
        return [f"{_number(metric, estimate.value)} {_between(metric, estimate.low, estimate.high)}".rstrip()]
    return [_number(metric, estimate.value), _difference(metric, estimate)]


def _difference(metric: str, estimate: Estimate) -> str:
    if estimate.difference is None:
        return _between(metric, estimate.low, estimate.high)
    if estimate.verdict == "same":
        return "the same"
    style = {"worse": "red", "better": "green"}.get(estimate.verdict, "dim")
    said = f" [{style}]{estimate.verdict}[/{style}]" if estimate.verdict else ""
    ends = _between(metric, estimate.difference_low, estimate.difference_high, signed=True)
    return f"{_signed(metric, estimate.difference)} {ends}".rstrip() + said


def _between(metric: str, low: float | None, high: float | None, *, signed: bool = False) -> str:
    if low is None or high is None:
        return ""
    text = _signed if signed else _number
    return escape(f"[{text(metric, low)}, {text(metric, high)}]")


def _number(metric: str, value: float) -> str:
    return f"{value:.1%}" if _is_share(metric) else f"{value:.4g}"


def _signed(metric: str, value: float) -> str:
    return f"{100 * value:+.1f}" if _is_share(metric) else f"{value:+.3g}"


def _is_share(metric: str) -> bool:
    return metric.partition(" ")[0] in ("accuracy", "accuracy-norm", "agreement", "acc", "acc_norm", "exact_match")

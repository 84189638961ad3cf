"""Records as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from lora_squeeze.records import Analysis, Compression, Outcome, Ranks, Verification
from lora_squeeze.sizes import bytes_text
from lora_squeeze.spelling import percent
from lora_squeeze.summary import Summary

__all__ = [
    "analysis_table",
    "comparison_table",
    "compression_table",
    "layers_table",
    "plan_table",
    "summary_table",
    "verification_table",
]


def analysis_table(analysis: Analysis) -> RenderableType:
    """What each candidate rank retains, the recommended one marked, and what to note about it."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("Rank", "Mean Var%", "Min Var%", "Max Var%", "Energy Var%", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for rank in analysis.target_ranks:
        recommended = rank == analysis.recommended_rank
        curves = (
            analysis.mean_variance,
            analysis.min_variance,
            analysis.max_variance,
            analysis.energy_variance,
        )
        table.add_row(
            str(rank),
            *(_percent(curve[rank]) for curve in curves),
            "<--" if recommended else "",
            style="bold green" if recommended else None,
        )
    what = "" if analysis.by == "mean" else " in every layer"
    return Group(
        f"Adapter: {escape(analysis.source)}",
        f"Source rank: {analysis.source_rank}",
        f"Layers analyzed: {len(analysis.spectra)}",
        "",
        table,
        "",
        f"Recommended rank: {analysis.recommended_rank} "
        f"(>= {percent(analysis.min_variance_retention)} variance retained{what})",
        *_notes(analysis.notes),
    )


def layers_table(analysis: Analysis) -> RenderableType:
    """What each candidate rank retains in each layer."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("Layer", overflow="fold")
    table.add_column("Rank", justify="right")
    table.add_column("‖ΔW‖", justify="right")
    for rank in analysis.target_ranks:
        table.add_column(f"{rank}", justify="right", no_wrap=True)
    for spectrum in analysis.spectra:
        retained = (
            _percent(spectrum.retained_variance(rank)) if spectrum.energy > 0 else "zero"
            for rank in analysis.target_ranks
        )
        table.add_row(escape(spectrum.name), str(spectrum.rank), f"{spectrum.energy**0.5:.3g}", *retained)
    return table


def compression_table(compression: Compression, *, layers: bool = False) -> RenderableType:
    """What was written, how large it is and what was lost; on request layer by layer."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    worst = compression.worst_layer
    table.add_row("Output", escape(compression.output))
    table.add_row("Policy", f"{escape(compression.policy)}, largest rank {compression.rank}")
    table.add_row("Parameters", _change(compression.parameters_before, compression.parameters_after, "{:,}".format))
    table.add_row("Weights", _change(compression.bytes_before, compression.bytes_after, bytes_text))
    table.add_row(
        "Retained variance",
        f"{compression.retained_variance:.2%} over all layers (relative error {compression.relative_error:.2e})",
    )
    if compression.dora is not None:
        fitted, kept = compression.dora.relative_error, compression.dora.relative_error_if_kept
        table.add_row("DoRA's weights", f"relative error {fitted:.4e} (with the magnitudes kept {kept:.4e})")
    table.add_row("Worst layer", f"relative error {worst.relative_error:.2e} in {escape(worst.spectrum.name)}")
    per_layer = [_errors_table(compression)] if layers else []
    return Group(*per_layer, table, *_notes(compression.notes))


def plan_table(ranks: Ranks, found: Outcome) -> RenderableType:
    """How many layers have which rank, and what the plan keeps and costs."""
    counts = sorted(Counter(ranks.by_layer.values()).items())
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("Policy", escape(ranks.policy))
    table.add_row("Ranks", ", ".join(f"{rank} ({count} layers)" for rank, count in counts))
    table.add_row("Parameters", _change(found.source_parameters, found.parameters, "{:,}".format))
    table.add_row("Weights", bytes_text(found.file_bytes))
    table.add_row("Energy kept", f"{_percent(found.energy_kept)} (worst layer {_percent(found.worst_layer)})")
    return table


def comparison_table(
    outcomes: Sequence[Outcome], *, source: str, fractions: Sequence[float], policies: Iterable[str]
) -> RenderableType:
    """Policies side by side, one table for each budget; those that cannot go so low are named below it."""
    parts: list[RenderableType] = [f"Adapter: {escape(source)}"]
    for fraction in fractions:
        found = {one.policy.partition("=")[0] for one in outcomes if one.fraction == fraction}
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("Policy")
        for heading in ("Parameters", "Energy kept", "Worst layer", "Largest rank", "Left out", "Weights"):
            table.add_column(heading, justify="right", no_wrap=True)
        for one in outcomes:
            if one.fraction == fraction:
                table.add_row(
                    escape(one.policy),
                    _percent(one.parameters / one.source_parameters),
                    _percent(one.energy_kept),
                    _percent(one.worst_layer),
                    str(one.largest_rank),
                    str(one.layers_left_out),
                    bytes_text(one.file_bytes),
                )
        parts += ["", f"At most {_percent(fraction)} of the parameters", *([table] if found else [])]
        if missing := [name for name in policies if name not in found]:
            parts.append(f"[dim]Cannot go so low: {', '.join(missing)}[/]")
    return Group(*parts)


def summary_table(summary: Summary) -> RenderableType:
    """What an adapter is, one property a row."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("Adapter", escape(summary.source))
    table.add_row("Format", summary.format)
    table.add_row("Base model", escape(summary.base_model) or "not named")
    table.add_row("Layers", _counts(summary.layers))
    table.add_row("Ranks", _counts(summary.ranks))
    table.add_row("Scales", _counts({f"{scale:g}": count for scale, count in summary.scales.items()}))
    table.add_row("Dtypes", _counts(summary.dtypes))
    table.add_row("Parameters", f"{summary.parameters:,}")
    table.add_row("Weights", bytes_text(summary.nbytes))
    kept = [f"{escape(key)} {list(shape)}" for key, shape in list(summary.passes_through.items())[:8]]
    more = len(summary.passes_through) - len(kept)
    table.add_row("Kept as it is", "\n".join([*kept, *([f"and {more} more"] if more else [])]) or "nothing")
    return Group(table, *_notes(summary.notes))


def verification_table(verification: Verification, *, layers: bool = False) -> RenderableType:
    """Every check and what it found, and what was lost if that was measured."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in verification.checks:
        verdict = "[green]passed[/green]" if check.passed else "[bold red]FAILED[/bold red]"
        table.add_row(verdict, check.name, escape(check.found))
    loss = ["", compression_table(verification.loss, layers=layers)] if verification.loss else []
    return Group(table, *loss)


def _counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{escape(str(value))} ({count})" for value, count in counts.items())


def _errors_table(compression: Compression) -> RenderableType:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("Layer", overflow="fold")
    for heading in ("Rank", "", "‖ΔW‖", "Relative error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in compression.layers:
        table.add_row(
            escape(layer.spectrum.name),
            str(layer.spectrum.rank),
            f"→ {layer.rank}",
            f"{layer.spectrum.energy**0.5:.3g}",
            f"{layer.relative_error:.2e}",
        )
    return table


def _change(before: int, after: int, text: Callable[[int], str]) -> str:
    share = f" ({after / before:.1%})" if before else ""
    return f"{text(before)} → {text(after)}{share}"


def _notes(notes: tuple[str, ...]) -> Iterator[str]:
    for note in notes:
        yield f"[yellow]Note:[/yellow] {escape(note)}"


def _percent(fraction: float) -> str:
    return f"{fraction:.2%}"

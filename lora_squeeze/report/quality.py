"""Tables of what was measured on data."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from lora_squeeze.records import MomentsSummary

__all__ = ["moments_table"]


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

"""Batches of squeezed adapters as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from lora_squeeze.report.table import bytes_text

if TYPE_CHECKING:
    from lora_squeeze.batch import BatchRecord

__all__ = ["batch_table"]


def batch_table(records: Sequence[BatchRecord]) -> RenderableType:
    """Each adapter with its ranks and sizes before and after, and what was lost; last, all together."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("Adapter", overflow="fold")
    for heading in ("Rank", "Weights", "Retained variance", "Relative error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        if record.status != "finished":
            said = f"[bold red]failed[/]: {escape(record.error)}" if record.status == "failed" else "[dim]pending[/]"
            table.add_row(f"{escape(record.source)}\n  {said}")
            continue
        table.add_row(
            escape(record.source),
            f"{record.source_rank} → {record.rank}",
            f"{bytes_text(record.bytes_before)} → {bytes_text(record.bytes_after)}",
            f"{record.retained_variance:.2%}",
            f"{record.relative_error:.2e}",
        )
    done = [record for record in records if record.status == "finished"]
    if len(done) > 1:
        before, after = (sum(getattr(one, key) for one in done) for key in ("bytes_before", "bytes_after"))
        share = f" ({after / before:.1%})" if before else ""
        table.add_row(f"{len(done)} of {len(records)}", "", f"{bytes_text(before)} → {bytes_text(after)}{share}")
    return table

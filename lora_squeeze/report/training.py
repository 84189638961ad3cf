"""Records of training runs as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from lora_squeeze.training.record import RunRecord

__all__ = ["metrics_line", "run_table"]

# What says most about a run, in the order in which it is shown; names are transformers' and TRL's.
_SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "squeeze/rank": "rank",
    "squeeze/retained_variance": "variance retained",
    "squeeze/relative_change": "update changed by",
    "learning_rate": "lr",
    "eval_loss": "held-out loss",
    "eval_accuracy": "held-out accuracy",
    "eval_mean_token_accuracy": "held-out token accuracy",
    "eval_reward": "held-out reward",
    "eval_rewards/accuracies": "held-out preferences met",
}

_SHARES = ("squeeze/retained_variance", "squeeze/relative_change")


def metrics_line(metrics: Mapping[str, float]) -> str:
    """The most telling metrics of a logging step in one line."""
    return "  ".join(f"{label} {_said(key, metrics[key])}" for key, label in _SHOWN.items() if key in metrics)


def run_table(record: RunRecord) -> RenderableType:
    """What a run trained, on what, how long, and what came of it."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    ranks = str(record.rank) if record.rank == record.source_rank else f"{record.source_rank} → {record.rank}"
    table.add_row("Adapter", escape(record.adapter))
    table.add_row("Model", escape(record.model))
    table.add_row("Method", f"{escape(record.method)}, rank {ranks}, {record.trained_parameters:,} parameters")
    table.add_row("Examples", f"{record.examples:,}" + (f", {record.held_out:,} held out" if record.held_out else ""))
    table.add_row("Training", f"{record.steps:,} steps in {record.seconds:,.1f} s")
    for key, label in _SHOWN.items():
        if key in record.metrics and key != "learning_rate" and not key.startswith("squeeze/"):
            table.add_row(label.capitalize(), _said(key, record.metrics[key]))
    return Group(table, *(f"[yellow]Note:[/yellow] {escape(note)}" for note in record.notes))


def _said(key: str, value: float) -> str:
    return f"{value:.2%}" if key in _SHARES else _number(value)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"

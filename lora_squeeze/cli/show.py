"""lora-squeeze show."""

from __future__ import annotations

import click

from lora_squeeze.cli.options import as_json
from lora_squeeze.cli.output import print_record
from lora_squeeze.cli.source import open_source

__all__ = ["show_command"]


@click.command("show", short_help="What an adapter is: format, base, layers, ranks, bytes.")
@click.argument("path")
@as_json
def show_command(path: str, as_json: bool) -> None:
    """Say what the adapter at PATH is: format, base model, layers, ranks, scales, dtypes, bytes."""
    from lora_squeeze.report.table import summary_table
    from lora_squeeze.summary import show

    print_record(show(open_source(path)), summary_table, as_json=as_json)

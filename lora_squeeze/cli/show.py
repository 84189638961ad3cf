"""lora-squeeze show."""

from __future__ import annotations

import click

from lora_squeeze.cli.options import as_json
from lora_squeeze.cli.output import print_record

__all__ = ["show_command"]


@click.command("show")
@click.argument("path")
@as_json
def show_command(path: str, as_json: bool) -> None:
    """Say what the adapter at PATH is: format, base model, layers, ranks, scales, dtypes, bytes."""
    from lora_squeeze import open_adapter
    from lora_squeeze.report.table import summary_table
    from lora_squeeze.summary import show

    print_record(show(open_adapter(path)), summary_table, as_json=as_json)

"""lora-squeeze verify."""

from __future__ import annotations

import click

from lora_squeeze.cli.options import as_json, refuse_stray
from lora_squeeze.cli.output import download_progress, print_record

__all__ = ["verify_command"]


@click.command("verify", short_help="Check a squeezed adapter against header and source.")
@click.argument("output")
@click.argument("source", required=False)
@click.option("--layers", is_flag=True, help="Show what every layer lost.")
@as_json
@click.pass_context
def verify_command(context: click.Context, output: str, source: str | None, layers: bool, as_json: bool) -> None:
    """Check the adapter at OUTPUT against what its header says of its making.

    With the SOURCE it was made from: whether it is that one, whether all else is the same, and what was
    lost, measured anew. The exit code is 0 if everything is as it should be, 1 if not.
    """
    from lora_squeeze import verify
    from lora_squeeze.report.table import verification_table

    if source is None:
        refuse_stray(("layers",), "a check against SOURCE: without it, what was lost is not measured")
    with download_progress() as on_download:
        verification = verify(output, source, on_download=on_download)
    print_record(verification, lambda record: verification_table(record, layers=layers), as_json=as_json)
    context.exit(0 if verification.passed else 1)

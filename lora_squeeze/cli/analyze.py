"""lora-squeeze analyze."""

from __future__ import annotations

from typing import Any

import click

from lora_squeeze.cli.options import as_json, compute_options, parse_ranks
from lora_squeeze.cli.output import print_record, print_table, progress
from lora_squeeze.cli.source import open_source
from lora_squeeze.settings import CHOICES

__all__ = ["analyze_command"]


@click.command("analyze")
@click.argument("path")
@click.option("--retain", default=0.95, help="Fraction of the variance to retain.")
@click.option(
    "--ranks",
    default="",
    callback=parse_ranks,
    show_default=False,
    help="Candidate ranks, as 4,8,16.  [default: powers of two]",
)
@click.option("--by", type=click.Choice(CHOICES["by"]), default="mean", help="Which layers must retain it.")
@click.option("--source-rank", default=0, help="The rank you expect; an error if the tensors say otherwise.")
@click.option("--layers", is_flag=True, help="Show every layer.")
@compute_options
@as_json
def analyze_command(
    path: str,
    retain: float,
    ranks: tuple[int, ...],
    by: Any,
    source_rank: int,
    layers: bool,
    method: str,
    device: str,
    as_json: bool,
) -> None:
    """Show what each rank would retain of the adapter at PATH, and recommend one."""
    from lora_squeeze import analyze, decompose
    from lora_squeeze.report.table import analysis_table, layers_table

    adapter = open_source(path)
    with progress("Analyzing", len(adapter.layers)) as advance:
        spectra = decompose(adapter, method=method, device=device, on_layer=advance).spectra
    analysis = analyze(
        spectra,
        source=adapter.source,
        source_rank=source_rank,
        target_ranks=ranks,
        min_variance_retention=retain,
        by=by,
        notes=adapter.notes,
    )
    if layers and not as_json:
        print_table(layers_table(analysis))
        click.echo()
    print_record(analysis, analysis_table, as_json=as_json)

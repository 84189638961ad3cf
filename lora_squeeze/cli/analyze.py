"""lora-squeeze analyze."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_squeeze.cli.decomposing import decomposed
from lora_squeeze.cli.options import as_json, calibration_option, compute_options, parse_ranks
from lora_squeeze.cli.output import print_record, print_table
from lora_squeeze.cli.source import open_source
from lora_squeeze.settings import CHOICES

__all__ = ["analyze_command"]


@click.command("analyze", short_help="What each rank would retain, and which one to take.")
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
@calibration_option
@compute_options
@as_json
def analyze_command(
    path: str,
    retain: float,
    ranks: tuple[int, ...],
    by: Any,
    source_rank: int,
    layers: bool,
    calibration: Path | None,
    method: str,
    device: str,
    as_json: bool,
) -> None:
    """Show what each rank would retain of the adapter at PATH, and recommend one."""
    from lora_squeeze import analyze
    from lora_squeeze.report.table import analysis_table, layers_table

    adapter = open_source(path)
    decomposition = decomposed(adapter, method=method, device=device, calibration=calibration)
    analysis = analyze(
        decomposition.spectra,
        source=adapter.source,
        source_rank=source_rank,
        target_ranks=ranks,
        min_variance_retention=retain,
        by=by,
        notes=decomposition.adapter.notes,
    )
    if layers and not as_json:
        print_table(layers_table(analysis))
        click.echo()
    print_record(analysis, analysis_table, as_json=as_json)

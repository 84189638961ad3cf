"""lora-squeeze run."""

from __future__ import annotations

from pathlib import Path

import click

from lora_squeeze.cli.campaign import campaign_from_file
from lora_squeeze.cli.explaining import explain_squeeze
from lora_squeeze.cli.output import print_record, progress
from lora_squeeze.cli.source import open_source
from lora_squeeze.cli.train import train_from_file
from lora_squeeze.sections import read_toml
from lora_squeeze.settings import Settings, read_settings

__all__ = ["run_command"]


@click.command("run", short_help="Do what a TOML file says: squeeze, train or campaign.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--explain", is_flag=True, help="Say what would be done, and do nothing.")
@click.pass_context
def run_command(context: click.Context, file: Path, explain: bool) -> None:
    """Do what the TOML FILE says: with [campaign] a campaign, else with [squeeze] a squeeze, else one training run."""
    document = read_toml(file)
    if "campaign" in document:
        campaign_from_file(context, file, explain=explain)
        return
    if "squeeze" not in document:
        train_from_file(file, explain=explain)
        return
    settings = read_settings(file)
    if explain:
        explain_squeeze(file, settings)
    else:
        _run(settings)


def _run(settings: Settings) -> None:
    from lora_squeeze.report.table import analysis_table, compression_table
    from lora_squeeze.squeezing import squeeze_as_set

    _, compression = squeeze_as_set(
        open_source(settings.squeeze.adapter_path),
        settings,
        progress=progress,
        on_analysis=lambda analysis: print_record(analysis, analysis_table, as_json=False),
    )
    if compression is not None:
        click.echo()
        print_record(compression, compression_table, as_json=False)

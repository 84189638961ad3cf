"""lora-squeeze compare."""

from __future__ import annotations

from pathlib import Path

import click

from lora_squeeze.cli.decomposing import decomposed
from lora_squeeze.cli.options import calibration_option, compute_options
from lora_squeeze.cli.output import print_table
from lora_squeeze.cli.source import open_source

__all__ = ["compare_command"]


@click.command("compare", short_help="All policies side by side at equal size.")
@click.argument("path")
@click.option(
    "--params", "fractions", default="0.5,0.25,0.125,0.0625", help="Fractions of the parameters to compare at."
)
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
@calibration_option
@compute_options
def compare_command(
    path: str, fractions: str, as_json: bool, calibration: Path | None, method: str, device: str
) -> None:
    """Show all policies side by side at equal numbers of parameters."""
    from lora_squeeze.comparison import compare_policies
    from lora_squeeze.compression import file_cost
    from lora_squeeze.records import outcomes_to_json
    from lora_squeeze.report.table import comparison_table

    try:
        budgets = [float(fraction) for fraction in fractions.split(",")]
    except ValueError:
        raise click.BadParameter(f"'{fractions}' is not a list of fractions such as 0.5,0.25") from None
    adapter = open_source(path)
    spectra = decomposed(adapter, method=method, device=device, calibration=calibration).spectra
    outcomes = [outcome for budget in budgets for outcome in compare_policies(spectra, budget, cost=file_cost(adapter))]
    if as_json:
        click.echo(outcomes_to_json(outcomes))
    else:
        print_table(comparison_table(outcomes, source=adapter.source))

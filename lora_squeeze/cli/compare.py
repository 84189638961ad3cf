"""lora-squeeze compare."""

from __future__ import annotations

from pathlib import Path

import click

from lora_squeeze.cli.decomposing import decomposed
from lora_squeeze.cli.options import calibration_option, compute_options, parse_fractions, refuse_stray
from lora_squeeze.cli.output import print_record, print_table, progress
from lora_squeeze.cli.source import open_source
from lora_squeeze.spelling import spell

__all__ = ["compare_command"]

_FRACTIONS = (0.5, 0.25, 0.125, 0.0625)


@click.command("compare")
@click.argument("path")
@click.argument("other", required=False)
@click.option(
    "--params",
    "fractions",
    callback=parse_fractions,
    help=f"Fractions of the parameters to compare at.  [default: {','.join(map(spell, _FRACTIONS))}]",
)
@click.option("--rank", type=click.IntRange(min=1), help="Directions to compare.  [default: the effective rank]")
@click.option("--layers", is_flag=True, help="Show every layer of two adapters.")
@click.option("--metric", default="", show_default=False, help="Of two campaigns.  [default: the most telling one]")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
@calibration_option
@compute_options
def compare_command(
    path: str,
    other: str | None,
    fractions: tuple[float, ...],
    rank: int | None,
    layers: bool,
    metric: str,
    as_json: bool,
    calibration: Path | None,
    method: str,
    device: str,
) -> None:
    """Show all policies for an adapter side by side, or two adapters.

    With OTHER, compares the adapters or the campaigns at PATH and OTHER.

    Policies are compared at equal numbers of parameters. Two adapters of one model: their ranks and
    energies, the cosine of their updates, and how far their leading directions are the same.
    """
    campaigns = other is not None and _are_campaigns(path, other)
    _refuse(other is None, {"--rank": rank, "--layers": layers, "--metric": metric}, "compares PATH with OTHER")
    _refuse(other is not None, {"--params": fractions, "--calibration": calibration}, "compares policies for one PATH")
    _refuse(other is not None and not campaigns, {"--metric": metric}, "compares two campaigns")
    _refuse(campaigns, {"--rank": rank, "--layers": layers, "--json": as_json}, "compares two adapters")
    if campaigns:
        refuse_stray(("method", "device"), "comparing adapters: campaigns are compared by what was measured")
    if other is None:
        _compare_policies(path, fractions or _FRACTIONS, as_json, calibration, method, device)
    elif campaigns:
        _compare_campaigns(Path(path), Path(other), metric)
    else:
        _compare_adapters(path, other, rank, layers, as_json, method, device)


def _are_campaigns(path: str, other: str) -> bool:
    """Whether both are; an error that names the one which is none if only the other is."""
    one, two = (bool(place) and (Path(place) / "manifest.json").is_file() for place in (path, other))
    if one != two:
        campaign, none = (path, other) if one else (other, path)
        why = "no campaign lies there" if none and Path(none).exists() else "no such folder"
        raise click.UsageError(
            f"{none or '(an empty path)'}: {why}, but {campaign} is one: give two campaigns, or two adapters"
        )
    return one


def _refuse(wrong: bool, options: dict[str, object], what: str) -> None:
    given = [option for option, value in options.items() if value]
    if wrong and given:
        raise click.UsageError(f"{given[0]} {what}")


def _compare_policies(
    path: str, fractions: tuple[float, ...], as_json: bool, calibration: Path | None, method: str, device: str
) -> None:
    from lora_squeeze.comparison import compare_policies
    from lora_squeeze.compression import file_cost
    from lora_squeeze.policies import POLICIES
    from lora_squeeze.records import outcomes_to_json
    from lora_squeeze.report.table import comparison_table

    adapter = open_source(path)
    spectra = decomposed(adapter, method=method, device=device, calibration=calibration).spectra
    cost = file_cost(adapter)
    outcomes = [outcome for budget in fractions for outcome in compare_policies(spectra, budget, cost=cost)]
    if as_json:
        click.echo(outcomes_to_json(outcomes))
    else:
        table = comparison_table(outcomes, source=adapter.source, fractions=fractions, policies=POLICIES)
        print_table(table)


def _compare_adapters(
    path: str, other: str, rank: int | None, layers: bool, as_json: bool, method: str, device: str
) -> None:
    from lora_squeeze.pairing import pair_up
    from lora_squeeze.report.pairs import likeness_table

    opened = [open_source(one) for one in (path, other)]  # both, before work is done for either
    a, b = (decomposed(one, method=method, device=device) for one in opened)
    with progress("Comparing", len(a.spectra)) as advance:
        found = pair_up(a, b, rank=rank, on_layer=advance)
    print_record(found, lambda record: likeness_table(record, layers=layers), as_json=as_json)


def _compare_campaigns(path: Path, other: Path, metric: str) -> None:
    from lora_squeeze.campaign.manifest import read_manifest, refreshed
    from lora_squeeze.campaign.results import METRICS, main_metric, means_side_by_side
    from lora_squeeze.report.pairs import campaigns_table

    a, b = (refreshed(read_manifest(one), one) for one in (path, other))
    chosen = metric or main_metric(a)
    if chosen not in METRICS:
        why = f"'{chosen}' is not one of {', '.join(METRICS)}" if chosen else f"no run of {path} has finished"
        raise click.BadParameter(why, param_hint="--metric")
    print_table(campaigns_table((a, b), means_side_by_side(a, b, chosen), metric=chosen))

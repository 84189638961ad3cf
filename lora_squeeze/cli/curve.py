"""lora-squeeze curve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_squeeze.cli.data_options import DataOptions, data_options, opened, read, trial_for
from lora_squeeze.cli.decomposing import decomposed
from lora_squeeze.cli.files import check_file, print_and_write, refuse_stray_overwrite
from lora_squeeze.cli.options import PLACE, as_json, calibration_option, parse_fractions
from lora_squeeze.cli.output import print_record, progress_of
from lora_squeeze.spelling import percent

if TYPE_CHECKING:
    from lora_squeeze.measurements import Curve

__all__ = ["curve_command"]

DEFAULT_POLICIES = ("fixed", "params")
_SUFFIXES = (".png", ".svg", ".pdf", ".json")


@click.command("curve", short_help="Quality against size, for several policies.")
@click.argument("adapter")
@click.option(
    "--policy", "policies", multiple=True, help="By name, as params.  Repeatable.  [default: fixed and params]"
)
@click.option(
    "--params",
    "fractions",
    default="0.5,0.25,0.125,0.0625,0.03125",
    callback=parse_fractions,
    help="Fractions of the parameters to measure at.",
)
@click.option("--metric", "metrics", multiple=True, help="loss, accuracy, …  Repeatable.  [default: all]")
@click.option("-o", "--output", type=PLACE, help="Also a figure (.png, .svg, .pdf) or .json.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@click.option("--draws", type=click.IntRange(min=100), default=2000, help="Of the bootstrap.")
@click.option("--seed", default=0, help="Of the bootstrap.")
@calibration_option
@data_options()
@as_json
def curve_command(
    adapter: str,
    policies: tuple[str, ...],
    fractions: tuple[float, ...],
    metrics: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
    draws: int,
    seed: int,
    calibration: Path | None,
    data_options: DataOptions,
    as_json: bool,
) -> None:
    """Show quality against size: several policies at several sizes, measured in one pass.

    With --calibration, every policy is drawn twice: truncated by weights, and on data.
    """
    from lora_squeeze.evaluation.curve import curve
    from lora_squeeze.report.quality import curve_table

    refuse_stray_overwrite(overwrite, output, options="--output")
    if output is not None:
        _check(output, adapter, overwrite=overwrite)
    examples = read(data_options)
    subject = opened(data_options, (adapter,), examples)
    source = subject.adapters["default"]
    decompositions = {"": decomposed(source, method="gram", device="cpu")}
    if calibration is not None:
        decompositions["on data"] = decomposed(source, method="gram", device="cpu", calibration=calibration)
    trial = trial_for(subject, data_options, examples)
    with progress_of("Measuring", trial.steps) as advance:
        found = curve(
            subject,
            decompositions,
            trial,
            policies=policies or DEFAULT_POLICIES,
            fractions=fractions,
            metrics=metrics,
            data=", ".join(data_options.data),
            draws=draws,
            seed=seed,
            on_batch=advance,
        )
    print_and_write(
        lambda: print_record(found, curve_table, as_json=as_json),
        output,
        lambda file: _write(found, file),
        overwrite=overwrite,
    )
    drawn = {(point.policy, point.outcome.fraction) for point in found.points}
    for fraction in fractions:
        if missing := [name for name in policies or DEFAULT_POLICIES if (name, fraction) not in drawn]:
            click.echo(f"Note: cannot go as low as {percent(fraction)}: {', '.join(missing)}", err=True)


def _check(output: Path, adapter: str, *, overwrite: bool) -> None:
    """Raise OutputError or MissingExtra: a measurement takes its time, and may not be lost for the want of a file."""
    from lora_squeeze.extras import require

    source = Path(adapter).expanduser()
    check_file(output, overwrite=overwrite, example="curve.png", suffixes=_SUFFIXES, source=source)
    if output.suffix.lower() != ".json":
        require("matplotlib.figure", "plots")


def _write(found: Curve, file: Path) -> None:
    if file.suffix.lower() == ".json":
        file.write_text(found.to_json() + "\n", encoding="utf-8")
        return
    from lora_squeeze.report.curve_plot import plot_curve

    plot_curve(found, file)

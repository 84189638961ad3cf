"""lora-squeeze campaign."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_squeeze.campaign.spec import Campaign, read_campaign
from lora_squeeze.cli.explaining import print_rows, set_rows, squeeze_rows
from lora_squeeze.cli.options import PLACE
from lora_squeeze.cli.output import print_table
from lora_squeeze.cli.plots import check_plots, write_plots
from lora_squeeze.sections import document_of

if TYPE_CHECKING:
    from lora_squeeze.campaign.manifest import Manifest, RunEntry
    from lora_squeeze.campaign.results import Mean

__all__ = ["campaign_command", "campaign_from_file"]

_POINTS = 24  # of a curve that is drawn


@click.group("campaign", short_help="Train conditions × seeds, squeezed by themselves.")
def campaign_command() -> None:
    """Train conditions × seeds from one TOML file, squeezed by themselves."""


@campaign_command.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=PLACE, help="Folder of the campaign.  [default: logs/campaign_TIME]")
@click.option("--explain", is_flag=True, help="Print the runs, and do nothing.")
@click.pass_context
def run(context: click.Context, file: Path, out: Path | None, explain: bool) -> None:
    """Run the campaign that the TOML FILE describes; with --out, go on with it if it has begun."""
    campaign_from_file(context, file, out, explain=explain)


@campaign_command.command("status")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def status(folder: Path, as_json: bool) -> None:
    """Show what has become of every run."""
    from lora_squeeze.campaign.manifest import read_manifest, refreshed

    manifest = read_manifest(folder)
    if as_json:
        click.echo(manifest.to_json())
        return
    running = {entry.name for entry in manifest.runs if entry.status == "running"}
    shown = refreshed(manifest, folder)
    interrupted = [entry.name for entry in shown.runs if entry.name in running and entry.status == "pending"]
    _print_status(manifest if interrupted and _is_at_work(folder) else shown, folder)


@campaign_command.command("resume")
@click.argument("folder", type=click.Path(path_type=Path))
@click.pass_context
def resume(context: click.Context, folder: Path) -> None:
    """Run what has not finished, from its last checkpoint; what has finished or failed stays."""
    _run(context, folder)


@campaign_command.command("retry")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("runs", nargs=-1)
@click.pass_context
def retry(context: click.Context, folder: Path, runs: tuple[str, ...]) -> None:
    """Try failed runs once more (all of them, or those named RUNS), and run what has not finished."""
    from lora_squeeze.campaign.manifest import read_manifest

    manifest = read_manifest(folder)
    for name in runs:
        if manifest.run(name).status != "failed":
            raise click.UsageError(f"run '{name}' has not failed: it is {manifest.run(name).status}")
    _run(context, folder, retry=runs or [entry.name for entry in manifest.runs])


@campaign_command.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--metric", default="", show_default=False, help="To compare by.  [default: the most telling one]")
@click.option(
    "--squeezed", is_flag=True, help="Squeeze every run to the lower ranks of the others, evaluate, and compare."
)
@click.option(
    "--plots",
    type=PLACE,
    metavar="DIR",
    help="Write curves and gains as PNG and SVG to this folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace figures that exist.")
def report(folder: Path, metric: str, squeezed: bool, plots: Path | None, overwrite: bool) -> None:
    """Compare the conditions: mean ± standard error over seeds, learning curves, squeezed against direct."""
    from lora_squeeze.campaign.manifest import read_manifest, refreshed
    from lora_squeeze.campaign.results import METRICS, main_metric
    from lora_squeeze.report.campaign import squeeze_table

    manifest = refreshed(read_manifest(folder), folder)
    chosen = metric or main_metric(manifest)
    if not chosen:
        raise click.UsageError("no run has finished yet")
    if chosen not in METRICS:
        raise click.BadParameter(f"'{metric}' is not one of {', '.join(METRICS)}", param_hint="--metric")
    if plots is not None:
        check_plots(plots, ("curves", "gains"), overwrite=overwrite)
    elif overwrite:
        raise click.UsageError("--overwrite is about the files of --plots")
    _print_results(manifest, folder, chosen)
    if manifest.squeeze.status != "none":
        click.echo()
        print_table(squeeze_table(manifest.squeeze))
    if squeezed:
        _measure_squeezed(manifest, folder)
    _print_gains(manifest, folder, chosen)
    if plots is not None:
        _write_plots(manifest, folder, chosen, plots, overwrite=overwrite)


def campaign_from_file(context: click.Context, file: Path, out: Path | None = None, *, explain: bool = False) -> None:
    """What `lora-squeeze campaign run` does."""
    campaign = read_campaign(file)
    if explain:
        if campaign.common.squeeze is not None:  # else there is nothing to wait for torch for
            from lora_squeeze.campaign.launch import campaign_folder, check_begin

            check_begin(campaign, out or campaign_folder(campaign), config_file=str(file))
        _explain(file, campaign, out)
        return
    from lora_squeeze.campaign.launch import begin, campaign_folder

    folder = begin(campaign, out or campaign_folder(campaign), config_file=str(file))
    click.echo(f"Campaign: {folder}")
    _run(context, folder)


def _explain(file: Path, campaign: Campaign, out: Path | None) -> None:
    from lora_squeeze.report.campaign import plan_table

    common, squeeze = campaign.common, campaign.common.squeeze
    print_rows(
        [
            ("mode", "campaign"),
            ("config", file),
            ("model", common.model.model),
            ("runs", len(campaign.runs)),
            ("executor", f"{campaign.executor}, {campaign.workers} at a time"),
            ("output", out or Path(common.logging.log_dir or "logs", "campaign_TIME")),
            *set_rows({"campaign": document_of(campaign.settings)}, told=["campaign.conditions"]),
            *set_rows(document_of(common), told=["squeeze", "model.model"]),
        ]
    )
    if squeeze is not None:
        when = "every run" if campaign.settings.squeeze_every_run else "the first run"
        click.echo(f"[squeeze], after {when}:")
        print_rows(squeeze_rows(squeeze, unheeded={"adapter_path": "the adapters that are trained"}))
    click.echo()
    print_table(plan_table(campaign))


def _run(context: click.Context, folder: Path, *, retry: Collection[str] = ()) -> None:
    from lora_squeeze.campaign.launch import run_campaign
    from lora_squeeze.report.campaign import squeeze_table

    with _watching(folder) as on_change:
        manifest = run_campaign(folder, retry=retry, on_change=on_change)
    _print_status(manifest, folder)
    if manifest.squeeze.status in ("finished", "failed"):
        click.echo()
        print_table(squeeze_table(manifest.squeeze))
    failed = [entry.name for entry in manifest.runs if entry.status == "failed"]
    if failed:
        click.echo(f"{len(failed)} of {manifest.num_runs} runs failed: lora-squeeze campaign retry {folder}", err=True)
        context.exit(1)


@contextmanager
def _watching(folder: Path) -> Generator[Callable[[Manifest], None], None, None]:
    """On a terminal a live table of the runs; elsewhere a line on stderr whenever a run's status changes."""
    from rich.console import Console
    from rich.live import Live

    from lora_squeeze.report.campaign import status_table

    # Named, as runs in this process have sys.stderr replaced by their logs.
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _Changes()
        return
    shown: list[Manifest] = []

    def table() -> Any:
        return status_table(shown[-1], lambda entry: _latest(folder, entry)) if shown else ""

    with Live(get_renderable=table, console=console, refresh_per_second=1, transient=True):
        yield shown.append


class _Changes:
    """Says which run's status has changed since it was last called."""

    def __init__(self) -> None:
        self._before: dict[str, str] = {}

    def __call__(self, manifest: Manifest) -> None:
        for entry in manifest.runs:
            said = f"{entry.status}{f': {entry.error}' if entry.error else ''}"
            if self._before.get(entry.name, "pending") != said:
                click.echo(f"{entry.name}  {said}", err=True)
            self._before[entry.name] = said
        if manifest.squeeze.recommended_rank and not self._before.get("", ""):
            click.echo(f"Recommended rank: {manifest.squeeze.recommended_rank}", err=True)
            self._before[""] = "said"


def _latest(folder: Path, entry: RunEntry) -> Mapping[str, Any]:
    from lora_squeeze.campaign.manifest import run_folder

    metrics = run_folder(folder, entry).read_metrics()
    return metrics[-1] if metrics else {}


def _print_status(manifest: Manifest, folder: Path) -> None:
    from lora_squeeze.report.campaign import status_table

    print_table(status_table(manifest, lambda entry: _latest(folder, entry)))


def _is_at_work(folder: Path) -> bool:
    from lora_squeeze.errors import TrainingError
    from lora_squeeze.training.folder import only_one

    try:
        with only_one(folder):
            return False
    except TrainingError:
        return True


def _print_results(manifest: Manifest, folder: Path, metric: str) -> None:
    from lora_squeeze.campaign.results import groups_of, mean_of, metrics_of
    from lora_squeeze.report.campaign import curves_table, results_table

    metrics = metrics_of(manifest)
    rows = [
        (
            condition,
            {
                key: mean_of(one.metrics[key] for one in runs if key in one.metrics)
                for key in metrics
                if any(key in one.metrics for one in runs)
            },
        )
        for condition, runs in groups_of(manifest).items()
    ]
    print_table(results_table(rows, metrics))
    curves = _curves(manifest, folder, metric, points=5)
    if curves:
        click.echo()
        print_table(curves_table(curves, _logged(metric)))


def _logged(metric: str) -> str:
    """What is logged while training that says as much."""
    return "reward" if "reward" in metric else "loss"


def _curves(manifest: Manifest, folder: Path, metric: str, *, points: int) -> dict[str, tuple[tuple[int, Mean], ...]]:
    from lora_squeeze.campaign.manifest import run_folder
    from lora_squeeze.campaign.results import curve, groups_of

    found: dict[str, tuple[tuple[int, Mean], ...]] = {}
    for condition, runs in groups_of(manifest).items():
        logged = [run_folder(folder, one).read_metrics() for one in runs]
        if known := curve(logged, _logged(metric), points=points):
            found[condition] = known
    return found


def _measure_squeezed(manifest: Manifest, folder: Path) -> None:
    from lora_squeeze.campaign.squeezed import measure_squeezed, pairs_of
    from lora_squeeze.cli.output import progress
    from lora_squeeze.training.job import quiet_libraries

    pairs = pairs_of(manifest)
    with quiet_libraries(), progress("Squeezing and evaluating", len(pairs)) as advance:
        measure_squeezed(manifest, folder, on_pair=advance)


def _gains(manifest: Manifest, folder: Path, metric: str) -> dict[tuple[int, int], Mean]:
    from lora_squeeze.campaign.results import squeezed_against_direct
    from lora_squeeze.campaign.squeezed import read_squeezed

    return squeezed_against_direct(manifest, read_squeezed(folder), metric)


def _print_gains(manifest: Manifest, folder: Path, metric: str) -> None:
    from lora_squeeze.report.campaign import gains_table

    gains = _gains(manifest, folder, metric)
    if gains:
        click.echo()
        print_table(gains_table(gains, metric))


def _write_plots(manifest: Manifest, folder: Path, metric: str, plots: Path, *, overwrite: bool) -> None:
    from lora_squeeze.report.campaign_plots import plot_curves, plot_gains
    from lora_squeeze.report.plots import draw_with

    figures: dict[str, Callable[[Any], None]] = {}
    if curves := _curves(manifest, folder, metric, points=_POINTS):
        figures["curves"] = partial(plot_curves, curves=curves, metric=_logged(metric))
    if gains := _gains(manifest, folder, metric):
        figures["gains"] = partial(plot_gains, gains=gains, metric=metric)
    if not figures:
        raise click.UsageError("nothing was logged while training, and nothing was squeezed: there is nothing to draw")
    write_plots(plots, {name: partial(draw_with, plot) for name, plot in figures.items()}, overwrite=overwrite)

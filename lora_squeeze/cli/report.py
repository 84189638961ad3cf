"""lora-squeeze report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from lora_squeeze.cli.decomposing import decomposed
from lora_squeeze.cli.files import check_file, refuse_stray_overwrite
from lora_squeeze.cli.options import (
    PLACE,
    RankOptions,
    calibration_option,
    compute_options,
    dtype_option,
    rank_options,
    refuse_stray,
    refuse_stray_max_lora_rank,
    runtime_options,
    spelled,
)
from lora_squeeze.cli.output import progress
from lora_squeeze.cli.plots import check_plots, write_plots
from lora_squeeze.cli.source import open_source
from lora_squeeze.errors import RankError
from lora_squeeze.measurements import Curve
from lora_squeeze.spelling import spell

if TYPE_CHECKING:
    from lora_squeeze.campaign.overview import Overview
    from lora_squeeze.exploration import Exploration

Record = TypeVar("Record")

__all__ = ["report_command"]

# An analysis is numbers without tensors, and nothing is computed or written of them.
_OF_TENSORS = ("dtype", "runtime", "max_lora_rank", "calibration", "method", "device")


@click.command("report", short_help="A page in one file, every policy under a slider.")
@click.argument("path")
@click.option("-o", "--output", type=PLACE, help="Write the page to this .html file.")
@click.option("--plots", type=PLACE, metavar="DIR", help="Write its figures as PNG and SVG to this folder.")
@click.option(
    "--curve",
    "curve_file",
    type=click.Path(path_type=Path),
    help="Quality measured with this adapter: what lora-squeeze curve wrote as .json.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@dtype_option
@runtime_options()
@rank_options()
@calibration_option
@compute_options
def report_command(
    path: str,
    output: Path | None,
    plots: Path | None,
    curve_file: Path | None,
    overwrite: bool,
    dtype: str | None,
    runtime: str,
    max_lora_rank: int | None,
    rank_options: RankOptions,
    calibration: Path | None,
    method: str,
    device: str,
) -> None:
    """Make a page to look at PATH: an adapter, the JSON of analyze --json, or a campaign's folder.

    The page is one file that opens in a browser and needs no network. Without --output and --plots,
    two of its figures are shown in the terminal.
    """
    from lora_squeeze.policies import POLICIES
    from lora_squeeze.verbs import explore_adapter

    refuse_stray_max_lora_rank(max_lora_rank, runtime)
    if _is_analysis(path):
        refuse_stray(_OF_TENSORS, f"a report of an adapter, and {path} is the JSON of an analysis")
    options = spelled(rank_options, dtype=dtype, runtime=runtime, max_lora_rank=max_lora_rank, calibration=calibration)
    refuse_stray_overwrite(overwrite, output, plots, options="--output or --plots")
    if output is not None:
        check_file(output, overwrite=overwrite, example="report.html", suffixes=(".html", ".htm"))
    if plots is not None:
        from lora_squeeze.report.plots import FIGURES

        check_plots(plots, FIGURES, overwrite=overwrite)
    if curve_file is not None and output is None:
        raise click.UsageError("--curve is shown in the page: give it a name with --output")
    curve = _read_record(curve_file, Curve.from_json, "what lora-squeeze curve wrote") if curve_file else None
    campaign = _campaign_at(Path(path))
    if campaign is not None:
        path = str(campaign.adapter)
    if _is_analysis(path):
        exploration = _from_record(Path(path), rank_options, options)
    else:
        decomposition = decomposed(open_source(path), method=method, device=device, calibration=calibration)
        with progress("Trying policies", len(POLICIES)) as advance:
            exploration = explore_adapter(
                decomposition,
                rank_options.policies or ("variance=0.95",),
                by=rank_options.by,
                limits=rank_options.limits,
                dtype=dtype,
                runtime=runtime,
                max_lora_rank=max_lora_rank,
                options=options,
                on_policy=advance,
            )
    if output is not None:
        _write_page(exploration, output, curve=curve, campaign=campaign, overwrite=overwrite)
    if plots is not None:
        _write_plots(exploration, plots, overwrite=overwrite)
    if output is None and plots is None:
        _show(exploration)


def _is_analysis(path: str) -> bool:
    return path.endswith(".json") and Path(path).is_file()


def _campaign_at(path: Path) -> Overview | None:
    if not (path / "manifest.json").is_file():
        return None
    from lora_squeeze.campaign.overview import overview

    return overview(path)


def _write_page(
    exploration: Exploration, output: Path, *, curve: Curve | None, campaign: Overview | None, overwrite: bool
) -> None:
    from lora_squeeze.formats.folder import new_file
    from lora_squeeze.report.html import report_page
    from lora_squeeze.sizes import bytes_text

    page = report_page(exploration, curve=curve, campaign=campaign).encode()
    with new_file(output, overwrite=overwrite) as file:
        file.write_bytes(page)
    click.echo(f"{output}: {len(exploration.settings)} settings of all policies, {bytes_text(len(page))}")


def _write_plots(exploration: Exploration, folder: Path, *, overwrite: bool) -> None:
    from lora_squeeze.report.plots import FIGURES, draw

    write_plots(folder, {name: partial(draw, name, exploration) for name in FIGURES}, overwrite=overwrite)


def _show(exploration: Exploration) -> None:
    from rich.console import Console

    from lora_squeeze.report.terminal import exploration_figures

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(exploration_figures(exploration, width=console.width))


def _from_record(path: Path, rank_options: RankOptions, options: tuple[str, ...]) -> Exploration:
    from lora_squeeze.exploration import explore_analysis
    from lora_squeeze.policies import POLICIES
    from lora_squeeze.records import Analysis

    analysis = _read_record(path, Analysis.from_json, "an adapter or what analyze --json printed")
    policies = rank_options.policies or (f"variance={spell(analysis.min_variance_retention)}",)
    with progress("Trying policies", len(POLICIES)) as advance:
        return explore_analysis(
            analysis, policies, by=rank_options.by, limits=rank_options.limits, options=options, on_policy=advance
        )


def _read_record(path: Path, from_json: Callable[[str], Record], what: str) -> Record:
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RankError(f"{path}: cannot be read: {error}") from error
    except RankError as error:
        raise RankError(f"{path}: {error}; give {what}") from error

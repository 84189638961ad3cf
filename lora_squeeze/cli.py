"""The command line: parse, call, print. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.settings import CHOICES, Settings, read_settings
from lora_squeeze.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_squeeze.records import Analysis, Compression

__all__ = ["main"]

Command = TypeVar("Command", bound=Callable[..., Any])


def _parse_ranks(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(rank) for rank in text.split(",") if text)
    except ValueError:
        raise click.BadParameter(f"'{text}' is not a list of ranks such as 4,8,16") from None


class _Group(click.Group):
    """Prints the project's own errors as one line; everything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LoraSqueezeError as error:
            raise click.ClickException(str(error)) from error


def _shared(command: Command) -> Command:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the record as JSON."),
        click.option("--layers", is_flag=True, help="Show every layer."),
        click.option("--device", default="cpu", help="Torch device that computes."),
        click.option(
            "--method",
            type=click.Choice(CHOICES["method"]),
            default="gram",
            show_default=True,
            help="Route of the SVD.",
        ),
        click.option(
            "--by",
            type=click.Choice(CHOICES["by"]),
            default="mean",
            show_default=True,
            help="Which layer must retain it.",
        ),
    ):
        command = option(command)
    return command


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
)
@click.version_option(__version__, prog_name="lora-squeeze")
def main() -> None:
    """Find the rank a LoRA adapter really needs, and make it that small."""


@main.command("analyze")
@click.argument("path")
@click.option("--retain", default=0.95, help="Fraction of the variance to retain.")
@click.option(
    "--ranks",
    default="",
    callback=_parse_ranks,
    show_default=False,
    help="Candidate ranks, as 4,8,16.  [default: powers of two]",
)
@click.option("--source-rank", default=0, help="The rank you expect; an error if the tensors say otherwise.")
@_shared
def analyze_command(
    path: str,
    retain: float,
    ranks: tuple[int, ...],
    source_rank: int,
    by: Any,
    method: str,
    device: str,
    layers: bool,
    as_json: bool,
) -> None:
    """Show what each rank would retain of the adapter at PATH, and recommend one."""
    from lora_squeeze import analyze, decompose, open_adapter

    adapter = open_adapter(path)
    with _progress("Analyzing", len(adapter.layers)) as advance:
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
    _print_analysis(analysis, layers=layers, as_json=as_json)


@main.command("compress")
@click.argument("path")
@click.argument("output")
@click.option("--rank", type=click.IntRange(min=1), help="The new rank of all layers.")
@click.option("--retain", type=float, help="Choose the smallest rank that retains this fraction of the variance.")
@click.option(
    "--dtype",
    type=click.Choice([one for one in CHOICES["dtype"] if one], case_sensitive=False),
    help="Of the new factors.  [default: as it was]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@_shared
def compress_command(
    path: str,
    output: str,
    rank: int | None,
    retain: float | None,
    dtype: str | None,
    overwrite: bool,
    by: Any,
    method: str,
    device: str,
    layers: bool,
    as_json: bool,
) -> None:
    """Write the adapter at PATH with a lower rank to OUTPUT, and say what was lost.

    Without --rank, the recommended rank is taken (--retain, default 0.95).
    """
    from lora_squeeze import decompose, fixed, open_adapter, squeeze, variance
    from lora_squeeze.formats.folder import check_output

    if rank is not None and retain is not None:
        raise click.UsageError("--rank and --retain contradict each other: give one of them")
    adapter = open_adapter(path)
    check_output(Path(output), source=adapter.folder, overwrite=overwrite)
    count = len(adapter.layers)
    if rank is not None:
        source, ranks = adapter, fixed(adapter.layers.values(), rank)
    else:
        with _progress("Analyzing", count) as advance:
            source = decompose(adapter, method=method, device=device, on_layer=advance)
        ranks = variance(source.spectra, 0.95 if retain is None else retain, by=by)
    with _progress("Squeezing", count) as advance:
        compression = squeeze(
            source,
            ranks,
            output,
            dtype=dtype.upper() if dtype else None,
            device=device,
            method=method,
            overwrite=overwrite,
            on_layer=advance,
        )
    _print_compression(compression, layers=layers, as_json=as_json)


@main.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--explain", is_flag=True, help="Say what would be done, and do nothing.")
def run_command(file: Path, explain: bool) -> None:
    """Do what the TOML FILE says: analyze and, with an output_path, compress."""
    settings = read_settings(file)
    if explain:
        _explain(file, settings)
        return
    from lora_squeeze import analyze, decompose, fixed, open_adapter, squeeze
    from lora_squeeze.formats.folder import check_output

    chosen = settings.squeeze
    adapter = open_adapter(chosen.adapter_path)
    if chosen.output_path:
        check_output(Path(chosen.output_path), source=adapter.folder, overwrite=chosen.overwrite)
    with _progress("Analyzing", len(adapter.layers)) as advance:
        decomposition = decompose(adapter, method=chosen.method, device=chosen.device, on_layer=advance)
    analysis = analyze(
        decomposition.spectra,
        source=adapter.source,
        source_rank=settings.source_rank,
        target_ranks=chosen.target_ranks,
        min_variance_retention=chosen.min_variance_retention,
        by="worst" if chosen.by == "worst" else "mean",
        notes=adapter.notes,
    )
    _print_analysis(analysis, layers=False, as_json=False)
    if chosen.output_path:
        rank = chosen.compress_to or analysis.recommended_rank
        with _progress("Squeezing", len(adapter.layers)) as advance:
            compression = squeeze(
                decomposition,
                fixed(decomposition.spectra, rank),
                chosen.output_path,
                dtype=chosen.dtype.upper() or None,
                device=chosen.device,
                overwrite=chosen.overwrite,
                on_layer=advance,
            )
        click.echo()
        _print_compression(compression, layers=False, as_json=False)


def _explain(file: Path, settings: Settings) -> None:
    chosen = settings.squeeze
    for label, value in {
        "mode": "squeeze",
        "config": file,
        "adapter_path": chosen.adapter_path,
        "source_rank": settings.source_rank or "from the tensors",
        "target_ranks": chosen.target_ranks or "powers of two up to the source rank",
        "min_variance_retention": f"{chosen.min_variance_retention} ({chosen.by} over layers)",
        "output_path": chosen.output_path or "none: analyze only",
        "compress_to": (chosen.compress_to or "the recommended rank") if chosen.output_path else "nothing is written",
        "device": chosen.device,
    }.items():
        click.echo(f"{label:<24}{value}")


def _print_analysis(analysis: Analysis, *, layers: bool, as_json: bool) -> None:
    from lora_squeeze.report.table import analysis_table, layers_table

    if as_json:
        click.echo(analysis.to_json())
        return
    if layers:
        _print(layers_table(analysis))
        click.echo()
    _print(analysis_table(analysis))


def _print_compression(compression: Compression, *, layers: bool, as_json: bool) -> None:
    from lora_squeeze.report.table import compression_table

    if as_json:
        click.echo(compression.to_json())
        return
    _print(compression_table(compression, layers=layers))


def _print(table: RenderableType) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    # A file or a pipe has no width to wrap at.
    console.print(table, soft_wrap=not console.is_terminal, width=None if console.is_terminal else 200)


@contextmanager
def _progress(what: str, total: int) -> Generator[Callable[[str], None], None, None]:
    """A bar on stderr; only in a terminal, and gone when the work is done."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda _name: progress.advance(task)

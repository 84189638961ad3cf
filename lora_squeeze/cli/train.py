"""lora-squeeze train and lora-squeeze continue."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_squeeze.cli.explaining import explain_run
from lora_squeeze.cli.options import PLACE, as_json
from lora_squeeze.cli.output import print_record, progress
from lora_squeeze.cli.source import open_source
from lora_squeeze.settings import ModelSettings, Settings, SqueezeSettings
from lora_squeeze.training.settings import (
    METHODS,
    DataSettings,
    LoggingSettings,
    RunSettings,
    TrainingSettings,
    check,
    read_run_settings,
)

if TYPE_CHECKING:
    from lora_squeeze.training.record import RunRecord

__all__ = ["continue_command", "train_command", "train_from_file"]


@click.command("train", short_help="Train an adapter as a TOML file says.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", type=PLACE, help="Folder of the run.  [default: logs/NAME of CONFIG]")
@click.option("--overwrite", is_flag=True, help="Begin anew if the folder holds a run.")
@click.option("--explain", is_flag=True, help="Say what would be done, and do nothing.")
@as_json
def train_command(config: Path, out: Path | None, overwrite: bool, explain: bool, as_json: bool) -> None:
    """Train one adapter as the TOML file CONFIG says; with [squeeze], squeeze it afterwards.

    A run that was interrupted goes on from its last checkpoint when the same command is given again.
    """
    train_from_file(config, out, overwrite=overwrite, explain=explain, as_json=as_json)


def train_from_file(
    config: Path, out: Path | None = None, *, overwrite: bool = False, explain: bool = False, as_json: bool = False
) -> None:
    """What `lora-squeeze train` does."""
    settings = read_run_settings(config)
    folder = out or Path(settings.logging.log_dir or Path("logs") / config.stem)
    if settings.squeeze is not None and (settings.squeeze.output_path or not explain):
        _check_squeeze(settings.squeeze, config, folder, overwrite=overwrite)
    if explain:
        explain_run(config, settings, folder)
        return
    record = _train(settings, folder, overwrite=overwrite, as_json=as_json)
    if settings.squeeze is not None:
        _squeeze(settings.squeeze, record, as_json=as_json)


@click.command("continue", short_help="Squeeze a saved adapter and train it on.")
@click.argument("adapter")
@click.option("--data", multiple=True, required=True, help="File, folder, data set or builtin:NAME.  Repeatable.")
@click.option("--out", required=True, type=PLACE, help="Folder of the run.")
@click.option("--rank", type=click.IntRange(min=1), help="Squeeze to this rank first.  [default: the rank it has]")
@click.option("--base", default="", show_default=False, help="The base model.  [default: the one that ADAPTER names]")
@click.option("--method", type=click.Choice(METHODS), default="sft", help="How to train.")
@click.option("--steps", type=click.IntRange(min=1), default=200, help="Optimizer steps.")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    help="Steps until the learning rate is reached.  [default: 100, at most half of --steps]",
)
@click.option("--lr", default=TrainingSettings.lr, help="Learning rate.")
@click.option("--batch-size", type=click.IntRange(min=1), default=TrainingSettings.batch_size, help="Examples a step.")
@click.option("--eval-data", multiple=True, help="Held-out data.  Repeatable.")
@click.option("--seed", type=click.IntRange(min=0), default=TrainingSettings.seed, help="Of the order of the data.")
@click.option("--device", default="auto", help="Torch device.")
@click.option("--overwrite", is_flag=True, help="Begin anew if the folder holds a run.")
@as_json
def continue_command(
    adapter: str,
    data: tuple[str, ...],
    out: Path,
    rank: int | None,
    base: str,
    method: str,
    steps: int,
    warmup: int | None,
    lr: float,
    batch_size: int,
    eval_data: tuple[str, ...],
    seed: int,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Squeeze a saved ADAPTER to a lower rank and train it on for a few steps (Cont-Squeeze).

    What else a run can be told is said in a TOML file: `[model] adapter` and `squeeze_to`, for `lora-squeeze train`.
    """
    if not adapter:
        raise click.UsageError("ADAPTER is empty: is a variable of the shell not set?")
    if warmup is not None and warmup >= steps:
        raise click.UsageError(f"--warmup {warmup} leaves no step at the learning rate: --steps is {steps}")
    settings = RunSettings(
        model=ModelSettings(model=base, adapter=adapter, squeeze_to=rank or 0, device=device),
        training=TrainingSettings(
            method=method,
            max_steps=steps,
            warmup_steps=min(100, steps // 2) if warmup is None else warmup,
            lr=lr,
            batch_size=batch_size,
            seed=seed,
        ),
        data=DataSettings(source=list(data), eval_source=list(eval_data)),
        logging=LoggingSettings(log_every=max(steps // 20, 1)),
    )
    check(settings, "continue")
    _train(settings, out, overwrite=overwrite, as_json=as_json)


def _train(settings: RunSettings, folder: Path, *, overwrite: bool, as_json: bool) -> RunRecord:
    from lora_squeeze.extras import require

    require("peft", "train")
    from lora_squeeze.report.training import run_table
    from lora_squeeze.training.folder import RunFolder
    from lora_squeeze.training.job import quiet_libraries
    from lora_squeeze.training.run import train

    run = RunFolder(folder)
    adapter = settings.model.adapter
    if adapter and not Path(adapter).exists() and (overwrite or run.finished() is None):
        open_source(adapter)  # fetched with a bar, and before the folder of the run is made
    if not overwrite and run.finished() is not None:
        click.echo(f"{folder}: has finished already; --overwrite trains it anew", err=True)
    elif not overwrite and (checkpoint := run.last_checkpoint()) is not None:
        click.echo(f"Going on from {checkpoint}", err=True)
    with quiet_libraries(), training_progress() as on_log:
        record = train(settings, folder, overwrite=overwrite, on_log=on_log)
    print_record(record, run_table, as_json=as_json)
    return record


def _check_squeeze(chosen: SqueezeSettings, config: Path, folder: Path, *, overwrite: bool) -> None:
    from lora_squeeze.squeezing import check_ahead
    from lora_squeeze.training.folder import RunFolder

    run = RunFolder(folder)
    check_ahead(chosen, config, source=run.final, made=not overwrite and run.finished() is not None)


def _squeeze(chosen: SqueezeSettings, record: RunRecord, *, as_json: bool) -> None:
    from lora_squeeze.report.table import analysis_table, compression_table
    from lora_squeeze.squeezing import squeeze_as_set

    click.echo(err=as_json)
    _, compression = squeeze_as_set(
        open_source(record.adapter),
        Settings(replace(chosen, adapter_path=record.adapter)),
        progress=progress,
        on_analysis=lambda analysis: print_record(analysis, analysis_table, as_json=as_json),
        on_made=lambda: click.echo(
            f"{chosen.output_path}: has been made of this adapter by these settings already; overwrite = true in "
            "[squeeze] makes it anew",
            err=True,
        ),
    )
    if compression is not None:
        print_record(compression, compression_table, as_json=as_json)


@contextmanager
def training_progress() -> Generator[Callable[[int, int, Mapping[str, float]], None], None, None]:
    """A bar with the latest metrics on a terminal; elsewhere a line on stderr for each logging step."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lora_squeeze.report.training import metrics_line

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step, steps, metrics: _echo_step(step, steps, metrics_line(metrics))
        return
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[said]}"), console=console, transient=True) as bar:
        task = bar.add_task("Training", total=None, said="")

        def on_log(step: int, steps: int, metrics: Mapping[str, float]) -> None:
            bar.update(task, completed=step, total=steps)
            if said := metrics_line(metrics):
                bar.update(task, said=said)

        yield on_log


def _echo_step(step: int, steps: int, said: str) -> None:
    if said:
        click.echo(f"step {step}/{steps}  {said}", err=True)

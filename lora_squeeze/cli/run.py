"""lora-squeeze run."""

from __future__ import annotations

from pathlib import Path

import click

from lora_squeeze.cli.decomposing import decomposed
from lora_squeeze.cli.output import print_record, progress
from lora_squeeze.cli.source import open_source
from lora_squeeze.settings import Settings, read_settings

__all__ = ["run_command"]


@click.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--explain", is_flag=True, help="Say what would be done, and do nothing.")
def run_command(file: Path, explain: bool) -> None:
    """Do what the TOML FILE says: analyze and, with an output_path, compress."""
    settings = read_settings(file)
    if explain:
        _explain(file, settings)
    else:
        _run(settings)


def _run(settings: Settings) -> None:
    from lora_squeeze import analyze, squeeze
    from lora_squeeze.formats import check_output_of
    from lora_squeeze.report.table import analysis_table, compression_table
    from lora_squeeze.verbs import choose_ranks

    chosen = settings.squeeze
    adapter = open_source(chosen.adapter_path)
    if chosen.output_path:
        check_output_of(adapter, Path(chosen.output_path), overwrite=chosen.overwrite)
    calibration = Path(chosen.calibration) if chosen.calibration else None
    decomposition = decomposed(adapter, method=chosen.method, device=chosen.device, calibration=calibration)
    analysis = analyze(
        decomposition.spectra,
        source=adapter.source,
        source_rank=settings.source_rank,
        target_ranks=chosen.target_ranks,
        min_variance_retention=chosen.min_variance_retention,
        by="worst" if chosen.by == "worst" else "mean",
        notes=decomposition.adapter.notes,
    )
    print_record(analysis, analysis_table, as_json=False)
    if not chosen.output_path:
        return
    dtype = chosen.dtype.upper() or None
    policy = chosen.policy or f"fixed={chosen.compress_to or analysis.recommended_rank}"
    ranks = choose_ranks(
        decomposition,
        policy,
        by="worst" if chosen.by == "worst" else "mean",
        limits=chosen.limits,
        dtype=dtype,
        runtime=chosen.runtime,
        max_lora_rank=chosen.max_lora_rank or None,
    )
    with progress("Squeezing", len(adapter.layers)) as advance:
        compression = squeeze(
            decomposition,
            ranks,
            chosen.output_path,
            dtype=dtype,
            device=chosen.device,
            runtime=chosen.runtime,
            max_lora_rank=chosen.max_lora_rank or None,
            base=chosen.base_path or None,
            overwrite=chosen.overwrite,
            on_layer=advance,
        )
    click.echo()
    print_record(compression, compression_table, as_json=False)


def _explain(file: Path, settings: Settings) -> None:
    chosen = settings.squeeze
    target = chosen.policy or chosen.compress_to or "the recommended rank"
    for label, value in {
        "mode": "squeeze",
        "config": file,
        "adapter_path": chosen.adapter_path,
        "source_rank": settings.source_rank or "from the tensors",
        "target_ranks": chosen.target_ranks or "powers of two up to the source rank",
        "min_variance_retention": f"{chosen.min_variance_retention} ({chosen.by} over layers)",
        "output_path": chosen.output_path or "none: analyze only",
        "compress_to": target if chosen.output_path else "nothing is written",
        "calibration": chosen.calibration or "none: variance is that of the weights",
        "runtime": chosen.runtime or "all that read its format",
        "device": chosen.device,
    }.items():
        click.echo(f"{label:<24}{value}")

"""lora-squeeze plan."""

from __future__ import annotations

from pathlib import Path

import click

from lora_squeeze.cli.decomposing import decomposed
from lora_squeeze.cli.files import check_file, print_and_write, refuse_stray_overwrite
from lora_squeeze.cli.options import (
    PLACE,
    RankOptions,
    as_json,
    calibration_option,
    compute_options,
    dtype_option,
    rank_options,
    refuse_stray_by,
    refuse_stray_max_lora_rank,
    runtime_options,
)
from lora_squeeze.cli.output import print_record
from lora_squeeze.cli.source import open_source

__all__ = ["plan_command"]


@click.command("plan", short_help="Choose ranks layer by layer; write only numbers.")
@click.argument("path")
@click.option("-o", "--output", type=PLACE, help="Write the ranks to this JSON file.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@dtype_option
@runtime_options()
@rank_options(repeatable=False)
@calibration_option
@compute_options
@as_json
def plan_command(
    path: str,
    output: Path | None,
    overwrite: bool,
    dtype: str | None,
    runtime: str,
    max_lora_rank: int | None,
    rank_options: RankOptions,
    calibration: Path | None,
    method: str,
    device: str,
    as_json: bool,
) -> None:
    """Choose ranks for the adapter at PATH and write nothing but numbers.

    Edit the file as you like and apply it: lora-squeeze compress PATH OUT --ranks ranks.json
    """
    from lora_squeeze.report.table import plan_table
    from lora_squeeze.verbs import choose_ranks, outcome

    refuse_stray_max_lora_rank(max_lora_rank, runtime)
    if len(rank_options.policies) > 1:
        raise click.UsageError("a plan has one --policy; lora-squeeze compare shows several")
    refuse_stray_by(rank_options)
    refuse_stray_overwrite(overwrite, output, options="--output")
    adapter = open_source(path)
    if output is not None:
        check_file(output, overwrite=overwrite, example="ranks.json", source=adapter.place)
    decomposition = decomposed(adapter, method=method, device=device, calibration=calibration)
    ranks = choose_ranks(
        decomposition,
        *rank_options.policies,
        by=rank_options.by,
        limits=rank_options.limits,
        dtype=dtype,
        runtime=runtime,
        max_lora_rank=max_lora_rank,
    )
    found = outcome(decomposition, ranks, dtype=dtype, runtime=runtime)
    print_and_write(
        lambda: print_record(ranks, lambda plan: plan_table(plan, found), as_json=as_json),
        output,
        lambda file: file.write_text(ranks.to_json() + "\n", encoding="utf-8"),
        overwrite=overwrite,
    )

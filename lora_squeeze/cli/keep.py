"""lora-squeeze compress --keep: the smallest adapter that is still good enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_squeeze.cli.data_options import DataOptions, opened, read, trial_for
from lora_squeeze.cli.decomposing import decomposed
from lora_squeeze.cli.options import RankOptions
from lora_squeeze.cli.output import print_record
from lora_squeeze.measurements import Kept

__all__ = ["compress_keeping"]


def compress_keeping(
    path: str,
    output: str,
    *,
    keep: float,
    metric: str,
    confident: bool,
    rank_options: RankOptions,
    data_options: DataOptions,
    calibration: Path | None,
    method: str,
    device: str,
    as_json: bool,
    layers: bool,
    **writing: Any,
) -> Kept:
    """Search, confirm, write and print. writing: dtype, runtime, max_lora_rank, overwrite."""
    from lora_squeeze.evaluation.keep import Criterion, keep_quality
    from lora_squeeze.formats import check_output_of
    from lora_squeeze.report.quality import kept_table

    if not data_options.data:
        raise click.UsageError("--keep needs --data: on which examples shall the quality be kept?")
    criterion = Criterion(metric, keep, confident=confident)
    examples = read(data_options)
    subject = opened(data_options, (path,), examples)
    adapter = subject.adapters["default"]
    check_output_of(adapter, Path(output), overwrite=writing["overwrite"])
    kept = keep_quality(
        subject,
        decomposed(adapter, method=method, device=device, calibration=calibration),
        Path(output),
        trial_for(subject, data_options, examples),
        criterion,
        policies=rank_options.policies or ("params",),
        by=rank_options.by,
        limits=rank_options.limits,
        on_step=lambda step: None if as_json else click.echo(_line(step.policy, step.passes), err=True),
        **writing,
    )
    print_record(kept, lambda record: kept_table(record, layers=layers), as_json=as_json)
    return kept


def _line(policy: str, passes: bool) -> str:
    return f"{policy}: {'passes' if passes else 'is not good enough'}"

"""lora-squeeze calibrate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_squeeze.cli.data_options import DATA_PARAMETERS, DataOptions, data_options, opened, read
from lora_squeeze.cli.files import check_file
from lora_squeeze.cli.options import PLACE, as_json, refuse_stray
from lora_squeeze.cli.output import print_record, progress_of

if TYPE_CHECKING:
    from lora_squeeze.moments import Moments

__all__ = ["calibrate_command"]


def _parse_shard(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"'{text}' is not K/N, such as 2/8 for the second of eight parts")
    return int(match[1]), int(match[2])


@click.command("calibrate", short_help="Measure on data what layers get, for --calibration.")
@click.argument("paths", nargs=-1, required=True, metavar="ADAPTER | MOMENTS...")
@click.option("-o", "--output", type=PLACE, required=True, help="The .safetensors file to write.")
@click.option("--gradients", is_flag=True, help="Weigh outputs by the loss's gradients, too.")
@click.option("--shard", default="1/1", callback=_parse_shard, help="Every N-th example from the K-th on, as 2/8.")
@click.option("--merge", "merging", is_flag=True, help="Add up MOMENTS of several shards instead.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@data_options(required=False)
@as_json
def calibrate_command(
    paths: tuple[str, ...],
    output: Path,
    gradients: bool,
    shard: tuple[int, int],
    merging: bool,
    overwrite: bool,
    data_options: DataOptions,
    as_json: bool,
) -> None:
    """Measure on data what each layer of ADAPTER is given, for --calibration of the other commands.

    With --merge, add up the MOMENTS that several processes wrote for parts of the data.
    """
    from lora_squeeze.moments import merge_moments, read_moments, save_moments
    from lora_squeeze.report.quality import moments_table

    if merging:
        what = "measuring: --merge adds up files that are there, and takes no model and no data"
        refuse_stray(("gradients", "shard", *DATA_PARAMETERS), what)
    elif len(paths) != 1:
        raise click.UsageError("one adapter is calibrated at a time; to add up moments, say --merge")
    elif not data_options.data:
        raise click.UsageError("--data is missing: on which texts shall it be calibrated?")
    source = None if merging else Path(paths[0]).expanduser()
    check_file(output, overwrite=overwrite, example="moments.safetensors", suffixes=(".safetensors",), source=source)
    if merging:
        moments = merge_moments([read_moments(Path(path)) for path in paths])
    else:
        moments = _calibrated(paths[0], data_options, gradients=gradients, shard=shard)
    save_moments(moments, output, overwrite=overwrite)
    print_record(read_moments(output).summary(str(output)), moments_table, as_json=as_json)


def _calibrated(path: str, options: DataOptions, *, gradients: bool, shard: tuple[int, int]) -> Moments:
    from lora_squeeze.calibration import calibrate
    from lora_squeeze.errors import DataError
    from lora_squeeze.evaluation.rows import batches_of, digest_of, learnt_rows
    from lora_squeeze.moments import Seen

    everything = read(options)
    part, parts = shard
    examples = everything[part - 1 :: parts]
    if not examples:
        raise DataError(f"{', '.join(options.data)}: part {part} of {parts} is empty; there are {len(everything)} rows")
    subject = opened(options, (path,), everything)
    rows = learnt_rows(
        examples,
        subject.reader,
        task=subject.task,
        labels=subject.labels,
        prompt=options.prompt,
        max_length=options.max_length,
    )
    source = ", ".join(options.data) + (f", part {part} of {parts}" if parts > 1 else "")
    with progress_of("Calibrating", len(rows)) as advance:
        return calibrate(
            subject.model,
            batches_of(rows, subject.reader, batch_size=options.batch_size, device=subject.device, on_batch=advance),
            seen=Seen(source, digest_of(examples), len(examples)),
            gradients=gradients,
            adapter_sha256=subject.adapters["default"].sha256(),
            base_model=subject.base,
        )

"""lora-squeeze merge."""

from __future__ import annotations

from pathlib import Path

import click

from lora_squeeze.cli.compress import choose, chosen_policies
from lora_squeeze.cli.decomposing import decomposed
from lora_squeeze.cli.options import (
    PLACE_AS_TEXT,
    RankOptions,
    as_json,
    compute_options,
    dtype_option,
    rank_options,
    refuse_stray_max_lora_rank,
    runtime_options,
)
from lora_squeeze.cli.output import print_record, progress
from lora_squeeze.cli.source import open_source
from lora_squeeze.limits import Limits

__all__ = ["merge_command"]


def _parse_weights(_context: click.Context, _option: click.Parameter, text: str) -> tuple[float, ...] | str:
    if text in ("average", "sum"):
        return text
    try:
        return tuple(float(weight) for weight in text.split(","))
    except ValueError:
        raise click.BadParameter(f"'{text}' is neither average nor sum nor a list of numbers such as 0.7,0.3") from None


@click.command("merge", short_help="The weighted sum of adapters, exact or squeezed.")
@click.argument("paths", nargs=-1, required=True)
@click.argument("output", type=PLACE_AS_TEXT)
@click.option(
    "--weights", default="average", callback=_parse_weights, help="One for each adapter, as 0.7,0.3; average; or sum."
)
@click.option("--rank", type=click.IntRange(min=1), help="The rank of all layers: --policy fixed=RANK.")
@click.option("--retain", type=float, help="Retained variance: --policy variance=RETAIN.")
@click.option("--allow-other-base", is_flag=True, help="Merge adapters that name different base models.")
@click.option("--keep-first", is_flag=True, help="Take trained heads and the like from the first where they differ.")
@dtype_option
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@click.option("--layers", is_flag=True, help="Show every layer.")
@runtime_options()
@rank_options()
@compute_options
@as_json
def merge_command(
    paths: tuple[str, ...],
    output: str,
    weights: tuple[float, ...] | str,
    rank: int | None,
    retain: float | None,
    allow_other_base: bool,
    keep_first: bool,
    dtype: str | None,
    overwrite: bool,
    layers: bool,
    runtime: str,
    max_lora_rank: int | None,
    rank_options: RankOptions,
    method: str,
    device: str,
    as_json: bool,
) -> None:
    """Write the weighted sum of the adapters at PATHS to OUTPUT, squeezed to a rank.

    Without a policy nothing is lost: the ranks of the sum are the sums of the ranks. OUTPUT has the
    format, configuration and other files of the first adapter.
    """
    from lora_squeeze import squeeze
    from lora_squeeze.formats import check_output_of
    from lora_squeeze.merging import merge
    from lora_squeeze.report.table import compression_table
    from lora_squeeze.verbs import full_rank

    refuse_stray_max_lora_rank(max_lora_rank, runtime)
    policies = chosen_policies(rank, retain, None, rank_options)
    if len(policies) > 1:
        raise click.UsageError("a merge has one --policy; write it at full rank and compress that with several")
    if not policies and (rank_options.limits != Limits() or rank_options.by != "mean"):
        raise click.UsageError("--by and limits on ranks need a --rank, --retain or --policy that they limit")
    adapters = [open_source(path) for path in paths]
    shares = {"average": None, "sum": (1.0,) * len(adapters)}.get(weights) if isinstance(weights, str) else weights
    merged = merge(adapters, shares, allow_other_base=allow_other_base, keep_first=keep_first)
    for adapter in adapters:
        check_output_of(adapter, Path(output), overwrite=overwrite)
    if policies:
        source = decomposed(merged, method=method, device=device)
        (plan,) = choose(source, policies, rank_options, dtype=dtype, runtime=runtime, max_lora_rank=max_lora_rank)
    else:
        source, plan = merged, full_rank(merged)
    with progress("Merging", len(merged.layers)) as advance:
        compression = squeeze(
            source,
            plan,
            output,
            dtype=dtype,
            device=device,
            method=method,
            runtime=runtime,
            max_lora_rank=max_lora_rank,
            overwrite=overwrite,
            on_layer=advance,
        )
    print_record(compression, lambda record: compression_table(record, layers=layers), as_json=as_json)

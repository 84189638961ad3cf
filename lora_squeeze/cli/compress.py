"""lora-squeeze compress."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_squeeze.cli.data_options import DATA_PARAMETERS, DataOptions, data_options
from lora_squeeze.cli.decomposing import decomposed
from lora_squeeze.cli.keep import compress_keeping
from lora_squeeze.cli.options import (
    PLACE_AS_TEXT,
    RankOptions,
    as_json,
    calibration_option,
    compute_options,
    dtype_option,
    push_options,
    rank_options,
    refuse_stray,
    refuse_stray_by,
    refuse_stray_max_lora_rank,
    runtime_options,
)
from lora_squeeze.cli.output import print_record, progress, waiting
from lora_squeeze.cli.source import open_source
from lora_squeeze.limits import Limits
from lora_squeeze.measurements import CRITERIA
from lora_squeeze.spelling import spell

if TYPE_CHECKING:
    from lora_squeeze import Adapter, Compression, Decomposition, Ranks

__all__ = ["choose", "chosen_policies", "compress_command"]


@click.command("compress", short_help="Write the adapter with lower ranks; --keep, --push.")
@click.argument("path")
@click.argument("output", type=PLACE_AS_TEXT)
@click.option("--rank", type=click.IntRange(min=1), help="The new rank of all layers: --policy fixed=RANK.")
@click.option("--retain", type=float, help="Retained variance: --policy variance=RETAIN.")
@click.option("--ranks", "ranks_file", type=click.Path(path_type=Path), help="A plan from lora-squeeze plan.")
@dtype_option
@click.option("--base", type=click.Path(), help="The base model: for --keep; for DoRA, to fit the magnitudes.")
@click.option("--keep", type=float, help="The smallest adapter that keeps this share of the quality on --data.")
@click.option("--metric", type=click.Choice(CRITERIA), default="loss", help="For --keep.")
@click.option("--confident", is_flag=True, help="For --keep: in 95% of bootstrap draws, too.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@click.option("--layers", is_flag=True, help="Show every layer.")
@push_options
@runtime_options()
@rank_options()
@calibration_option
@data_options(model="model-", required=False, base=False)
@compute_options
@as_json
def compress_command(
    path: str,
    output: str,
    rank: int | None,
    retain: float | None,
    ranks_file: Path | None,
    dtype: str | None,
    base: str | None,
    keep: float | None,
    metric: str,
    confident: bool,
    overwrite: bool,
    layers: bool,
    repo: str,
    private: bool,
    commit_message: str,
    runtime: str,
    max_lora_rank: int | None,
    rank_options: RankOptions,
    calibration: Path | None,
    data_options: DataOptions,
    method: str,
    device: str,
    as_json: bool,
) -> None:
    """Write the adapter at PATH with lower ranks to OUTPUT, and say what was lost.

    Without a policy, the smallest rank that retains 95 % of the variance is taken. Several policies
    write several adapters, OUTPUT/POLICY each, from one decomposition. OUTPUT has the format of PATH:
    a folder for PEFT, a .safetensors file for kohya and diffusers. With --keep, the adapter is run on
    data: the smallest one of the --policy (by name, default params) that is still good enough is written.
    """
    from lora_squeeze import squeeze
    from lora_squeeze.formats import check_output_of
    from lora_squeeze.report.table import compression_table

    refuse_stray_max_lora_rank(max_lora_rank, runtime)
    policies = chosen_policies(rank, retain, ranks_file, rank_options)
    _check_push(repo, private, commit_message, policies if keep is None else ())
    if keep is not None:
        if policies != rank_options.policies or ranks_file is not None:
            raise click.UsageError("--keep seeks the ranks itself: leave out --rank, --retain and --ranks")
        refuse_stray_by(rank_options, () if policies else ("params",))
        kept = compress_keeping(
            path,
            output,
            keep=keep,
            metric=metric,
            confident=confident,
            rank_options=rank_options,
            data_options=replace(data_options, base=base or ""),
            calibration=calibration,
            method=method,
            device=device,
            as_json=as_json,
            layers=layers,
            dtype=dtype,
            runtime=runtime,
            max_lora_rank=max_lora_rank,
            overwrite=overwrite,
        )
        if repo:
            _push(kept.compression, repo, private=private, commit_message=commit_message, as_json=as_json)
        return
    refuse_stray(("metric", "confident", *DATA_PARAMETERS), "--keep")
    adapter = open_source(path)
    suffix = ".safetensors" if adapter.single_file else ""
    outputs = [Path(output)] if len(policies) < 2 else [Path(output, policy + suffix) for policy in policies]
    for one in outputs:
        check_output_of(adapter, one, overwrite=overwrite)
    source: Adapter | Decomposition = adapter
    if ranks_file is not None:
        plans = [_read_plan(ranks_file)]
        if calibration is not None:
            source = decomposed(adapter, method=method, device=device, calibration=calibration)
    elif rank is not None and rank_options.limits == Limits() and runtime in ("", "peft") and calibration is None:
        plans = [_fixed(adapter, rank)]  # known beforehand: one pass over the file is enough
    else:
        source = decomposed(adapter, method=method, device=device, calibration=calibration)
        plans = choose(source, policies, rank_options, dtype=dtype, runtime=runtime, max_lora_rank=max_lora_rank)
    records: list[str] = []
    for plan, one in zip(plans, outputs, strict=True):
        with progress(f"Squeezing {plan.policy}", len(adapter.layers)) as advance:
            compression = squeeze(
                source,
                plan,
                one,
                dtype=dtype,
                device=device,
                method=method,
                runtime=runtime,
                max_lora_rank=max_lora_rank,
                base=base,
                overwrite=overwrite,
                on_layer=advance,
            )
        if as_json and len(plans) > 1:
            records.append(compression.to_json())
        else:
            if plan is not plans[0]:
                click.echo()
            print_record(compression, lambda record: compression_table(record, layers=layers), as_json=as_json)
        if repo:
            _push(compression, repo, private=private, commit_message=commit_message, as_json=as_json)
    if records:
        click.echo(f"[{', '.join(records)}]")


def _check_push(repo: str, private: bool, commit_message: str, policies: tuple[str, ...]) -> None:
    """Before anything is computed: whether it could be pushed at all."""
    if not repo:
        if private or commit_message:
            raise click.UsageError("--private and --commit-message belong to --push")
        return
    if len(policies) > 1:
        raise click.UsageError("--push puts one adapter on the Hub: give one policy")
    from lora_squeeze.upload import check_push

    check_push(repo)


def _push(compression: Compression, repo: str, *, private: bool, commit_message: str, as_json: bool) -> None:
    from lora_squeeze import push

    with waiting(f"Pushing to {repo}"):
        address = push(compression, repo, private=private or None, commit_message=commit_message)
    click.echo(f"Pushed to {address}", err=as_json)


def chosen_policies(
    rank: int | None, retain: float | None, ranks_file: Path | None, rank_options: RankOptions
) -> tuple[str, ...]:
    """The policies that options ask for, spelled NAME=VALUE; none: the default. Raises UsageError for two answers."""
    given = {
        "--rank": rank is not None,
        "--retain": retain is not None,
        "--ranks": ranks_file is not None,
        "--policy": bool(rank_options.policies),
    }
    named = [option for option, is_given in given.items() if is_given]
    if ranks_file is not None and rank_options.limits != Limits():
        raise click.UsageError("--ranks is a finished plan: limits on ranks belong to lora-squeeze plan")
    if repeated := [policy for policy, count in Counter(rank_options.policies).items() if count > 1]:
        raise click.UsageError(f"--policy {repeated[0]} is given twice")
    if len(named) > 1:
        raise click.UsageError(f"{' and '.join(named)} contradict each other: give one of them")
    refuse_stray_by(rank_options, () if rank is None and ranks_file is None else ("fixed",))
    if rank is not None:
        return (f"fixed={rank}",)
    if retain is not None:
        return (f"variance={spell(retain)}",)
    return rank_options.policies


def _fixed(adapter: Adapter, rank: int) -> Ranks:
    from lora_squeeze import fixed

    return fixed(adapter.layers.values(), rank)


def _read_plan(file: Path) -> Ranks:
    from lora_squeeze.documents import read_text
    from lora_squeeze.errors import RankError
    from lora_squeeze.records import Ranks

    try:
        return Ranks.from_json(read_text(file))
    except (OSError, ValueError) as error:
        raise RankError(f"{file}: cannot be read: {error}") from error
    except RankError as error:
        raise RankError(f"{file}: {error}") from error


def choose(
    decomposition: Decomposition,
    policies: tuple[str, ...],
    rank_options: RankOptions,
    *,
    dtype: str | None,
    runtime: str,
    max_lora_rank: int | None,
) -> list[Ranks]:
    """The plan of each policy; without any, the smallest rank that retains 95 % of the variance."""
    from lora_squeeze.verbs import choose_ranks

    return [
        choose_ranks(
            decomposition,
            policy,
            by=rank_options.by,
            limits=rank_options.limits,
            dtype=dtype,
            runtime=runtime,
            max_lora_rank=max_lora_rank,
        )
        for policy in policies or ("variance=0.95",)
    ]

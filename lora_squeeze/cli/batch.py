"""lora-squeeze batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_squeeze.cli.options import PLACE, refuse_stray
from lora_squeeze.cli.output import print_table, progress
from lora_squeeze.settings import CHOICES

if TYPE_CHECKING:
    from lora_squeeze.batch import BatchRecord

__all__ = ["batch_command"]


@click.command("batch", short_help="Squeeze many adapters by one policy.")
@click.argument("adapters", nargs=-1, required=True)
@click.option("--out", required=True, type=PLACE, help="Folder of the results.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=("variance=0.95",),
    metavar="NAME=VALUE",
    help="How to choose ranks, for each adapter.",
)
@click.option("--dtype", type=click.Choice(CHOICES["dtype"][1:]), help="Of the new factors.  [default: as it was]")
@click.option("--for", "runtime", type=click.Choice(CHOICES["runtime"][1:]), help="The runtime that has to load them.")
@click.option("--device", default="cpu", help="Torch device that computes.")
@click.option("--executor", type=click.Choice(("inline", "processes", "ray")), default="inline", help="Where.")
@click.option("--workers", type=click.IntRange(min=1), default=4, help="At a time, in processes or on Ray.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
@click.pass_context
def batch_command(
    context: click.Context,
    adapters: tuple[str, ...],
    out: Path,
    policies: tuple[str, ...],
    dtype: str | None,
    runtime: str | None,
    device: str,
    executor: str,
    workers: int,
    as_json: bool,
) -> None:
    """Squeeze many ADAPTERS by one policy; a folder stands for the adapters in it.

    The same command again goes on: what has been squeezed by the same settings stays, unless the adapter has
    changed since. Exit code 1 if any failed.
    """
    from lora_squeeze.batch import batch_to_json, listed, squeeze_batch
    from lora_squeeze.policies import parse_policy
    from lora_squeeze.report.batch import batch_table

    *others, policy = policies
    if others:
        raise click.UsageError(
            f"a batch has one --policy, not {' and '.join(policies)}: give each a folder of its own with --out, or "
            "one adapter to lora-squeeze compress with several"
        )
    parse_policy(policy)
    if executor == "inline":
        refuse_stray(("workers",), "--executor processes or ray: inline, it is one at a time")
    done = 0
    with progress("Squeezing", len(listed(adapters))) as advance:

        def on_change(records: Sequence[BatchRecord]) -> None:
            nonlocal done
            finished = sum(one.status != "pending" for one in records)
            for _ in range(finished - done):
                advance("")
            done = finished

        records = squeeze_batch(
            adapters,
            out,
            policy=policy,
            device=device,
            dtype=dtype or "",
            runtime=runtime or "",
            executor=executor,
            workers=workers,
            on_change=on_change,
        )
    if as_json:
        click.echo(batch_to_json(records), nl=False)
    else:
        print_table(batch_table(records))
    if any(record.status == "failed" for record in records):
        context.exit(1)
